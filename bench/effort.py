"""What searching for better codes brings, and how long it takes.

    python -m bench.effort PICTURES... [--efforts 1,3,9] [--qualities 20,50,80] [--jobs 1] [-o out/effort.json]

For each effort: BD-rate against effort 1 (PSNR, means over the pictures), seconds a picture, and bits per pixel and
PSNR at each quality. What is in the output file already is not measured again. It tells weights by their id and
pictures by their bytes, but does not notice new code: remove it after a change of vqcodec/search.py.
"""

import argparse
import hashlib
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.bd_rate import Curve, bd_rate
from vqcodec import codec, packaged, weights_file
from vqcodec.metrics import psnr
from vqcodec.train import data


def measure(path: Path, effort: int, quality: int) -> dict[str, float]:
    """One file: bits per pixel, PSNR in dB, and seconds of compression."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    start = time.perf_counter()
    written = codec.compress(pixels, quality=quality, effort=effort)
    seconds = time.perf_counter() - start
    restored = np.asarray(codec.decompress(written))
    return {"bpp": 8 * len(written) / pixels[:, :, 0].size, "psnr": psnr(pixels, restored), "seconds": seconds}


def _measure(arguments: tuple[Path, int, int]) -> dict[str, float]:
    return measure(*arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--efforts", default="1,3,9")
    parser.add_argument("--qualities", default="20,50,80")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/effort.json"))
    given = parser.parse_args(arguments)
    efforts, qualities = ([int(x) for x in text.split(",")] for text in (given.efforts, given.qualities))
    paths = data.find_pictures(given.pictures)
    known: dict[str, dict[str, float]] = json.loads(given.output.read_text("utf-8")) if given.output.exists() else {}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    weights_id = weights_file.describe(packaged.find())["id"]
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}

    def name(path: Path, effort: int, quality: int) -> str:
        return f"{weights_id} {digests[path]} {effort} {quality}"

    wanted = {name(p, e, q): (p, e, q) for e in efforts for q in qualities for p in paths}
    missing = {key: args for key, args in wanted.items() if key not in known}
    # Not forked: a copy of a process whose torch has threads may wait for them for ever. More threads than cores are
    # far slower.
    threads = max(1, torch.get_num_threads() // given.jobs)
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for key, found in zip(missing, pool.map(_measure, missing.values()), strict=True):
            known[key] = found
            given.output.write_text(json.dumps(known), "utf-8")
    curves = {}
    for effort in efforts:
        rows = [[known[name(p, effort, q)] for p in paths] for q in qualities]
        rates, values = ([float(np.mean([r[column] for r in row])) for row in rows] for column in ("bpp", "psnr"))
        curves[effort] = Curve.of(rates, values)
        anchor, curve = curves[efforts[0]], curves[effort]
        gain = bd_rate(anchor, curve) if anchor and curve else None
        seconds = np.mean([r["seconds"] for row in rows for r in row])
        points = ", ".join(f"{rate:.4f}/{value:.3f}" for rate, value in zip(rates, values, strict=True))
        print(f"effort {effort}: {f'{gain.percent:+.2f} %' if gain else '?'}, {seconds:.2f} s, {points}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
