"""Folders of pictures -> batches: what is found, what is skipped, and that a seed says everything."""

import itertools
import threading
import warnings as warning_filters
from pathlib import Path

import models
import numpy as np
import pytest
from PIL import Image

from vqcodec.errors import TrainingError
from vqcodec.train import data
from vqcodec.train.data import PICTURE_SUFFIXES, Pictures, batches, crop, find_pictures, split


def write(path: Path, height: int = 40, width: int = 50, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(models.picture(height, width, seed)).save(path)
    return path


def write_flat(folder: Path, count: int) -> list[Path]:
    """Pictures of one colour each: number n has n in every sample."""
    paths = []
    for number in range(count):
        path = folder / f"{number:02}.png"
        Image.new("RGB", (10, 12), (number,) * 3).save(path)
        paths.append(path)
    return paths


# Finding


def test_folders_are_searched_through(tmp_path: Path) -> None:
    names = ["a.png", "sub/b.JPG", "sub/deep/c.WebP", "d.tiff"]
    found = [write(tmp_path / name) for name in names]
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    assert find_pictures([tmp_path]) == sorted(found)
    assert find_pictures([tmp_path, tmp_path / "sub", found[0]]) == sorted(found)
    assert find_pictures([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"], "a file that is named is taken"
    assert {".png", ".jpg", ".avif"} <= set(PICTURE_SUFFIXES)


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no pictures found: .* holds no files named \\*\\.png"):
        find_pictures([tmp_path])
    with pytest.raises(TrainingError, match="no such file or folder: .*missing"):
        find_pictures([tmp_path / "missing"])


# Splitting


def readable(_: Path) -> bool:
    return True


def files(folder: Path, numbers: range) -> list[Path]:
    paths = []
    for number in numbers:
        paths.append(folder / f"{number}.png")
        paths[-1].write_bytes(str(number).encode())
    return paths


@pytest.mark.parametrize("validation", [3, 1000])
def test_split_does_not_move_pictures_into_validation(validation: int, tmp_path: Path) -> None:
    """More data, other order, other folder: nothing that was trained on is ever validated on."""
    trained: set[Path] = set()
    for count in (2, 3, 5, 10, 50, 200, 400):
        paths = files(tmp_path, range(count))
        training, held = split(paths, validation, readable)
        assert sorted(training + held) == sorted(paths)
        assert training and 1 <= len(held) <= validation
        assert not trained & set(held)
        trained |= set(training)
        assert split(paths[::-1], validation, readable) == (training[::-1], held[::-1])
    assert len(held) == validation or 20 < len(held) < 60
    elsewhere = files(tmp_path / "..", range(400))
    assert {p.name for p in split(elsewhere, validation, readable)[1]} == {p.name for p in held}


def test_copies_stay_together(tmp_path: Path) -> None:
    paths = files(tmp_path, range(40))
    copies = [p.with_suffix(".copy") for p in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    training, held = split(paths + copies, 100, readable)
    assert {p.stem for p in training}.isdisjoint(p.stem for p in held)
    assert len(held) % 2 == 0


def test_a_single_picture_is_both(tmp_path: Path) -> None:
    path = files(tmp_path, range(1))
    assert split(path, 32, readable) == (path, path)
    twice = [*path, tmp_path / "same.png"]
    twice[1].write_bytes(path[0].read_bytes())
    assert split(twice, 32, readable) == (twice, twice)


def test_unreadable_pictures_count_for_nothing(tmp_path: Path) -> None:
    """Whichever they are: the others are split as they would be without them."""
    paths = files(tmp_path, range(40))
    for bad in ({paths[0]}, set(paths[::2]), set(split(paths, 3, readable)[1]), set(paths[1:])):
        asked: list[Path] = []
        training, held = split(paths, 3, lambda path, bad=bad, asked=asked: asked.append(path) or path not in bad)
        expected = split([p for p in paths if p not in bad], 3, readable)
        assert held == expected[1]
        assert set(expected[0]) <= set(training) <= set(expected[0]) | bad, "of others nobody knows yet"
        assert not bad & set(asked) & set(training)
    with pytest.raises(TrainingError, match="none of the pictures could be read"):
        split(paths, 3, lambda _: False)


# Reading


def test_bad_pictures_are_skipped_with_one_warning(tmp_path: Path) -> None:
    good = write(tmp_path / "good.png")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:300])
    gone = tmp_path / "gone.png"
    small = write(tmp_path / "small.png", 1, 1)
    moving = tmp_path / "moving.gif"
    frames = [Image.new("L", (40, 40), grey) for grey in (0, 255)]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    bad = [text, cut, gone, small, moving]
    warnings: list[str] = []
    pictures = Pictures([good, *bad], warnings.append)
    assert len(pictures) == 6
    for _ in range(2):
        found = [pictures.get(index) for index in range(6)]
        assert found[0] is not None and found[0].shape == (40, 50, 3)
        assert found[1:] == [None] * 5
    assert len(warnings) == 5
    for count, (path, warning) in enumerate(zip(bad, warnings, strict=True), 1):
        assert warning.startswith(f"{path}: ") and warning.endswith(f": skipped, {count} so far")
        assert "\n" not in warning
    assert {tuple(b[0, 0, 0]) for b in itertools.islice(batches(pictures, batch=2, size=8, seed=0), 3)}


def test_nothing_but_bad_pictures(tmp_path: Path) -> None:
    paths = files(tmp_path, range(3))
    warnings: list[str] = []
    stream = batches(Pictures(paths, warnings.append), batch=2, size=8, seed=0)
    with pytest.raises(TrainingError, match="none of the pictures could be read"):
        next(stream)
    assert len(warnings) == 3


def test_pictures_are_kept_while_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_flat(tmp_path, 3)
    reads: list[Path] = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or plain(self))
    pictures = Pictures(paths, cache_bytes=2 * 10 * 12 * 3)
    for _ in range(3):
        for index in range(3):
            found = pictures.get(index)
            assert found is not None and int(found[0, 0, 0]) == index
    assert reads == [*paths, paths[2], paths[2]]


def test_a_picture_too_large_for_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(data.image, "load", load)
    warnings: list[str] = []
    assert Pictures([write(tmp_path / "a.png")], warnings.append).get(0) is None
    assert warnings == [f"{tmp_path / 'a.png'}: out of memory: skipped, 1 so far"]


def test_threads_leave_the_warning_filters_alone(tmp_path: Path) -> None:
    before = list(warning_filters.filters)
    paths = [write(tmp_path / f"{n}.png", 200, 200, seed=n) for n in range(8)]
    stream = batches(Pictures(paths, cache_bytes=0), batch=8, size=16, seed=0, threads=8)
    for _ in itertools.islice(stream, 5):
        pass
    stream.close()  # type: ignore[attr-defined]
    for thread in running():
        thread.join(timeout=30)
    assert warning_filters.filters == before


# Crops


def test_crops() -> None:
    pixels = models.picture(30, 40)
    rng = np.random.default_rng(0)
    places, mirrored = set(), 0
    windows = {pixels[y : y + 16, x : x + 16].tobytes(): (y, x) for y in range(15) for x in range(25)}
    for _ in range(5000):
        found = crop(pixels, 16, rng)
        assert found.shape == (16, 16, 3)
        place = windows.get(found.tobytes())
        mirrored += place is None
        places.add(place or windows[found[:, ::-1].tobytes()])
    assert 2300 < mirrored < 2700
    assert all(crop(pixels, 16, rng, mirror=False).tobytes() in windows for _ in range(100))
    assert places == set(windows.values()), "every crop can come, those at the edges as well"


@pytest.mark.parametrize("shape", [(10, 40), (40, 10), (1, 1), (16, 16)], ids=str)
def test_small_pictures_are_padded_by_their_edges(shape: tuple[int, int]) -> None:
    pixels = models.picture(*shape)
    found = crop(pixels, 16, np.random.default_rng(0))
    assert found.shape == (16, 16, 3)
    height, width = min(shape[0], 16), min(shape[1], 16)
    upright = found if np.array_equal(found[-1, -1], found[height - 1, width - 1]) else found[:, ::-1]
    assert (upright[height:] == upright[height - 1]).all()
    assert (upright[:, width:] == upright[:, width - 1, None]).all()


# Batches


def first(pictures: Pictures, count: int, seed: int, **options: int) -> list[np.ndarray]:
    return [b.numpy() for b in itertools.islice(batches(pictures, batch=4, size=16, seed=seed, **options), count)]


def test_a_seed_says_everything(tmp_path: Path) -> None:
    pictures = Pictures([write(tmp_path / f"{n}.png", seed=n) for n in range(6)])
    found = first(pictures, 5, seed=1)
    assert all(b.shape == (4, 16, 16, 3) and b.dtype == np.uint8 for b in found)
    assert np.array_equal(found, first(pictures, 5, seed=1))
    assert np.array_equal(found, first(Pictures([tmp_path / f"{n}.png" for n in range(6)]), 5, seed=1, threads=3))
    assert not np.array_equal(found, first(pictures, 5, seed=2))


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_every_picture_comes_once_before_any_comes_again(count: int, tmp_path: Path) -> None:
    pictures = Pictures(write_flat(tmp_path, count))
    numbers = np.concatenate(first(pictures, 10, seed=3))[:, 0, 0, 0]
    for start in range(0, len(numbers) - count + 1, count):
        assert sorted(numbers[start : start + count]) == list(range(count))
    if count == 10:
        assert list(numbers[:10]) != list(numbers[10:20]), "every round in another order"


def running() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "vqcodec-crops"}


def test_threads_end_with_the_stream(tmp_path: Path) -> None:
    before = running()
    stream = batches(Pictures(write_flat(tmp_path, 3)), batch=2, size=8, seed=0)
    next(stream)
    (own,) = running() - before
    stream.close()
    assert not own.is_alive()
