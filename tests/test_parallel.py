"""Batches in several threads: the same files and codes, errors that are not lost, and torch as it was."""

import threading
from collections.abc import Iterator

import models
import pytest
import torch
from models import picture

import vqcodec
from vqcodec import bitstream, coding, decoder, parallel, spans, weights
from vqcodec.errors import ChecksumError

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 4])
def processors(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_files_and_codes_do_not_depend_on_it(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 x 4 tiles, in batches of one and two."""
    path = models.tiny_weights()
    source = picture(250, 300, seed=1)
    monkeypatch.setitem(coding.BATCH_PIXELS, "cpu", 2 * 64 * 64)
    torch.set_num_threads(1)
    expected = vqcodec.compress(source, weights=path, tile=64)
    codes = decoder.decode_codes([bitstream.read(expected)], weights.load(path))
    torch.set_num_threads(processors)
    for _ in range(3):
        assert vqcodec.compress(source, weights=path, tile=64, verify=True) == expected
        found = decoder.decode_codes([bitstream.read(expected)], weights.load(path))
        assert all(torch.equal(a, b) for a, b in zip(found, codes, strict=True))


def test_every_batch_has_its_turn(processors: int) -> None:
    """In threads of the pool if there are processors for several, with the settings that exact sums need."""
    seen: list[tuple[int, str, int, bool]] = []

    def work(batch: int) -> None:
        thread = threading.current_thread().name
        seen.append((batch, thread, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with coding.exact(models.tiny_model()), parallel.threads(CPU, 2) as each:
        each(work, range(20))
        each(work, range(20, 25))
        each(work, ())
    assert sorted(batch for batch, *_ in seen) == list(range(25))
    assert all(thread.startswith("vqcodec") == (processors > 1) for _, thread, *_ in seen)
    assert {(count, exact) for *_, count, exact in seen} == {(max(1, processors // 2), True)}
    assert torch.get_num_threads() == processors
    counts: list[int] = []
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [processors], "threads to come are as they would have been"


def test_an_error_ends_the_rest(processors: int) -> None:
    done: list[int] = []

    def work(batch: int) -> None:
        if batch == 3:
            raise ChecksumError("the third")
        done.append(batch)

    with pytest.raises(ChecksumError, match="the third"), parallel.threads(CPU, 4) as each:
        each(work, range(1000))
    assert set(range(3)) <= set(done) and len(done) < 1000
    assert torch.get_num_threads() == processors


def test_seconds_of_threads_add_up(processors: int) -> None:
    ticks = iter(range(10_000))
    with spans.collect(lambda: float(next(ticks))) as seconds, parallel.threads(CPU, 4) as each:
        each(lambda _: span_once(), range(8))
    assert seconds["work"] >= 8


@spans.timed("work")
def span_once() -> None:
    pass
