"""Dispatch: jobs go to actors on all CPUs or GPUs of a cluster, and their outcomes come back."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import ray.data

from vqcodec.distributed import places
from vqcodec.distributed.actors import Files
from vqcodec.distributed.columns import Transcoder
from vqcodec.distributed.jobs import Job, Outcome
from vqcodec.errors import WeightsError

MOST_FILES = 16  # of a task of Ray: what is tried again, from its first unfinished file, when its actor dies
RETRIES = 3  # of such a task; a picture that always kills its actor must not stop the rest
_DIED = f"not finished: {1 + RETRIES} workers died of it or of a file beside it (memory, or a crash)"


def files_of_task(count: int, actors: int) -> int:
    """How many of `count` files an actor gets at a time: few, so that all actors finish at about the same time."""
    return min(MOST_FILES, max(1, count // (4 * actors)))


def make(
    jobs: Sequence[Job], transcoder: Callable[..., Transcoder], *, output: str, overwrite: bool, device: str = "auto"
) -> Iterator[Outcome]:
    """Make files on all CPUs or GPUs of the connected cluster.

    Args:
        jobs: what to make.
        transcoder: makes the transcoder, given `device`; it is sent to the actors.
        output: the folder to fill, a path or a URI that every machine sees.
        overwrite: whether a file that has appeared since the jobs were planned is made again.
        device: "cpu"; "cuda"; or "auto", which is CUDA if the cluster has GPUs. An actor has a GPU of its own, or a CPU
            and one thread of torch.

    Yields:
        The outcome of each job, as they come.

    Raises:
        WeightsError: the weights cannot be used, or the cluster has no GPU for "cuda".
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise WeightsError("the cluster has no GPU")
    transcoder(device="cpu")  # fails here, once, if it would fail in every actor
    use_gpu = device != "cpu" and gpus > 0
    most = gpus if use_gpu else int(resources.get("CPU", 1))
    rows = files_of_task(len(jobs), most)
    count = -(-len(jobs) // rows)

    table = pa.Table.from_pylist([vars(job) for job in jobs])
    dataset = ray.data.from_arrow(table, override_num_blocks=count)
    context = dataset.context  # of this dataset alone
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard takes as long as it takes
    context.max_errored_blocks = -1  # their jobs are missed below
    with warnings.catch_warnings():
        # Ray retries without end by default. It plans to drop this argument, so pyproject.toml limits its version.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        dataset = dataset.map_batches(
            Files,
            fn_constructor_kwargs={
                "transcoder": functools.partial(transcoder, device="cuda" if use_gpu else "cpu"),
                "output": places.absolute(output),
                "overwrite": overwrite,
                "threads": None if use_gpu else 1,
                "restarted": _restarted,
            },
            batch_format="pyarrow",
            batch_size=rows,
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
            compute=ray.data.ActorPoolStrategy(size=min(most, count), max_tasks_in_flight_per_actor=1),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    left = {job.source for job in jobs}
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            left.discard(row["source"])
            yield Outcome(**row)
    for source in sorted(left):
        yield Outcome(source, 0, 0, [[source, _DIED]], [])


def _restarted() -> bool:
    """Whether Ray has started this actor anew."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)
