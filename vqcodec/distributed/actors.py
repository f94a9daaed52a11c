"""Actors: what each does with the jobs that it gets."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pyarrow as pa
import torch
from pyarrow import fs

from vqcodec.distributed import places, shards
from vqcodec.distributed.columns import STRINGS, Transcoder
from vqcodec.distributed.groups import MOST_FILES, Converted, Item
from vqcodec.distributed.jobs import Job, Outcome, is_shard
from vqcodec.errors import one_line

_OUTCOME = pa.schema(
    [
        ("source", pa.string()),
        ("read", pa.int64()),
        ("written", pa.int64()),
        ("errors", pa.list_(STRINGS)),
        ("notes", pa.list_(STRINGS)),
    ]
)


class Files:
    """A callable for `Dataset.map_batches`: takes rows of jobs, makes the files, and returns rows of outcomes.

    Args:
        transcoder: makes the transcoder.
        output: the folder to fill, an absolute path or a URI.
        overwrite: whether a file that has appeared since the jobs were planned is made again.
        threads: of torch; None for its own choice.
        restarted: tells whether this actor stands in for one that died. Then its first jobs, which may have been the
            cause, are done one by one, so that the files beside a deadly one are made.
    """

    def __init__(
        self,
        transcoder: Callable[[], Transcoder],
        output: str,
        overwrite: bool,
        threads: int | None = None,
        restarted: Callable[[], bool] = lambda: False,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._transcoder = transcoder()
        self._filesystem, self._base = places.open_filesystem(output)
        self._overwrite = overwrite
        self._most_files = 1 if restarted() else MOST_FILES

    def __call__(self, batch: pa.Table) -> pa.Table:
        sources = self._read(Job(**row) for row in batch.to_pylist())
        outcomes = [
            known or self._finish(job, data, result)
            for (job, known), data, result in self._transcoder.convert_each(sources, self._most_files)
        ]
        self._most_files = MOST_FILES
        return pa.Table.from_pylist([vars(outcome) for outcome in outcomes], _OUTCOME)

    def _read(self, jobs: Iterable[Job]) -> Iterator[Item[tuple[Job, Outcome | None]]]:
        """Read the files of jobs, shards excepted. What needs no conversion has its outcome."""
        for job in jobs:
            known, data, shard = None, b"", is_shard(job.name)
            try:
                if not self._overwrite and self._is_there(job):
                    # By an earlier attempt at this job, whose actor died, or by someone else.
                    known = Outcome(job.source, 0, 0, [], [[job.source, "was there already, left as it is"]])
                elif not shard:
                    with _open(job) as source:
                        data = source.read()
            except Exception as error:  # noqa: BLE001 - one bad file must not stop the others
                known = _failed(job, error)
            yield (job, known), data, known is None and not shard

    def _finish(self, job: Job, data: bytes, result: Converted | Exception | None) -> Outcome:
        """Write what a file has become; a shard is converted first."""
        if isinstance(result, Exception):
            return _failed(job, result)
        outcome = Outcome(job.source, 0, 0, [], [])
        try:
            with tempfile.TemporaryFile() as made:
                if result is None:
                    with _open(job) as source:
                        shards.convert(source, made, self._transcoder, outcome, self._most_files)
                        read = source.size()
                else:
                    made.write(result[0])
                    outcome.notes.extend([job.source, note] for note in result[1])
                    read = len(data)
                written = made.tell()
                made.seek(0)
                places.write(self._filesystem, self._target(job), made)
            return replace(outcome, read=read, written=written)
        except Exception as error:  # noqa: BLE001 - as above
            return replace(_failed(job, error), notes=outcome.notes)

    def _is_there(self, job: Job) -> bool:
        return self._filesystem.get_file_info(self._target(job)).type != fs.FileType.NotFound

    def _target(self, job: Job) -> str:
        return f"{self._base.rstrip('/')}/{job.target}"


def _open(job: Job) -> pa.NativeFile:
    filesystem, base = places.open_filesystem(job.root)
    return filesystem.open_input_file(f"{base.rstrip('/')}/{job.name}")


def _failed(job: Job, error: Exception) -> Outcome:
    return Outcome(job.source, 0, 0, [[job.source, one_line(error)]], [])
