"""What `vqcodec studio` does with its picture: opens it, compresses it as asked, and compares it with other codecs.

The server (server.py) calls `open`, `render` and `compare` from its worker, one at a time, and `describe` and `file`
at any time. Answers are what the page (web/studio.js) reads as JSON. The files
that they name by "/files/NUMBER/NAME" are kept in memory, for the last picture opened only.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqcodec import bitstream, codec, image, packaged, search, tuning, weights
from vqcodec.errors import VqcodecError, WeightsError
from vqcodec.image import Picture
from vqcodec.studio import page, rivals
from vqcodec.studio.worker import Check
from vqcodec.target import HIGHEST, LOWEST, Target

MAX_BYTES = 256 << 20
MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Settings:
    """How to compress. Attributes: as the arguments of `codec.compress`; either quality or target is None."""

    quality: int | None
    target: Target | None
    effort: int
    tune: str

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> "Settings":
        """Read the settings that the page sends.

        Raises:
            VqcodecError: they are incomplete or out of range.
        """
        quality, size, effort, tune = (asked.get(name) for name in ("quality", "size", "effort", "tune"))
        if not (quality is None or (type(quality) is int and LOWEST <= quality <= HIGHEST)):
            raise VqcodecError(f"the quality must be an integer from {LOWEST} to {HIGHEST}, got {quality!r}")
        if type(effort) is not int or not 1 <= effort <= len(search.ROUNDS):
            raise VqcodecError(f"the effort must be an integer from 1 to {len(search.ROUNDS)}, got {effort!r}")
        if tune not in packaged.TUNES:
            raise VqcodecError(f"tune must be one of {', '.join(packaged.TUNES)}, got {tune!r}")
        if quality is not None:
            return cls(quality, None, effort, tune)
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < math.inf:
            raise VqcodecError(f"the size must be a number of bytes above 0, got {size!r}")
        return cls(None, Target("size", size), effort, tune)


@dataclass
class _Opened:
    """The picture that is open.

    Attributes:
        number: counts the pictures opened so far.
        name: of its file.
        data: its file.
        picture: what is in it; None for a .vqz file.
        settings, encoded, seconds: the last .vqz file made of it, how, and how long that took.
        files: what the page may fetch, by name.
        renderings: how often it was compressed or decoded: a part of addresses, so that no old picture is shown.
    """

    number: int
    name: str
    data: bytes
    picture: Picture | None
    settings: Settings | None = None
    encoded: bytes = b""
    seconds: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)
    renderings: int = 0


class Studio:
    """One picture at a time, and what was made of it."""

    def __init__(self, weights_file: str | None = None, device: str = "auto") -> None:
        """Load the model.

        Args:
            weights_file: to compress with, as of `codec.compress`.
            device: "auto", "cpu" or "cuda".

        Raises:
            WeightsError: the weights cannot be used.
        """
        self._weights, self._device = packaged.find(weights_file), device
        model = weights.load(self._weights, device)
        tuned = tuning.load(tuning.path_of(self._weights), model.config, model.id) is not None
        self._tunes = [tune for tune in packaged.TUNES if tuned or tune != "visual"]
        self._looks = [look for look in packaged.LOOKS if _has(self._weights, look)]
        self._rivals = rivals.available()
        self._opened: _Opened | None = None

    def describe(self) -> dict[str, Any]:
        """What can be chosen, the limits, and the picture that is open, if any."""
        return {
            "max_bytes": MAX_BYTES,
            "tunes": self._tunes,
            "looks": self._looks,
            "rivals": self._rivals,
            "opened": self._opened and self._about(self._opened),
        }

    def open(self, name: str, data: bytes) -> dict[str, Any]:
        """Open a picture or a .vqz file in place of the last one.

        Raises:
            ImageError, FormatError: it cannot be read or is too large. The last one stays.
        """
        picture = None
        if data.startswith(bitstream.MAGIC):
            bitstream.read(data, max_pixels=MAX_PIXELS)
        else:
            picture = image.load(data, max_pixels=MAX_PIXELS)
        opened = _Opened(self._opened.number + 1 if self._opened else 1, name, data, picture)
        if picture is not None:
            opened.files["original.png"] = page.png(picture, level=1)
        self._opened = opened
        return self._about(opened)

    def _about(self, opened: _Opened) -> dict[str, Any]:
        notes = opened.picture.notes if opened.picture else ()
        return {"number": opened.number, "name": opened.name, "vqz": opened.picture is None, "notes": notes}

    def file(self, number: int, name: str) -> bytes | None:
        """A file that an answer has named; None if it is gone."""
        opened = self._opened
        return opened.files.get(name) if opened and opened.number == number else None

    def render(self, number: int, asked: Mapping[str, Any], check: Check = lambda: None) -> dict[str, Any]:
        """Compress the picture and decode it again; or decode the .vqz file in each of its looks.

        Args:
            number: of the picture.
            asked: the settings, see `Settings`, and the "look" to decode with. A .vqz file needs none.
            check: called between the steps; what it raises ends the work.

        Returns:
            "pictures", of which the first is the reference; for a picture also "quality" and "bytes" of its file.

        Raises:
            VqcodecError: the work cannot be done, a setting is out of range, or another picture is open.
        """
        opened = self._find(number)
        opened.renderings += 1
        if opened.picture is None:
            return {"pictures": self._decode_looks(opened, check)}
        settings, look = Settings.of(asked), asked.get("look")
        if look not in packaged.LOOKS:
            raise VqcodecError(f"look must be one of {', '.join(packaged.LOOKS)}, got {look!r}")
        if opened.settings != settings:
            start = time.perf_counter()
            encoded = codec.compress(
                dataclasses.replace(opened.picture, notes=()),  # which the page shows
                quality=settings.quality,
                target=settings.target,
                weights=self._weights,
                device=self._device,
                effort=settings.effort,
                tune=settings.tune,
                on_progress=lambda share: check(),
            )
            opened.settings, opened.encoded, opened.seconds = settings, encoded, time.perf_counter() - start
        check()
        start = time.perf_counter()
        restored = codec.decode_picture(opened.encoded, weights=self._weights, look=look, device=self._device)
        seconds = time.perf_counter() - start
        check()
        original = self._shown(opened, "Original", "original.png", opened.picture)
        original["figures"] = page.figures(len(opened.data), opened.picture, None)
        result = self._shown(opened, "vqcodec", "result.png", restored)
        check()
        result["figures"] = page.figures(len(opened.encoded), restored, opened.picture)
        result["figures"] |= _seconds(opened.seconds, seconds)
        opened.files["result.vqz"] = opened.encoded  # last, so that a rendering that fails leaves the shown one
        quality = bitstream.read_header(opened.encoded).quality
        return {"pictures": [original, result], "quality": quality, "bytes": len(opened.encoded)}

    def compare(self, number: int, rival: object, check: Check = lambda: None) -> dict[str, Any]:
        """Encode the picture with another codec, in as many bytes as its last .vqz file has without metadata.

        Args:
            number, check: as of `render`.
            rival: name of the codec.

        Returns:
            The picture as of `render`.

        Raises:
            VqcodecError: there is no such codec here, no .vqz file to compare with, or another picture is open.
        """
        opened = self._find(number)
        if opened.picture is None or not opened.encoded or rival not in self._rivals:
            raise VqcodecError(f"there is no codec {rival!r} here, or nothing to compare it with")
        name = str(rival)
        file = bitstream.read(opened.encoded)
        plain = bitstream.write(file.header, [], [segment for segment in file.segments if segment is not None])
        data, encoding = rivals.encode(name, opened.picture.pixels, len(plain), check)
        check()
        start = time.perf_counter()
        pixels = rivals.decode(data)
        seconds = time.perf_counter() - start
        decoded = Picture(pixels, icc=opened.picture.icc, grey=opened.picture.grey)
        shown = self._shown(opened, name, f"{name}.png", decoded)
        shown["figures"] = page.figures(len(data), decoded, opened.picture) | _seconds(encoding, seconds)
        return shown

    def _find(self, number: int) -> _Opened:
        if self._opened is None or self._opened.number != number:
            raise VqcodecError("another picture has been opened since, reload the page to see it")
        return self._opened

    def _decode_looks(self, opened: _Opened, check: Check) -> list[dict[str, Any]]:
        """Decode a .vqz file in each look of its weights: those of the studio or packaged ones."""
        made_with = bitstream.read_header(opened.data).weights_id
        path = weights.with_id([self._weights, *packaged.every()], made_with)
        shown: list[dict[str, Any]] = []
        for look in packaged.LOOKS:
            if shown and not (path and _has(path, look)):
                continue
            start = time.perf_counter()
            picture = codec.decode_picture(
                opened.data, weights=path, look=look, device=self._device, max_pixels=MAX_PIXELS
            )
            seconds = time.perf_counter() - start
            check()
            entry = self._shown(opened, f"{look.capitalize()} look", f"{look}.png", picture)
            entry["figures"] = page.figures(len(opened.data), picture, None) | _seconds(None, seconds)
            shown.append(entry)
        return shown

    def _shown(self, opened: _Opened, title: str, name: str, picture: Picture) -> dict[str, Any]:
        height, width, _ = picture.pixels.shape
        version = 0
        if name != "original.png":
            opened.files[name] = page.png(picture, level=1)
            version = opened.renderings
        source = f"/files/{opened.number}/{name}?{version}"
        return {"name": title, "src": source, "width": width, "height": height}


def _has(weights_file: Path, look: str) -> bool:
    try:
        packaged.find_look(weights_file, look)
    except WeightsError:
        return False
    return True


def _seconds(encoding: float | None, decoding: float) -> dict[str, str]:
    encoded = {} if encoding is None else {"Compressed in": f"{encoding:.3f} s"}
    return encoded | {"Decompressed in": f"{decoding:.3f} s"}
