"""Time and peak memory of compress and decompress over picture sizes, beside JPEG XL.

Every measurement has a process of its own, so that its peak memory is its own: it makes the picture (or reads the
file), calls the codec once to warm up, then several times.

    python -m bench.speed [-o out/speed.json] [--sizes 256x256,768x512]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench import codecs
from vqcodec import spans
from vqcodec.errors import VqcodecError

ROOT = Path(__file__).resolve().parents[1]
SIZES = "256x256,768x512,1536x1024,3000x2000,6000x4000"
QUALITIES = {"vqcodec": 50.0, "jxl": 2.0}  # jxl: Butteraugli distance
DIRECTIONS = ("encode", "decode")


@dataclass(frozen=True)
class Measurement:
    """One codec, direction and size.

    Attributes:
        codec: key of the codec.
        direction: "encode" or "decode".
        width: pixels.
        height: pixels.
        bytes: size of the file.
        first: seconds of the first call, with loading of weights.
        seconds: median of the calls after it.
        peak_mib: largest resident memory of the process.
        start_mib: the same before the first call, with the picture or file in memory.
        stages: of these, vqcodec's seconds by the names of its spans, medians; empty for other codecs.
    """

    codec: str
    direction: str
    width: int
    height: int
    bytes: int
    first: float
    seconds: float
    peak_mib: float
    start_mib: float
    stages: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that measure
    if options.measure:
        try:
            print(json.dumps(asdict(_measure(options))))
        except VqcodecError as error:
            print(f"speed: {error}", file=sys.stderr)
            return 1
        return 0

    measured: list[Measurement] = []
    keys = []
    for key in QUALITIES:
        try:
            codecs.get(key, weights=options.weights)
            keys.append(key)
        except codecs.CodecUnavailableError as error:
            print(f"{key}: left out: {error}", file=sys.stderr)
    print(_line("", "", "first s", "seconds", "x JPEG XL", "MB/s", "peak MiB", "start MiB"))
    for size in options.sizes:
        here: dict[tuple[str, str], Measurement] = {}
        with tempfile.TemporaryDirectory() as folder:
            for direction in DIRECTIONS:
                for key in keys:
                    here[key, direction] = _in_own_process(options, size, key, direction, Path(folder) / key)
        for (key, direction), m in here.items():
            reference = here.get(("jxl", direction))
            ratio = f"{m.seconds / reference.seconds:.1f}" if reference else ""
            speed = f"{m.width * m.height * 3 / 1e6 / m.seconds:.1f}"
            times = (f"{m.first:.3f}", f"{m.seconds:.3f}", ratio, speed)
            print(
                _line(f"{size[0]}x{size[1]}", f"{key} {direction}", *times, f"{m.peak_mib:.0f}", f"{m.start_mib:.0f}"),
                flush=True,
            )
            for name, seconds in m.stages.items():
                print(_line("", f"  of it {name}", "", f"{seconds:.3f}"))
        measured += here.values()

    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"threads": options.threads, "repeats": options.repeats, "measurements": [asdict(m) for m in measured]}
    options.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and peak memory over picture sizes, beside JPEG XL.")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/speed.json"), help="default: %(default)s")
    parser.add_argument("--sizes", type=sizes, default=SIZES, help="WIDTHxHEIGHT,...; default: %(default)s")
    parser.add_argument("--weights", type=Path, help="weights of vqcodec: a file or a packaged name (default: photo)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of vqcodec (default: auto)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of every codec (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="calls after the warm-up (default: %(default)s)")
    parser.add_argument("--measure", nargs=3, metavar=("CODEC", "DIRECTION", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    return options


def sizes(text: str) -> list[tuple[int, int]]:
    """Pairs of width and height out of "768x512,..."."""
    sizes = []
    for part in text.split(","):
        width, _, height = part.partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT,..., found '{text}'")
        sizes.append((int(width), int(height)))
    return sizes


def _in_own_process(
    options: argparse.Namespace, size: tuple[int, int], key: str, direction: str, file: Path
) -> Measurement:
    command = [sys.executable, "-m", "bench.speed", "--sizes", f"{size[0]}x{size[1]}"]
    command += ["--measure", key, direction, str(file), "--device", options.device]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    command += ["--weights", _absolute(options.weights)] if options.weights else []
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return Measurement(**json.loads(done.stdout))


def _absolute(weights: Path) -> str:
    """An absolute path, or the name of packaged weights as it is."""
    return str(weights.resolve() if weights.exists() else weights)


def _measure(options: argparse.Namespace) -> Measurement:
    """Runs inside the measuring process; encoding leaves its file for decoding."""
    key, direction, name = options.measure
    width, height = options.sizes[0]
    file = Path(name)
    codec = codecs.get(key, weights=options.weights, device=options.device, threads=options.threads)
    pixels = sample(width, height) if direction == "encode" else None
    data = b"" if direction == "encode" else file.read_bytes()
    start_mib = _peak_mib()
    times: list[float] = []
    spent: list[dict[str, float]] = []
    for _ in range(1 + options.repeats):
        start = time.perf_counter()
        with spans.collect() as seconds:
            if pixels is not None:
                data = codec.encode(pixels, QUALITIES[key])
            else:
                codec.decode(data)
        times.append(time.perf_counter() - start)
        spent.append(seconds)
    if pixels is not None:
        file.write_bytes(data)
    first, *others = times
    stages = {name: statistics.median(seconds[name] for seconds in spent[1:]) for name in spent[0]}
    return Measurement(
        key, direction, width, height, len(data), first, statistics.median(others), _peak_mib(), start_mib, stages
    )


def sample(width: int, height: int) -> NDArray[np.uint8]:
    """A photograph of the given size: matplotlib's sample photo, mirrored and repeated."""
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as image:
        photo = np.asarray(image.convert("RGB"))
    rows = np.pad(np.arange(photo.shape[0]), (0, max(height - photo.shape[0], 0)), mode="symmetric")[:height]
    columns = np.pad(np.arange(photo.shape[1]), (0, max(width - photo.shape[1], 0)), mode="symmetric")[:width]
    return photo[rows[:, None], columns[None, :]]


def _peak_mib() -> float:
    """Largest resident memory of this process so far.

    Linux counts the memory of the parent at the start of a process into getrusage's figure, so its own is preferred.
    """
    status = Path("/proc/self/status")
    if status.is_file() and "VmHWM:" in (text := status.read_text("utf-8")):
        return float(text.partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def _line(*cells: str) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (10, 22), strict=False)) + "".join(
        cell.rjust(11) for cell in cells[2:]
    )


if __name__ == "__main__":
    sys.exit(main())
