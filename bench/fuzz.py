"""Feeds damaged files, weights and pictures to the package: anything but its own errors is a finding.

    python -m bench.fuzz --minutes 10 [--seed 1] [--kinds container,picture] [-o FOLDER]

Containers get their checksums mended, so that damage reaches the range coder. The kind "container" is only read, not
decoded, which is thousands of times faster. An input that raises another exception,
or takes more than `--seconds` or `--megabytes`, is saved to the folder. The exit code is 1 if there is any.
"""

import argparse
import io
import itertools
import json
import random
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from bench.speed import sample
from vqcodec import bitstream, codec, image, packaged, weights, weights_file
from vqcodec.errors import VqcodecError
from vqcodec.models.config import Config

MAX_PIXELS = 1 << 16
STRANGE: tuple[object, ...] = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    1 << 15,
    1 << 31,
    10**30,
    0.5,
    float("nan"),
    True,
    None,
    "x",
    [],
    {},
    [[[]]],
)

Mutant = Callable[[random.Random], bytes]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or insert bytes, a few times."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(result) + 1)
        some = rng.randrange(1, 9)
        kind = rng.randrange(5)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[place : place + some] = rng.randbytes(some)
        elif kind == 2:
            del result[place : place + some ** rng.randrange(1, 4)]
        elif kind == 3:
            result[place:place] = result[place : place + 8 * some]
        else:
            result[place:place] = rng.choice((b"\0", b"\xff")) * some
    return bytes(result)


def container(data: bytes, rng: random.Random) -> bytes:
    """A .vqz file with other segments, sizes or chunks behind checksums that are right."""
    old = bitstream.read(data)
    header = old.header
    if rng.random() < 0.5:
        name, high = rng.choice((("width", 400), ("height", 400), ("quality", 101), ("tile", 6), ("layers", 5)))
        fields: dict[str, Any] = {name: rng.randrange(high) * (bitstream.TILE_UNIT if name == "tile" else 1)}
        try:
            header = replace(header, **fields)
        except VqcodecError:
            return damage(data, rng)
    segments = [rng.choice(old.segments) or b"" for _ in range(header.segments)]
    segments = [damage(part, rng) if rng.random() < 0.5 else part for part in segments]
    chunks = [replace(c, data=damage(c.data, rng)) if rng.random() < 0.3 else c for c in old.chunks]
    written = bitstream.write(header, chunks, segments)
    if rng.random() < 0.2:  # any bytes behind a header that is right
        body = damage(written, rng)[: bitstream.HEADER_BYTES - 2]
        return body + zlib.crc32(body).to_bytes(4, "little")[:2] + written[bitstream.HEADER_BYTES :]
    return written


def mutated_configuration(text: str, rng: random.Random) -> str:
    """A configuration as JSON, with another value somewhere."""
    tree = node = json.loads(text)
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not (isinstance(node[key], dict | list) and node[key]) or rng.random() < 0.1:
            break
        node = node[key]
    node[key] = rng.choice(STRANGE)
    return json.dumps(tree)


def mutated_weights(data: bytes, rng: random.Random) -> bytes:
    """Weights with another field in the configuration, another tensor, or other bytes."""
    if rng.random() < 0.3:
        return damage(data, rng)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    tensors = load_tensors(data)
    if rng.random() < 0.5:
        metadata["config"] = mutated_configuration(metadata["config"], rng)
    else:
        name = rng.choice(sorted(tensors))
        flat = np.frombuffer(damage(tensors[name].numpy().tobytes(), rng), np.uint8)
        kept = tensors[name].numpy().nbytes
        flat = np.resize(flat, kept) if len(flat) else np.zeros(kept, np.uint8)
        tensors[name] = tensors[name].new_tensor(flat.view(tensors[name].numpy().dtype).reshape(tensors[name].shape))
    try:
        return save(tensors, metadata)
    except SafetensorError:
        return damage(data, rng)


