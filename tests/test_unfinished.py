"""What a run has learned, in a small file: it fits its weights, and is what the run goes on with."""

import math
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from models import TINY
from safetensors import safe_open
from safetensors.torch import save_file
from trainer import SMALL, checkpoint_of, log_of, make_pictures, run, small_runs

from bench import unfinished
from vqcodec import weights

ROUNDING = replace(SMALL, prior_at=0.9, joint_at=0.95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights `first.safetensors` of a run that began with rounding, and one from them that still rounds, `second`."""
    folder = tmp_path_factory.mktemp("unfinished")
    pictures = make_pictures(folder / "pictures", 3, 80, 96)
    with small_runs():
        run(pictures, folder / "first.safetensors", 0.5, schedule=ROUNDING)
        options = {"schedule": ROUNDING, "start_from": folder / "first.safetensors", "crops": 4000}
        run(pictures, folder / "second.safetensors", 0.5, **options)
    return folder


def call(*arguments: str | Path) -> int:
    return unfinished.main([str(argument) for argument in arguments])


def test_a_run_goes_on_with_what_it_has_learned(folder: Path, tmp_path: Path) -> None:
    first, packed, unpacked = folder / "first.safetensors", tmp_path / "packed", tmp_path / "next.safetensors"
    assert call("pack", first, folder / "second.ckpt", packed) == 0
    assert 5 * packed.stat().st_size < (folder / "second.ckpt").stat().st_size
    assert call("unpack", first, packed, unpacked) == 0

    learned = checkpoint_of(folder / "second")
    before, after = (weights.load(path).vqvae.state_dict() for path in (first, unpacked))
    moved = 0
    for name, tensor in after.items():
        if ".codebook." in name:
            assert torch.equal(tensor, before[name])
            continue
        goal = learned[f"average.vqvae.{name}"]
        allowed = (goal - before[name]).abs().max() / 200 + goal.abs() * 2**-10 + 1e-6  # eight bits and half precision
        assert bool(((tensor - goal).abs() <= allowed).all()), name
        moved += not torch.equal(tensor, before[name])
    assert moved > 10
    kept = checkpoint_of(unpacked)
    assert kept and all(torch.equal(tensor, learned[name].half()) for name, tensor in kept.items())

    with small_runs():
        run(folder / "pictures", tmp_path / "third.safetensors", 0.3, schedule=ROUNDING, start_from=unpacked)
    assert math.isfinite(log_of(tmp_path / "third")[-1]["cost"])


def test_a_run_that_has_more_than_its_weights(folder: Path, tmp_path: Path) -> None:
    """Blocks on cells that the weights do not have are kept as well."""
    plain = replace(TINY, stages=(replace(TINY.stages[0], cells=None), *TINY.stages[1:]))
    first = models.save(models.tiny(plain), tmp_path / "first.safetensors")
    packed, unpacked = tmp_path / "packed", tmp_path / "next.safetensors"
    with small_runs():
        options = {"schedule": ROUNDING, "start_from": first, "config": TINY, "crops": 4000}
        run(folder / "pictures", tmp_path / "second.safetensors", 0.5, **options)
    assert call("pack", first, tmp_path / "second.ckpt", packed) == 0
    assert call("unpack", first, packed, unpacked) == 0
    model, learned = weights.load(unpacked), checkpoint_of(tmp_path / "second")
    assert model.config == TINY
    cells = {name: tensor for name, tensor in model.vqvae.state_dict().items() if ".cell_" in name}
    assert cells and all(torch.equal(t, learned[f"average.vqvae.{name}"].half()) for name, t in cells.items())


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, packed = folder / "first.safetensors", tmp_path / "packed"
    assert call("pack", first, folder / "second.ckpt", packed) == 0
    with small_runs():
        run(folder / "pictures", tmp_path / "other.safetensors", 0.2, schedule=SMALL)
    with safe_open(packed, "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys() if not name.endswith("log_steps")}  # noqa: SIM118
        save_file(whole, tmp_path / "partial", file.metadata())
    cases = {
        "lacks": ("unpack", first, tmp_path / "partial", tmp_path / "no"),
        "is of weights": ("unpack", tmp_path / "other.safetensors", packed, tmp_path / "no"),
        "rounding": ("pack", first, tmp_path / "other.ckpt", tmp_path / "no"),
        "cannot resume from": ("pack", first, tmp_path / "none.ckpt", tmp_path / "no"),
        "cannot read": ("unpack", first, first.with_suffix(".csv"), tmp_path / "no"),
    }
    for message, arguments in cases.items():
        capsys.readouterr()
        assert call(*arguments) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0], message
    assert not (tmp_path / "no").exists()
