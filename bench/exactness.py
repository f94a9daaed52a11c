"""Whether .vqz files decode to the same codes whatever computes them: threads, instruction sets, fast maths, CUDA.

Every variant is a process of its own, because libraries choose their kernels once. Besides the files, each variant
convolves integers at their bounds (1035 inputs of 127, as many as float32 sums exactly) and must come to the result of
64-bit integers.

    python -m bench.exactness [--weights FILE] [FILES.vqz ...]

Without files: the golden files of the tests, whose codes are kept beside them, and a made picture coded with the
packaged weights. Prints SHA-256 prefixes of the codes; the exit code is 1 if any differ. The lines of another machine
or another version of torch can be compared by eye or with diff.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vqcodec import bitstream, codec, decoder, packaged, weights, weights_file
from vqcodec.errors import WeightsError
from vqcodec.models.integers import IntegerConv

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
BOUNDS = "integers at their bounds"  # the row that is no file


@dataclass(frozen=True)
class Variant:
    """A way to compute: environment variables, threads and device of a process."""

    name: str
    environment: dict[str, str]
    threads: int = 1
    device: str = "cpu"


PLAIN = Variant("1 thread", {})
TWO_THREADS = Variant("2 threads", {}, threads=2)
AVX2 = Variant("AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, threads=2)
SSE = Variant("SSE4.1", {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"})
FAST_MATHS = Variant("bf16 maths", {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"})
CUDA = Variant("CUDA", {}, device="cuda")


@dataclass(frozen=True)
class Job:
    """A file to decode, and the SHA-256 that its codes must have, if that is known."""

    file: Path
    weights: Path
    expected: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.child:
        print(json.dumps(_child(json.loads(options.child))))
        return 0
    with tempfile.TemporaryDirectory(prefix="vqcodec-exactness-") as folder:
        jobs = _given(options.files, options.weights) if options.files else _default(Path(folder), options.weights)
        return 0 if compare(jobs, available()) else 1


def available() -> list[Variant]:
    """The variants that this machine has."""
    variants = [PLAIN, TWO_THREADS]
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants += [AVX2, SSE, FAST_MATHS]
    if torch.cuda.is_available():
        variants.append(CUDA)
    return variants


def compare(jobs: Sequence[Job], variants: Sequence[Variant]) -> bool:
    """Run every variant, print a table, and say whether all came to the same codes."""
    print(f"torch {torch.__version__}, {platform.machine()}, {platform.system()}")
    found = {}
    for variant in variants:
        capability, found[variant.name] = _run(variant, jobs)
        print(f"    {variant.name:<12}{variant.device}, {capability}")
    known = {str(job.file): job.expected for job in jobs} | {BOUNDS: _bounds_in_integers()}
    equal = True
    for row, expected in known.items():
        hashes = [hashes[row] for hashes in found.values()]
        same = len({*hashes, expected or hashes[0]}) == 1
        equal &= same
        print(f"\n{Path(row).name}: {'equal' if same else 'DIFFERENT'}")
        if expected:
            print(f"    {'expected':<12}{expected[:32]}")
        for variant, value in zip(variants, hashes, strict=True):
            print(f"    {variant.name:<12}{value[:32]}")
    print(f"\n{'all equal' if equal else 'NOT EQUAL'}")
    return equal


def hash_of(arrays: Sequence[NDArray[np.generic]]) -> str:
    """SHA-256 of the shapes and values of integer arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    return digest.hexdigest()


def hash_of_codes(data: bytes, weights_file: Path, device: str) -> str:
    """SHA-256 of the codes of a file."""
    codes = decoder.decode_codes([bitstream.read(data)], weights.load(weights_file, device))
    return hash_of([level.numpy() for (level,) in codes])


def _run(variant: Variant, jobs: Sequence[Job]) -> tuple[str, dict[str, str]]:
    """The instructions that torch says it uses, and the hashes by file name, of a process of this variant."""
    task = {
        "threads": variant.threads,
        "device": variant.device,
        "jobs": [(str(job.file), str(job.weights.resolve())) for job in jobs],
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.exactness", "--child", json.dumps(task)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(variant.threads), **variant.environment},
    )
    capability, hashes = json.loads(done.stdout)
    return capability, hashes


