"""Bounds on memory and work: what a picture, a target or a file may ask for."""

import gc
import weakref
from collections import Counter
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqcodec import codec, coding, encoder, search, synthesis
from vqcodec import trials as trials_module
from vqcodec.frame import Frame
from vqcodec.target import Setting, Target


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operator returns, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


def test_range_coding_makes_no_table_of_a_whole_pass() -> None:
    """With a single tile no tensor is larger than the networks' own, where K numbers for each symbol would be."""
    model = models.tiny_model()
    frame = Frame(256, 192, 50)
    codes = [c.short() for c in models.random_codes(model.vqvae, 192, 256)]
    with coding.exact(model):
        expected = coding.encode(model, frame, codes)[0]
        with Largest() as encoding:
            segments = coding.encode(model, frame, codes)[0]
        with Largest() as decoding:
            found = coding.decode(model, frame, [segments])
    assert segments == expected
    assert all(torch.equal(a, b) for a, b in zip(found, codes, strict=True))
    assert max(encoding.numbers, decoding.numbers) <= 256 * 192


class Calls:
    """Counts the calls of functions, which run as they are."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.seen = patch, Counter[str]()

    def watch(self, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.seen[name] += 1
            return plain(*arguments, **options)

        self.patch.setattr(owner, name, counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    watched = Calls(monkeypatch)
    for owner, name in [(synthesis, "analyse"), (synthesis, "reconstruct"), (encoder, "choose"), (coding, "put")]:
        watched.watch(owner, name)
    for owner, name in [(codec.metrics, "psnr"), (codec, "ssimulacra2"), (coding, "encode"), (search, "improve")]:
        watched.watch(owner, name)
    return watched


PUTS = 4 + 4 + 4  # passes of the three slices of `models.TINY`, in one batch of tiles


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"target": Target("size", 400)}, None),
        ({"target": Target("bpp", 0.5)}, None),
        ({"max_size": 400}, None),
        ({"target": Target("psnr", 32)}, "psnr"),
        ({"target": Target("ssimulacra2", 50)}, "ssimulacra2"),
        ({"target": Target("psnr", 38), "max_size": 250}, "psnr"),
        ({"target": Target("psnr", 32), "effort": 2}, "psnr"),
        ({"target": Target("size", 400), "effort": 2}, None),
    ],
    ids=str,
)
def test_trials_do_what_the_target_asks_for(options: dict[str, Any], measured: str | None, calls: Calls) -> None:
    """Lengths need no pictures, likenesses need no files, and latents are hardly ever made twice for a quality."""
    trials: list[Setting] = []
    choose = trials_module.Trials._choose
    calls.patch.setattr(trials_module.Trials, "_choose", lambda *a: trials.append(a[1]) or choose(*a))
    codec.compress(models.picture(64, 96), weights=models.tiny_weights(), verify=False, **options)
    seen = calls.seen
    searched = search.ROUNDS[1] if "effort" in options else 0  # codes that a search chooses and counts the bits of
    assert len(trials) == len(set(trials)) > 2
    assert seen["choose"] == len(trials) * (1 + searched)
    qualities = len({setting.quality for setting in trials})
    assert qualities <= seen["analyse"] <= qualities + 1, "at most the quality of the emphasis was forgotten"
    assert seen["improve"] == (len(trials) if "effort" in options else 0)
    likenesses = 0 if measured is None else seen[measured]
    assert seen["psnr"] + seen["ssimulacra2"] == seen["reconstruct"] == likenesses
    if measured is None:
        assert seen["put"] == len(trials) * (1 + searched) * PUTS
    elif "max_size" not in options:
        assert likenesses == len(trials)
        own = seen["put"] - len(trials) * searched * PUTS
        assert (own, seen["encode"]) == (PUTS, 1), "only the file that is found is range-coded"
    else:
        assert 1 < likenesses < len(trials)


def test_latents_are_not_made_anew_for_another_emphasis(calls: Calls) -> None:
    source = models.picture(64, 96)
    low, high = (len(codec.compress(source, quality=q, weights=models.tiny_weights())) for q in (60, 62))
    calls.seen.clear()
    codec.compress(source, target=Target("size", (2 * low + high) / 3), weights=models.tiny_weights())
    assert calls.seen["analyse"] < calls.seen["choose"]


def test_empty_segments_are_codes_0_and_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real encoder writes no bytes for codes 0, whatever the size, so such a file is not refused."""
    model = models.tiny_model()
    frame = Frame(150, 100, 50, 64)
    nothing = coding.no_codes(model.config, frame)
    with coding.exact(model):
        segments = coding.encode(model, frame, nothing)[0]
        assert not any(segments)
        codes = [c.clone() for c in nothing]
        codes[0][0, 0, 0] = 1
        some = coding.encode(model, frame, codes)[0]
        assert any(some) and not all(some)
        assert all(torch.equal(a, b) for a, b in zip(coding.decode(model, frame, [some]), codes, strict=True))
        monkeypatch.setattr(coding.Tiles, "passes", lambda _: pytest.fail("the prior was run"))
        huge = Frame(6000, 4000, 50)
        for given in (huge, frame):
            count = len(given.tiles()) * model.config.layers
            assert not any(c.any() for c in coding.decode(model, given, [[b""] * count]))


def test_nothing_is_kept_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed for one picture is freed before the next, without waiting for the garbage collector."""
    made: list[weakref.ref[trials_module.Trials]] = []
    begin = trials_module.Trials.__init__

    def noted(self: trials_module.Trials, *args: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *args)

    monkeypatch.setattr(trials_module.Trials, "__init__", noted)
    gc.disable()
    try:
        codec.compress(models.picture(64, 64), weights=models.tiny_weights())
        codec.compress(models.picture(64, 64), weights=models.tiny_weights(), target=Target("psnr", 30))
        assert [ref() for ref in made] == [None, None]
    finally:
        gc.enable()
