"""Pictures a second of `vqcodec compress --ray` for some numbers of actors, beside one process without Ray.

    python -m bench.scale [--actors 1,2] [--pictures 48] [--size 768x512] [--weights WEIGHTS] [-o out/scale.json]

Everything works from files to files, on the CPU, with one thread of torch a process. Speeds are measured from the first
results to the last. "start" is what comes before: interpreters and models, but not the cluster, which is there before
the clock starts. The last column is what a picture takes longer than without Ray: with one actor, the overhead of Ray.
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
from vqcodec import bitstream, codec, distributed, files, image
from vqcodec.distributed import Compress, Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=_numbers, default="1,2", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=48, help="default: %(default)s")
    parser.add_argument("--size", type=sizes, default="768x512", help="WIDTHxHEIGHT; default: %(default)s")
    parser.add_argument("--weights", help="a file or a packaged name (default: photo)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/scale.json"), help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.pictures < 8 * max(given.actors):
        parser.error("--pictures must be at least eight times the number of actors")
    ((width, height),) = given.size
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = _pictures(Path(folder), given.pictures, width, height)
        for actors in (0, *given.actors):
            if actors:
                times = _on_ray(jobs, given.weights, actors)
                first = actors * distributed.files_of_task(len(jobs), actors)  # when each actor has finished a task
            else:
                times, first = _plain(jobs, given.weights), 1
            seconds = (times[-1] - times[first - 1]) / (len(jobs) - first)  # of a picture
            start = times[first - 1] - first * seconds
            measured.append({"actors": actors, "start": start, "seconds": seconds})
            plain = measured[0]["seconds"]
            name = f"{actors} actors" if actors else "no Ray"
            print(
                f"{name:10} start {start:6.2f} s, then {1 / seconds:7.2f} pictures/s,"
                f" {width * height / 1e6 / seconds:7.2f} megapixels/s, {plain / seconds:5.2f} x,"
                f" {1000 * (seconds - plain):+8.1f} ms a picture",
                flush=True,
            )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"width": width, "height": height, "pictures": given.pictures, "measurements": measured}
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


def _output(job: Job) -> str:
    return str(Path(job.root).parent / "out")


def _plain(jobs: Sequence[Job], weights: str | None) -> list[float]:
    """When each picture was done in a new process, in seconds."""
    start = time.time()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return [done - start for done in pool.submit(_make, jobs, weights).result()]


def _make(jobs: Sequence[Job], weights: str | None) -> list[float]:
    torch.set_num_threads(1)
    done = []
    for job in jobs:
        picture = image.load(files.read(job.source), max_pixels=bitstream.DEFAULT_MAX_PIXELS)
        encoded = codec.compress(picture, weights=weights, device="cpu")
        files.write(str(Path(_output(job)) / job.target), encoded, overwrite=True)
        done.append(time.time())
    return done


def _on_ray(jobs: Sequence[Job], weights: str | None, actors: int) -> list[float]:
    """When each picture was done on a cluster of so many processors, in seconds."""
    transcoder = functools.partial(Compress, weights=weights)
    times = []
    with distributed.cluster("local", num_cpus=actors):
        start = time.time()
        for outcome in distributed.make(jobs, transcoder, output=_output(jobs[0]), overwrite=True, device="cpu"):
            if outcome.errors:
                sys.exit(f"scale: {': '.join(outcome.errors[0])}")
            times.append(time.time() - start)
    return times


if __name__ == "__main__":
    sys.exit(main())