def _child(task: dict[str, object]) -> tuple[str, dict[str, str]]:
    """What a variant's process does: see `_run`."""
    threads, device, jobs = task["threads"], str(task["device"]), task["jobs"]
    assert isinstance(threads, int) and isinstance(jobs, list)
    torch.set_num_threads(threads)
    hashes = {file: hash_of_codes(Path(file).read_bytes(), Path(path), device) for file, path in jobs}
    conv, x = _bounds()
    conv.to(device)
    results = [conv.run(layout.to(device)) for layout in (x, x.contiguous(memory_format=torch.channels_last))]
    assert torch.equal(*results)
    hashes[BOUNDS] = hash_of([results[0].cpu().numpy()])
    return torch.backends.cpu.get_cpu_capability(), hashes


def _bounds() -> tuple[IntegerConv, torch.Tensor]:
    """A frozen convolution of 1035 inputs and what it convolves: integers in -127..127, many of them at the ends."""
    generator = torch.Generator().manual_seed(0)
    conv = IntegerConv(115, 48, 3).requires_grad_(False)
    conv.freeze()
    x = torch.randint(-127, 128, (2, 115, 40, 56), generator=generator).float()
    weight = torch.randint(-127, 128, conv.weight.shape, generator=generator).float()
    weight[:24] = 127  # x at its bound gives the largest sum there is: 1035 * 127 * 127 < 2^24
    x[0] = 127 * x[0].sign()
    x[0, :, :20] = 127
    conv.weight.copy_(weight)
    conv.exponent.zero_()
    return conv, x


def _bounds_in_integers() -> str:
    conv, x = _bounds()
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x.numpy().astype(np.int64), ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
    )
    result = np.zeros((len(x), conv.out_channels, *x.shape[2:]), np.int64)
    weight = conv.weight.numpy().astype(np.int64)
    for row in range(3):
        for column in range(3):
            result += np.einsum("bihw,oi->bohw", windows[..., row, column], weight[:, :, row, column], optimize=True)
    assert result.max() == 1035 * 127 * 127
    return hash_of([result])


def _given(files: Sequence[Path], weights_file: Path | None) -> list[Job]:
    path = packaged.find(weights_file)
    return [Job(file.resolve(), path) for file in files]


def _default(folder: Path, weights_file: Path | None) -> list[Job]:
    jobs = [golden(file) for file in sorted(GOLDEN.glob("*.vqz"))]
    try:
        path = packaged.find(weights_file)
    except WeightsError as error:
        print(f"left out the made picture: {error}")
        return jobs
    file = folder / "made.vqz"
    file.write_bytes(codec.compress(_picture(512, 768), weights=path, device="cpu", tile=256, verify=True))
    return [*jobs, Job(file, path)]


def golden(file: Path) -> Job:
    """A golden file, whose codes and weights are beside it."""
    wanted = bitstream.read_header(file.read_bytes()).weights_id
    (made_with,) = (p for p in file.parent.glob("*.safetensors") if weights_file.id_of(p.read_bytes()) == wanted)
    with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
        codes = [arrays[f"level{number}"] for number in range(len(arrays.files))]
    return Job(file, made_with, hash_of(codes))


def _picture(height: int, width: int) -> NDArray[np.uint8]:
    """Waves, edges and noise: everything that makes codes vary."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(y / a) + np.cos(x / b) + np.sin(x * y / 9000) for a, b in rng.uniform(3, 60, (3, 2))], -1)
    picture = 128 + 35 * waves + rng.normal(0, 8, waves.shape) + 50 * ((x // 37 + y // 51) % 2)[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.vqz", help="files to decode; default: see above")
    parser.add_argument(
        "--weights", type=Path, help="weights file of FILES or of the made picture; default: the packaged"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
