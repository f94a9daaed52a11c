"""Many pictures on many processes and machines, by Ray Data.

    dataset -> map_batches(Compress) -> dataset     bytes in, bytes out, for pipelines of your own
    folders -> plan -> jobs -> make -> outcomes     files in, files out, for `vqcodec compress --ray`

Ray schedules, restarts and balances; here is what it runs. An actor holds one model and converts a group of files at a
time. The files of `make` are read and written by the actors themselves, so that only names pass through Ray.
"""

from vqcodec.distributed.columns import Compress, Decompress
from vqcodec.distributed.connection import cluster
from vqcodec.distributed.dispatch import files_of_task, make
from vqcodec.distributed.jobs import Job, Outcome, plan

__all__ = ["Compress", "Decompress", "Job", "Outcome", "cluster", "files_of_task", "make", "plan"]
