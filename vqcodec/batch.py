"""Many files: what is made of each is told and counted here, and made here, by several processes, or on a cluster."""

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vqcodec import files, pool, terminal
from vqcodec.files import Job
from vqcodec.terminal import ErrorReport, Failure

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """What was made of a source, before it is written.

    Attributes:
        data: the target; None if the source was only tested.
        read: bytes of the source.
        bpp: bits of the .vqz file per pixel of the picture in it.
        width, height: of the picture, in pixels.
        quality: of the .vqz file.
        seconds: how long it took.
        before: the `files.status` of the source before it was read.
        found: whether the quality was looked for.
        warnings, notes: lines to tell.
    """

    data: bytes | None
    read: int
    bpp: float
    width: int
    height: int
    quality: int
    seconds: float
    before: os.stat_result | None
    found: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What to do with files beside the work on them.

    Attributes:
        overwrite: whether existing files may be replaced.
        quiet: whether to print errors and warnings only.
        skip_existing: leave out what is there and up to date; replace what is older, unless sources are removed.
        if_smaller: leave out what is not smaller than its source.
        preserve: give targets the times of their sources.
        remove: remove sources.
        as_json: print a line of JSON for each file.
    """

    overwrite: bool = False
    quiet: bool = False
    skip_existing: bool = False
    if_smaller: bool = False
    preserve: bool = True
    remove: bool = False
    as_json: bool = False


def run(jobs: Sequence[Job], work: Callable[[Job], Made], policy: Policy, *, count: int | None, device: str) -> int:
    """Do jobs. An error in one of them does not stop the others.

    Args:
        jobs: the files to make.
        work: does one job. It is pickled if several processes share the jobs.
        policy: what else to do with the files.
        count: how many files to work on at a time; None for as many as there are cores, or one where `device`, "auto",
            "cpu" or "cuda", is a GPU. One at a time is worked on in this process.

    Returns:
        The exit code.
    """
    batch = _Batch(policy)
    ready = [job for job in jobs if batch.admits(job)]
    if count is None:
        count = 1 if len(ready) < 2 else _usual_count(device)
    outcomes = _outcomes(ready, work, min(count, len(ready)))
    with terminal.file_bar(len(ready), wanted=not policy.quiet) as show, contextlib.closing(outcomes):
        for job, outcome in outcomes:
            batch.take(job, outcome)
            show(outcome.width * outcome.height if isinstance(outcome, Made) else 0)
    if len(jobs) > 1 and (batch.report.failed or not policy.quiet):
        counts = batch.counts
        terminal.say_total(
            len(jobs),
            counts["failed"],
            read=batch.read,
            written=batch.written,
            skipped=counts["skipped"],
            left_out=counts["left out"],
        )
    return batch.report.status


def run_on_ray(
    name: str,
    settings: dict[str, Any],
    inputs: Sequence[str],
    output: str | None,
    address: str,
    *,
    weights: str | None,
    device: str,
    overwrite: bool,
    quiet: bool,
) -> int:
    """Make files on a Ray cluster. What is there already is left alone, and one bad file does not stop the others.

    Args:
        name: "Compress" or "Decompress", the transcoder.
        settings: its arguments beside weights and device.
        inputs, output, weights, device: of the command line.
        address: of the cluster; "" for any, see `distributed.cluster`.
        overwrite: whether existing files may be replaced.
        quiet: whether to print errors and warnings only.

    Returns:
        The exit code.

    Raises:
        ValueError: the inputs and the output do not go together, or a package is missing.
    """
    if output is None or files.STREAM in (output, *inputs):
        raise ValueError("--ray works on files and folders, and needs a folder for -o.")
    try:
        from vqcodec import distributed
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray needs the package {error.name}: pip install 'vqcodec[ray]'.") from None

    kind = getattr(distributed, name)
    transcoder = functools.partial(kind, weights=weights and os.path.abspath(weights), **settings)
    report = ErrorReport()
    try:
        jobs, there = distributed.plan(inputs, output, kind, overwrite=overwrite)
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - libraries of filesystems raise what they like
        report.add(Failure.of("--ray", error))
        return report.status
    if there and not quiet:
        total = there + len(jobs)
        terminal.say(f"vqcodec: {there:,} of {total:,} files are there already and stay (-f makes them again)")
    if not jobs:
        return 0
    read = written = failed = 0
    with report.errors_of("--ray"):
        with distributed.cluster(address or None):
            made = distributed.make(jobs, transcoder, output=output, overwrite=overwrite, device=device)
            with terminal.counted_bar(made, len(jobs)) as outcomes:
                for outcome in outcomes:
                    read, written = read + outcome.read, written + outcome.written
                    failed += bool(outcome.errors)
                    for path, message in outcome.errors:
                        report.add(Failure(path, message))
                    for path, note in outcome.notes:
                        if name == "Decompress":
                            terminal.say(f"vqcodec: {path}: warning: {note}")
                        elif not quiet:
                            terminal.say(f"vqcodec: {path}: note: {note}")
        if failed or not quiet:
            terminal.say_total(len(jobs), failed, read=read, written=written)
    return report.status


class _Batch:
    """What has become of the files so far."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.report = policy, ErrorReport()
        self.counts: Counter[str] = Counter()
        self.outdated: set[Job] = set()
        self.read = self.written = 0

    def admits(self, job: Job) -> bool:
        """Whether there is work to do for a job that can be done. If not, it is told."""
        if self.policy.skip_existing and files.is_current(job):
            self._count(job, "skipped")
            return False
        if self.policy.skip_existing and os.path.exists(job.target):
            if self.policy.remove and not self.policy.overwrite and os.path.isfile(job.target):
                # The target may have been made of a source that is gone: then it is the only copy.
                self._fail(job, Failure(job.target, "File is older, and --rm does not make it again"))
                return False
            self.outdated.add(job)
        failure = _attempt(functools.partial(files.check, overwrite=self._may_replace(job)), job)
        if failure is not None:
            self._fail(job, failure)
        return failure is None

    def take(self, job: Job, outcome: Made | Failure) -> None:
        """Write and tell what was made."""
        if job.note and not self.policy.quiet:
            terminal.say(f"vqcodec: {job.source}: note: {job.note}")
        if isinstance(outcome, Failure):
            self._fail(job, outcome)
            return
        begun = time.perf_counter()
        written = _attempt(functools.partial(self._write, made=outcome), job)
        if isinstance(written, Failure):
            self._fail(job, written, outcome)
            return
        seconds = outcome.seconds + time.perf_counter() - begun
        for problem in outcome.warnings:
            terminal.say(f"vqcodec: {job.source}: warning: {problem}")
        if not self.policy.quiet:
            self._tell(job, outcome, written, seconds)
        if written:
            self.read += outcome.read
            self.written += len(outcome.data or b"")
        self._count(job, "done" if written else "left out", outcome, seconds)

    def _write(self, job: Job, *, made: Made) -> bool:
        """Write what was made, and remove its source, as the policy says. Returns whether it was to be written."""
        if made.data is None:
            return True
        if self.policy.if_smaller and len(made.data) >= made.read:
            return False
        like = made.before if self.policy.preserve else None
        files.write(job.target, made.data, overwrite=self._may_replace(job), like=like)
        if self.policy.remove:
            files.remove_source(job, made.data, made.before)
        return True

    def _may_replace(self, job: Job) -> bool:
        return self.policy.overwrite or job in self.outdated

    def _tell(self, job: Job, made: Made, written: bool, seconds: float) -> None:
        size = len(made.data or b"")
        if not written:
            terminal.say(f"vqcodec: {job.source}: left out: {made.read:,} bytes would become {size:,}")
            return
        for note in made.notes:
            terminal.say(f"vqcodec: {job.source}: note: {note}")
        terminal.say_result(
            job,
            width=made.width,
            height=made.height,
            read=made.read,
            written=size,
            bpp=made.bpp,
            seconds=seconds,
            quality=made.quality if made.found else None,
            tested=made.data is None,
        )

    def _fail(self, job: Job, failure: Failure, made: Made | None = None) -> None:
        self.report.add(failure)
        self._count(job, "failed", made, error=f"{failure.name}: {failure.message}")

    def _count(
        self, job: Job, status: str, made: Made | None = None, seconds: float | None = None, error: str | None = None
    ) -> None:
        self.counts[status] += 1
        if self.policy.as_json:
            terminal.print_line(
                {
                    "source": job.source,
                    "target": None if job.target == files.STREAM else job.target,
                    "status": status,
                    "bytes_in": made and made.read,
                    "bytes_out": None if made is None or made.data is None else len(made.data),
                    "width": made and made.width,
                    "height": made and made.height,
                    "quality": made and made.quality,
                    "seconds": seconds and round(seconds, 3),
                    "error": error,
                    "notes": [*filter(None, [job.note]), *((*made.warnings, *made.notes) if made else ())],
                }
            )


def _attempt(function: Callable[[Job], T], job: Job) -> T | Failure:
    """What a function makes of a job, or why it fails."""
    try:
        return function(job)
    except Exception as error:  # noqa: BLE001 - an error in one file must not stop the others
        return Failure.of(job.source, error)


def _outcomes(jobs: Sequence[Job], work: Callable[[Job], Made], count: int) -> Generator[tuple[Job, Made | Failure]]:
    attempt = functools.partial(_attempt, work)
    if count < 2:
        yield from ((job, attempt(job)) for job in jobs)
        return
    answers = pool.each(attempt, jobs, count, begin=_begin)
    with contextlib.closing(answers):
        for job, answer in answers:
            yield job, Failure(job.source, answer.reason) if isinstance(answer, pool.Lost) else answer


def _begin() -> None:
    """Prepare a process of the pool: the others have the other cores."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for numpy
    import torch

    torch.set_num_threads(1)
    terminal.silence_libraries()


def _usual_count(device: str) -> int:
    cores = pool.cores()
    if cores == 1 or device == "cpu":
        return cores
    import torch

    return 1 if torch.cuda.is_available() else cores
