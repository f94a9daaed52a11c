"""Pictures a second of `vqcodec compress --ray` for some numbers of actors, beside one process without Ray.

That does pictures one by one, as `--jobs 1` does, and then in groups, as actors do.

    python -m bench.scale [--actors 1,2] [--pictures 48] [--size 768x512] [--weights WEIGHTS] [-o out/scale.json]

Everything works from files to files, on the CPU, with one thread of torch a process. Speeds are measured from the first
results to the last. "start" is what comes before: interpreters and models, but not the cluster, which is there before
the clock starts. The last column is what a picture takes longer than in groups without Ray: with one actor, the
overhead of Ray.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

from bench.speed import sample, sizes
from vqcodec import distributed, files
from vqcodec.distributed import Compress, Job
from vqcodec.distributed.groups import MOST_FILES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=_numbers, default="1,2", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=48, help="default: %(default)s")
    parser.add_argument("--size", type=sizes, default="768x512", help="WIDTHxHEIGHT; default: %(default)s")
    parser.add_argument("--weights", help="a file or a packaged name (default: photo)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/scale.json"), help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.pictures < max(2 * MOST_FILES, 8 * max(given.actors)):
        parser.error(f"--pictures must be at least {2 * MOST_FILES} and eight times the number of actors")
    ((width, height),) = given.size
    measured: list[tuple[str, float, float]] = []  # runs, their starts in seconds, and their seconds a picture
    with tempfile.TemporaryDirectory() as folder:
        jobs = _pictures(Path(folder), given.pictures, width, height)
        runs: dict[str, tuple[list[float], int]] = {}  # when pictures were done, and how many of the first do not count
        for name, most in (("one by one", 1), ("in groups", MOST_FILES)):
            runs[name] = _plain(jobs, given.weights, most), most
        for actors in given.actors:
            # Until each actor has finished a task.
            first = actors * distributed.files_of_task(len(jobs), actors)
            runs[f"{actors} actor{'s' * (actors > 1)}"] = _on_ray(jobs, given.weights, actors), first
        for name, (times, first) in runs.items():
            seconds = (times[-1] - times[first - 1]) / (len(jobs) - first)  # of a picture
            measured.append((name, times[first - 1] - first * seconds, seconds))
    single, grouped = measured[0][2], measured[1][2]
    for name, start, seconds in measured:
        print(
            f"{name:10} start {start:6.2f} s, then {1 / seconds:7.2f} pictures/s,"
            f" {width * height / 1e6 / seconds:7.2f} megapixels/s, {single / seconds:5.2f} x,"
            f" {1000 * (seconds - grouped):+8.1f} ms a picture"
        )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"run": name, "start": start, "seconds": seconds} for name, start, seconds in measured]
    content = {"width": width, "height": height, "pictures": given.pictures, "measurements": rows}
    given.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _pictures(folder: Path, count: int, width: int, height: int) -> list[Job]:
    """Different parts of a photograph, as JPEG files."""
    photo = sample(width + count, height)
    (folder / "in").mkdir()
    for number in range(count):
        pixels = photo[:, number : number + width]
        Image.fromarray(pixels).save(folder / "in" / f"{number:05}.jpg", quality=90)
    return distributed.plan([str(folder / "in")], str(folder / "out"), Compress, overwrite=True)[0]


def _output(job: Job) -> Path:
    return Path(job.root).parent / "out"


def _plain(jobs: Sequence[Job], weights: str | None, most: int) -> list[float]:
    """When each picture was done in a new process, in seconds, in groups of so many."""
    start = time.time()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(_make, jobs, weights, most).result()
    return _written(jobs, start)


def _make(jobs: Sequence[Job], weights: str | None, most: int) -> None:
    torch.set_num_threads(1)
    items = ((job, files.read(job.source), True) for job in jobs)
    for job, _, result in Compress(weights=weights, device="cpu").convert_each(items, most):
        if not isinstance(result, tuple):
            raise SystemExit(f"scale: {result}")
        files.write(str(_output(job) / job.target), result[0], overwrite=True)


def _on_ray(jobs: Sequence[Job], weights: str | None, actors: int) -> list[float]:
    """When each picture was done on a cluster of so many processors, in seconds."""
    transcoder = functools.partial(Compress, weights=weights)
    with distributed.cluster("local", num_cpus=actors):
        start = time.time()
        for outcome in distributed.make(jobs, transcoder, output=str(_output(jobs[0])), overwrite=True, device="cpu"):
            if outcome.errors:
                sys.exit(f"scale: {', '.join(outcome.errors[0])}")
    return _written(jobs, start)


def _written(jobs: Sequence[Job], start: float) -> list[float]:
    """When the files of jobs were written, in seconds after a time; Ray tells of them later, several at a time."""
    return sorted((_output(job) / job.target).stat().st_mtime - start for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
