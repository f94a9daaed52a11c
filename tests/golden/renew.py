"""Make the golden files anew, and the hex dump in FORMAT.md: `python tests/golden/renew.py`.

Only for a format that has not been released: files of a released version must be readable for ever, and the tests that
read the golden ones are what shows it. After a change of the format they get company instead, of the new version.

`python tests/golden/renew.py --photo` makes those of the packaged photo weights instead, in the folder photo/. They are
for one weights file: whoever replaces weights/photo.safetensors renews them. With the same weights, on the same
machine, it changes no byte, so `git status` shows whether a change of the program changed what the encoder chooses.
"""

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import format_dump
import models
from models import TINY
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import bitstream, codec, decoder, image, packaged, weights
from vqcodec.bitstream import Chunk
from vqcodec.image import Picture
from vqcodec.models.config import Config, PriorConfig, SliceConfig, StageConfig

# Small enough to be kept in the repository: two levels, slices of two kinds, three layers.
GOLDEN: Config = dataclasses.replace(
    TINY,
    name="golden",
    stages=(
        StageConfig(
            8,
            48,
            8,
            1,
            1,
            (SliceConfig(16, 1, 32, layer=1, rows=100), SliceConfig(16, 2, 48, layer=2, rows=7)),
            lapped=True,
            renderer=8,
            groups=2,
        ),
        StageConfig(32, 8, 8, 1, 1, (SliceConfig(8, 1, 64, layer=0, rows=40),)),
    ),
    prior=PriorConfig(channels=12, embedding=8, blocks=1),
)

# A prior in raster order, on two levels and more than one plane, without lap and renderer.
GOLDEN_RASTER = Config(
    name="golden-raster",
    stages=(
        StageConfig(4, 16, 8, 1, 1, (SliceConfig(planes=2, dim=8, codes=24, layer=1),)),
        StageConfig(8, 16, 8, 1, 1, (SliceConfig(planes=1, dim=16, codes=32, layer=0),)),
    ),
    prior=PriorConfig(channels=12, blocks=1, layers=2),
)
CONFIGS = {"tiny": GOLDEN, "raster": GOLDEN_RASTER}

# Pictures, the weights for each, and options.
PICTURES = {
    "tiny": (Picture(models.picture(40, 72, seed=1), xmp=b"<x:xmpmeta/>"), "tiny", {"quality": 30, "tile": 64}),
    "raster": (Picture(models.picture(43, 70, seed=3)), "raster", {"quality": 60, "tile": 64}),
    "grey": (
        Picture(
            np.repeat(models.picture(17, 33, seed=2)[..., :1], 3, 2),
            grey=True,
            alpha=np.tile(np.arange(33, dtype=np.uint8) * 7, (17, 1)),
        ),
        "tiny",
        {"quality": 90, "tile": 0},
    ),
}


