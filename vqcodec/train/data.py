"""Training data: folders of pictures -> batches of random crops.

Pictures are decoded once and cached as uint8 while there is room. Background threads prepare the next batches.
"""

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import files, image
from vqcodec.errors import ImageError, TrainingError
from vqcodec.files import PICTURE_SUFFIXES

CACHE_BYTES = 4 << 30
VALIDATION_SHARE = 0.1  # largest share of the pictures that is set aside for validation, about
MAX_PIXELS = 100_000_000  # of a training picture
LEAST_SIDE = 8  # of a training picture, in pixels

Pixels = NDArray[np.uint8]


def find_pictures(inputs: Iterable[Path]) -> list[Path]:
    """Find picture files.

    Args:
        inputs: files, and folders to search recursively.

    Returns:
        Paths, sorted, without duplicates.

    Raises:
        TrainingError: an input does not exist, or a folder holds no picture.
    """
    names = list(map(str, inputs))
    for name in names:
        if not os.path.exists(name):
            raise TrainingError(f"no such file or folder: {name}")
    try:
        found = files.find(names, PICTURE_SUFFIXES)
    except ValueError as error:
        raise TrainingError(f"no pictures found: {error}") from None
    return sorted({Path(name) for name, _ in found})


def split(pictures: Sequence[Path], validation: int, readable: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Set aside pictures for validation: at most `validation`, and about a tenth of them if there are few.

    The choice depends on a hash of each file's bytes, not on names. Adding pictures never moves one from training to
    validation, so a run that resumes on more data is not validated on what it was trained on. Identical files stay
    together. Where nothing would be left to learn from, as of a single picture, those set aside are in both parts.

    Args:
        pictures, validation: see above.
        readable: whether a picture can be read. It is asked of those that may be set aside; others may be unreadable.

    Returns:
        (training pictures, validation pictures), neither empty, without those found unreadable.

    Raises:
        TrainingError: none of the pictures can be read.
    """
    copies: dict[bytes, list[Path]] = {}
    for path in pictures:
        copies.setdefault(_digest(path), []).append(path)
    held: list[bytes] = []
    for digest in sorted(copies):
        if not readable(copies[digest][0]):
            del copies[digest]
        elif held and (len(held) == validation or digest[0] >= VALIDATION_SHARE * 256):
            break
        else:
            held.append(digest)
    if not held:
        raise TrainingError("none of the pictures could be read")
    aside = {path for digest in held for path in copies[digest]}
    rest = {path for paths in copies.values() for path in paths} - aside
    return [p for p in pictures if p in (rest or aside)], [p for p in pictures if p in aside]


def _digest(path: Path) -> bytes:
    """A hash of a file's bytes, or of its name if it is unreadable: `Pictures` warns of it."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return hashlib.sha256(path.name.encode()).digest()


class Pictures:
    """Decoded pictures by index, cached in memory.

    Args:
        paths: of the pictures.
        on_warning: called once with a line of text for each picture that is skipped.
        cache_bytes: size of the cache.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        on_warning: Callable[[str], None] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._paths = list(paths)
        self._warn = on_warning or (lambda _: None)
        self._room = cache_bytes
        self._cache: dict[Path, Pixels] = {}
        self._bad: set[Path] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._paths)

    def only(self, paths: Sequence[Path], cache_bytes: int) -> "Pictures":
        """Some of the pictures, with a cache. Those found unreadable so far are known, and counted on."""
        some = Pictures(paths, self._warn, cache_bytes)
        some._bad = self._bad
        return some

    def get(self, index: int) -> Pixels | None:
        """Picture `index` as uint8 (H, W, 3); None if it is skipped."""
        return self.read(self._paths[index])

    def read(self, path: Path) -> Pixels | None:
        """A picture as uint8 (H, W, 3); None if it is skipped: it cannot be read, or is too small to learn from."""
        cached = self._cache.get(path)
        if cached is not None or path in self._bad:
            return cached
        try:
            pixels = image.load(path.read_bytes(), max_pixels=MAX_PIXELS).pixels
            height, width = pixels.shape[:2]
            if min(height, width) < LEAST_SIDE:
                raise ImageError(f"the picture has {width} x {height} pixels, expected {LEAST_SIDE} or more a side")
        except (ImageError, OSError, MemoryError) as error:
            with self._lock:
                self._bad.add(path)
                count = len(self._bad)
            reason = getattr(error, "strerror", None) or str(error) or "out of memory"
            self._warn(f"{path}: {reason}: skipped, {count} so far")
            return None
        with self._lock:
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._cache[path] = pixels
        return pixels


def crop(pixels: Pixels, size: int, rng: np.random.Generator, mirror: bool = True) -> Pixels:
    """Take a random crop, uint8 (size, size, 3), of a picture (H, W, 3). A smaller picture is padded by replication.

    mirror: flip half of the crops horizontally.
    """
    height, width = pixels.shape[:2]
    top = int(rng.integers(max(1, height - size + 1)))
    left = int(rng.integers(max(1, width - size + 1)))
    cut = pixels[top : top + size, left : left + size]
    if cut.shape[:2] != (size, size):
        cut = np.pad(cut, ((0, size - cut.shape[0]), (0, size - cut.shape[1]), (0, 0)), mode="edge")
    return cut[:, ::-1] if mirror and rng.random() < 0.5 else cut


def batches(
    pictures: Pictures, *, batch: int, size: int, seed: int, threads: int = 1, mirror: bool = True, pinned: bool = False
) -> Generator[Tensor, None, None]:
    """Generate batches of crops without end. Every picture is used once before any is used again.

    Args:
        pictures: the source.
        batch: crops per batch, B.
        size: side of a crop in pixels.
        seed: of order, places and mirroring. Each process of a distributed run needs its own.
        threads: number of threads that decode and crop.
        mirror: see `crop`.
        pinned: whether batches lie in pinned memory, which a GPU can copy from asynchronously.

    Yields:
        uint8 (B, size, size, 3).

    Raises:
        TrainingError: none of the pictures could be read.
    """
    ready: queue.Queue[Tensor | Exception] = queue.Queue(maxsize=4)
    stopped = threading.Event()

    def put(item: Tensor | Exception) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                break

    def cut(index: int, seed: int) -> Pixels | None:
        pixels = None if stopped.is_set() else pictures.get(index)
        # Copy in this worker thread, not in the one that stacks the batch.
        return None if pixels is None else crop(pixels, size, np.random.default_rng(seed), mirror).copy()

    def fill() -> None:
        rng = np.random.default_rng(seed)
        crops: list[Pixels] = []
        try:
            with ThreadPoolExecutor(threads) as pool:
                while True:
                    order = rng.permutation(len(pictures))
                    readable = False
                    for start in range(0, len(order), batch):
                        here = order[start : start + batch].tolist()
                        for pixels in pool.map(cut, here, rng.integers(1 << 62, size=len(here)).tolist()):
                            if pixels is not None:
                                readable = True
                                crops.append(pixels)
                        while len(crops) >= batch:
                            item, crops = torch.from_numpy(np.stack(crops[:batch])), crops[batch:]
                            put(item.pin_memory() if pinned else item)
                        if stopped.is_set():
                            return
                    if not readable:
                        raise TrainingError("none of the pictures could be read")
        except Exception as error:  # noqa: BLE001 (raised again in the consumer)
            put(error)

    filler = threading.Thread(target=fill, daemon=True, name="vqcodec-crops")
    filler.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
        filler.join()