def pictures() -> list[bytes]:
    """Small pictures of several formats and modes."""
    found = []
    source = Image.fromarray(sample(24, 18))
    for kind, mode in itertools.product(("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"), ("RGB", "L", "RGBA", "P", "1")):
        buffer = io.BytesIO()
        try:
            source.convert(mode).save(buffer, kind)
        except OSError:
            continue  # the format has no such mode
        found.append(buffer.getvalue())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--count", type=int, help="so many inputs instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", help="of inputs: some of those that are counted  (default: all)")
    parser.add_argument("--weights", type=Path, help="default: the packaged photo model")
    parser.add_argument("--seconds", type=float, default=20, help="of the processor, most for one input")
    parser.add_argument("--megabytes", type=float, default=500, help="most by which one input may raise the peak")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/fuzz"), help="where findings are saved")
    options = parser.parse_args(arguments)
    own = packaged.find(options.weights)
    seeds = [codec.compress(sample(w, h), weights=own, tile=64, quality=q) for w, h, q in ((70, 40, 60), (33, 65, 20))]
    alpha = np.dstack([sample(20, 30), sample(20, 30)[..., 0]])
    seeds.append(codec.compress(alpha, weights=own))
    known, originals, config = own.read_bytes(), pictures(), weights_file.read(own).config.to_json()
    counts: Counter[str] = Counter()
    findings = 0
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="vqcodec-fuzz-") as folder:
        mutated = Path(folder) / "mutated.safetensors"

        def load(data: bytes) -> None:
            mutated.write_bytes(data)
            weights.load(mutated)
            weights_file.describe(mutated)

        def decode(data: bytes, partial: bool) -> None:
            codec.decode_picture(data, weights=own, partial=partial, max_pixels=MAX_PIXELS)

        kinds: dict[str, tuple[Mutant, Callable[[bytes], object]]] = {
            "vqz": (lambda r: container(r.choice(seeds), r), lambda data: decode(data, False)),
            "partial": (lambda r: damage(r.choice(seeds), r), lambda data: decode(data, True)),
            "weights": (lambda r: mutated_weights(known, r), load),
            "configuration": (lambda r: mutated_configuration(config, r).encode(), _configuration),
            "container": (lambda r: container(r.choice(seeds), r), lambda data: bitstream.read(data, max_pixels=None)),
            "picture": (lambda r: damage(r.choice(originals), r), lambda d: image.load(d, max_pixels=MAX_PIXELS)),
        }
        chosen = options.kinds.split(",") if options.kinds else sorted(kinds)
        if unknown := sorted(set(chosen) - set(kinds)):
            parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(kinds)}")
        for number in itertools.count():
            if number == options.count or (options.count is None and time.monotonic() > end):
                break
            rng = random.Random(f"{options.seed} {number}")
            kind = rng.choice(chosen)
            data = kinds[kind][0](rng)
            outcome, problem = _try(kinds[kind][1], data, options.seconds, options.megabytes)
            counts[f"{kind}: {outcome}"] += 1
            if problem:
                findings += 1
                options.output.mkdir(parents=True, exist_ok=True)
                path = options.output / f"{options.seed}-{number}-{kind}"
                path.write_bytes(data)
                print(f"{path}: {problem}", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")
    print(f"seed {options.seed}, {counts.total()} inputs, {findings} findings")
    return 1 if findings else 0


def _configuration(data: bytes) -> None:
    Config.from_json(data.decode("latin-1"))


def _try(call: Callable[[bytes], object], data: bytes, seconds: float, megabytes: float) -> tuple[str, str | None]:
    """Call, and return the outcome, and what is wrong with it."""
    start, before = time.process_time(), _peak()
    problem = None
    try:
        call(data)
        outcome = "accepted"
    except VqcodecError as error:
        outcome = type(error).__name__
        problem = "an error of several lines" if "\n" in str(error) else None
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        outcome = type(error).__name__
        problem = f"{outcome}: {error}"
    if (taken := time.process_time() - start) > seconds:
        problem = f"{taken:.1f} s"
    if (grown := _peak() - before) > megabytes:
        problem = f"{grown:.0f} MB"
    return outcome, problem


def _peak() -> float:
    """The process's largest memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    sys.exit(main())