def textured(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """`models.picture` with grain that changes with the place, so that many codes of the photo weights are in use."""
    noise = np.random.default_rng(seed).normal(0, 1 / 3, (height + 2, width + 2, 1))
    grain = np.sum([noise[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
    strength = 14 * np.linspace(0, 1, width)[:, None] ** 2
    return np.clip(np.rint(models.picture(height, width, seed) + strength * grain), 0, 255).astype(np.uint8)


# Neither is a multiple of anything; 12 tiles and 2.
PHOTOS = {
    "visual": (Picture(textured(150, 201, seed=21)), {"quality": 75, "tile": 64, "tune": "visual"}),
    "psnr": (Picture(textured(90, 131, seed=22)), {"quality": 60, "tile": 128, "tune": "psnr"}),
}


def renew(folder: Path) -> None:
    """Write weights, good files with their codes and pixels, and bad files."""
    (folder / "bad").mkdir(parents=True, exist_ok=True)
    for name, config in CONFIGS.items():
        models.save(models.tiny(config), folder / f"{name}.safetensors")
    for name, (picture, made_with, options) in PICTURES.items():
        weights_file = folder / f"{made_with}.safetensors"
        model = weights.load(weights_file)
        data = codec.compress(picture, weights=weights_file, device="cpu", verify=True, **options)
        (folder / f"{name}.vqz").write_bytes(data)
        codes = decoder.decode_codes([bitstream.read(data)], model)
        with (folder / f"{name}.npz").open("wb") as file:
            np.savez_compressed(file, **{f"level{n}": level[0].numpy() for n, level in enumerate(codes)})
        restored = codec.decode_picture(data, weights=weights_file, device="cpu")
        (folder / f"{name}.png").write_bytes(image.save(restored, ".png"))
    for name, data in bad_files((folder / "tiny.vqz").read_bytes()).items():
        (folder / "bad" / f"{name}.vqz").write_bytes(data)


def renew_photos(folder: Path) -> None:
    """Write files of the packaged photo weights, pixels in both looks and of a damaged file, and codes' hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    model = weights.load(packaged.find())
    expected: dict[str, object] = {"weights": model.id.hex()}
    for name, (picture, options) in PHOTOS.items():
        data = codec.compress(picture, device="cpu", verify=True, **options)
        (folder / f"{name}.vqz").write_bytes(data)
        expected[name] = hash_of(decoder.decode_codes([bitstream.read(data)], model))
        for look, suffix in (("faithful", ""), ("natural", ".natural")):
            restored = codec.decode_picture(data, look=look, device="cpu")
            (folder / f"{name}{suffix}.png").write_bytes(image.save(restored, ".png"))
    broken, _ = damaged((folder / "visual.vqz").read_bytes())
    restored = codec.decode_picture(broken, device="cpu", partial=True)
    (folder / "visual.damaged.png").write_bytes(image.save(restored, ".png"))
    (folder / "expected.json").write_text(json.dumps(expected, indent=4) + "\n", encoding="utf-8")


def hash_of(codes: list[Tensor]) -> str:
    """SHA-256 of the shapes and values of all levels' codes, of one picture."""
    digest = hashlib.sha256()
    for (level,) in codes:
        digest.update(repr(tuple(level.shape)).encode())
        digest.update(level.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def damaged(good: bytes) -> tuple[bytes, list[bool]]:
    """A file with a bit flipped in layer 1 of tile 5 and cut within layer 2, and which segments are left."""
    header = bitstream.read_header(good)
    tiles = header.segments // header.layers
    bad, cut = tiles + 5, 2 * tiles + tiles // 2
    lengths = [len(segment) for segment in bitstream.read(good).segments if segment is not None]
    stored = [length + (5 if length < 128 else 6) for length in lengths]
    start = len(good) - sum(stored)
    data = bytearray(good[: start + sum(stored[:cut]) + 3])
    data[start + sum(stored[: bad + 1]) - 1] ^= 0x10
    return bytes(data), [number < cut and number != bad for number in range(header.segments)]


def bad_files(good: bytes) -> dict[str, bytes]:
    """Ways to be wrong: the name says what is, and tests/test_golden.py which error each must raise."""
    container = bitstream.read(good)
    header, chunks = container.header, container.chunks
    segments = [segment for segment in container.segments if segment is not None]
    # With lengths below 128 a segment takes 5 bytes more than its data.
    bounds = [len(good)]
    for segment in reversed(segments):
        bounds.insert(0, bounds[0] - len(segment) - (5 if len(segment) < 128 else 6))
    parts = [good[start:stop] for start, stop in itertools.pairwise(bounds)]

    def flipped(place: int) -> bytes:
        return good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :]

    buffer = io.BytesIO()
    Image.new("L", (9, 9)).save(buffer, "PNG")
    small_alpha = Chunk("ALPH", buffer.getvalue())
    huge = dataclasses.replace(header, width=0xFFFFFF, height=0xFFFFFF, tile=0)
    return {
        "empty": b"",
        "png": buffer.getvalue(),
        "magic-flipped": flipped(0),
        "version-2": good[:4] + b"\x02" + good[5:],
        "header-flipped": flipped(9),
        "cut-in-header": good[:20],
        "cut-after-header": good[:21],
        "cut-in-chunk": good[:30],
        "cut-after-chunks": good[: bounds[0]],
        "cut-after-a-segment": good[: bounds[3]],
        "cut-in-a-segment": good[:-1],
        "chunk-flipped": flipped(30),
        "segment-flipped": flipped(bounds[1] - 1),
        "segments-swapped": good[: bounds[0]] + parts[1] + parts[0] + b"".join(parts[2:]),
        "trailing-byte": good + b"\0",
        "huge": bitstream.write(huge, (), [b""] * huge.segments),
        "other-weights": bitstream.write(dataclasses.replace(header, weights_id=bytes(4)), chunks, segments),
        "other-layers": bitstream.write(dataclasses.replace(header, layers=2), chunks, segments[:4]),
        "alpha-of-another-size": bitstream.write(header, (small_alpha,), segments),
        "undecodable": bitstream.write(header, chunks, [b"\xff" * 64] * len(segments)),
    }


def renew_document(path: Path, data: bytes) -> None:
    """Put the dump of a file into the block of FORMAT.md that is fenced as hexdump."""
    text = path.read_text(encoding="utf-8")
    block = f"```hexdump\n{format_dump.dump(data)}```"
    old = re.compile(r"^```hexdump\n.*?^```$|^<!-- hex dump: .*?-->$", re.MULTILINE | re.DOTALL)
    renewed, count = old.subn(lambda _: block, text)
    assert count == 1, f"{path} has {count} places for the dump"
    path.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the golden files anew; see the top of this file for when.")
    parser.add_argument("--photo", action="store_true", help="those of weights/photo.safetensors, and only those")
    if parser.parse_args().photo:
        renew_photos(HERE / "photo")
    else:
        renew(HERE)
        renew_document(HERE.parents[1] / "FORMAT.md", (HERE / "tiny.vqz").read_bytes())
