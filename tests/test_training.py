"""Training: a few seconds beat the untrained state, and interrupted, resumed and distributed runs come to the same end.

Crops and batches are small here, but for the slow tests.
"""

import copy
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import models
import numpy as np
import pytest
import torch
from commandline import ROOT
from models import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainer import (
    BOOKKEEPING,
    LEAST,
    QUALITIES,
    SMALL,
    Run,
    checkpoint_of,
    log_of,
    make_pictures,
    run,
    sheet_of,
    small_runs,
)

from vqcodec import codec, files, tuning, weights, weights_file
from vqcodec.errors import TrainingError, WeightsError
from vqcodec.metrics import ms_ssim, psnr
from vqcodec.models.config import Config, PriorConfig
from vqcodec.ssimulacra2 import ssimulacra2
from vqcodec.train import checkpoint, crops, data, perceptual, process, sensitivity, step, validation
from vqcodec.train import run as training
from vqcodec.train.loss import RateDistortion
from vqcodec.train.schedule import Schedule
from vqcodec.train.validation import SHEET_QUALITY


@pytest.fixture
def small() -> Iterator[None]:
    with small_runs():
        yield


@pytest.fixture
def untuned(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that ask nothing of the visual tuning: it is not measured."""
    monkeypatch.setattr(sensitivity, "measure", lambda model, *_: models.visual_tuning(model.config))


@pytest.fixture
def unmeasured(untuned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that ask nothing of the log's numbers either."""
    monkeypatch.setattr(validation, "measure", lambda *_, **__: {"cost": 1.0})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures to train on."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), 8, 160, 200)


@pytest.fixture(scope="module")
def trained_tiny(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two seconds of the tiny configuration, on these pictures and one that is none."""
    folder, output = tmp_path_factory.mktemp("more"), tmp_path_factory.mktemp("tiny") / "mine.safetensors"
    for path in pictures.iterdir():
        shutil.copy(path, folder)
    (folder / "bad.png").write_text("no picture")
    told: list[str] = []
    with small_runs():
        seen = run(folder, output, 2, config=TINY, on_warning=told.append)
    return Run(output, seen, told, 2)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A second and a half of the least configuration."""
    output = tmp_path_factory.mktemp("trained") / "mine.safetensors"
    with small_runs():
        seen = run(pictures, output, 1.5)
    return Run(output, seen, [], 1.5)


ROUNDING = dataclasses.replace(SMALL, kernel_rate=None, rate=3e-3, prior_at=0.7, joint_at=1.0, polish_from=1.0)


@pytest.fixture(scope="module")
def rounded(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nothing but rounding."""
    output = tmp_path_factory.mktemp("rounded") / "mine.safetensors"
    with small_runs():
        seen = run(pictures, output, 1, schedule=dataclasses.replace(ROUNDING, prior_at=1.0))
    return Run(output, seen, [], 1)


@pytest.fixture(scope="module")
def taken_over(rounded: Run, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with more time, in which codebooks and prior take over."""
    output = rounded.copy(tmp_path_factory.mktemp("taken-over"))
    with small_runs():
        seen = run(pictures, output, 1.5, schedule=ROUNDING, resume=True)
    return Run(output, seen, [], 1.5)


# A whole run


def test_the_prior_is_learned_after_the_rest(pictures: Path, tmp_path: Path, small: None) -> None:
    """Codes come to cost less, by a prior that had no part in choosing them; and the weights are a codec."""
    output = tmp_path / "raster.safetensors"
    config = dataclasses.replace(models.raster(layers=2).config, lambda_range=(0.01, 0.011))
    plan = dataclasses.replace(SMALL, crop=32, large_crop=32)
    stale = tuning.path_of(output)
    models.visual_tuning().save(stale, b"none")
    seen = run(pictures, output, 2.5, config=config, schedule=plan)
    assert not stale.exists(), "of other weights; codes of these are not chosen for the rate"
    rows = log_of(output)
    first, last = rows[0], rows[-1]
    assert last["bpp_30"] < first["bpp_30"]
    assert seen[-1].step > 10
    source = models.picture(24, 28)
    data = codec.compress(source, weights=output, verify=True)
    assert np.asarray(codec.decompress(data, weights=output)).shape == source.shape


def test_a_few_seconds_beat_the_untrained_state(trained_tiny: Run, small: None) -> None:
    output, seen = trained_tiny.output, trained_tiny.seen
    rows = log_of(output)
    assert rows[0]["step"] == 0 and rows[-1]["step"] == seen[-1].step > 3
    assert rows[-1]["cost"] < 0.985 * rows[0]["cost"]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert 2 <= len(rows) <= 6
    assert len(trained_tiny.warnings) == 1 and "bad.png" in trained_tiny.warnings[0]

    stages = [p.stage for p in seen]
    assert stages[0] == "start" and stages[-1] == "export" and {"train", "validate"} < set(stages)
    assert [p.step for p in seen] == sorted(p.step for p in seen)
    assert [p.elapsed for p in seen] == sorted(p.elapsed for p in seen)
    running = [p for p in seen if p.stage == "train"]
    assert all(p.elapsed + p.remaining == pytest.approx(trained_tiny.seconds) for p in running[:-1])
    assert all(0 < p.bpp < 24 and 5 < p.psnr < 60 and math.isfinite(p.loss) and p.perplexity >= 1 for p in running)

    assert {path.name for path in output.parent.iterdir()} == {
        f"mine.{s}" for s in ("safetensors", "visual.json", "ckpt", "csv", "png")
    }
    original, before, after = sheet_of(output)
    assert original.shape == (64, 64, 3), "one validation picture"
    assert len({original.tobytes(), before.tobytes(), after.tobytes()}) == 3
    assert min(psnr(original, before), psnr(original, after)) > 20

    measures = ("bpp", "psnr", "cost", "ssimulacra2", "ms_ssim")
    columns = {f"{name}_{quality}" for name in measures for quality in QUALITIES}
    assert rows[0].keys() == columns | {"step", "crops", "minutes", "gpu", "cost", "perplexity"}
    for row, restored in ((rows[0], before), (rows[-1], after)):
        logged = [row[f"{name}_{SHEET_QUALITY}"] for name in ("ssimulacra2", "ms_ssim")]
        assert logged[0] == pytest.approx(ssimulacra2(original, restored), abs=0.05)
        assert logged[1] == pytest.approx(ms_ssim(original, restored), abs=1e-5)

    notes = weights_file.describe(output)["notes"]
    assert notes["steps"] == seen[-1].step
    assert notes["processes"] == 1
    assert notes["visual_share"] == 0.5
    assert notes["trained"]["cost"] == rows[-1]["cost"]
    assert notes["exported"]["cost"] == pytest.approx(notes["trained"]["cost"], rel=0.01)
    assert tuning.load(tuning.path_of(output), TINY, weights.load(output).id) is not None
    source = models.picture(70, 90, seed=200)
    data = codec.compress(source, weights=output, verify=True)
    assert data != codec.compress(source, weights=output, tune="psnr"), "the tuning is used"
    assert psnr(source, codec.decode_picture(data, weights=output).pixels) > 20


def test_the_average_is_exported(trained_tiny: Run) -> None:
    tensors, exported = checkpoint_of(trained_tiny.output), weights.load(trained_tiny.output).vqvae.state_dict()
    for name in ("slices.1.0.log_steps", "slices.1.1.codebook.vectors", "slices.0.0.codebook.bias"):
        assert torch.equal(exported[name], tensors[f"average.vqvae.{name}"])
        assert not torch.equal(exported[name], tensors[f"model.vqvae.{name}"])


def test_codebooks_that_come_from_data(pictures: Path, tmp_path: Path, small: None) -> None:
    """EMA, k-means start and revival: the paper's layout, narrower."""
    config = dataclasses.replace(models.raster(layers=1).config, codebook="ema", lambda_range=(0.01, 0.011))
    assert not config.structured
    output = tmp_path / "mine.safetensors"
    # Rounding cannot stand in for them, whatever the schedule says.
    run(pictures, output, 1, config=config, schedule=dataclasses.replace(SMALL, prior_at=0.9, joint_at=0.95))
    assert not any(name.startswith("model.rounding.") for name in checkpoint_of(output))
    rows = log_of(output)
    # The codes of the start are those of all crops; after a step they are averages of the members in a single batch.
    assert rows[-1]["cost"] < rows[1]["cost"]
    vectors = weights.load(output).vqvae.slice(1, 0).codebook.vectors
    assert vectors.shape == (1, 32, 16)
    assert len(torch.unique(vectors[0], dim=0)) == 32
    data = codec.compress(models.picture(70, 90), weights=output, verify=True)
    assert codec.decompress(data, weights=output).size == (90, 70)


@pytest.mark.slow
def test_a_minute_at_full_size(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: True)
    output = tmp_path / "mine.safetensors"
    run(pictures, output, 55, config=TINY, schedule=None)
    # A prior that has learned for twenty seconds does not know yet what the distributions know that stand in for it at
    # first.
    turn = Schedule().prior_at * 55 / 60
    rounding, codes = (
        [row["cost"] for row in log_of(output) if (row["minutes"] > turn) == later] for later in (False, True)
    )
    assert rounding[-1] < rounding[0]
    assert codes[-1] < codes[0]


# Interruption


def test_resume_goes_on(trained: Run, pictures: Path, tmp_path: Path, small: None) -> None:
    output = trained.copy(tmp_path)
    stopped, rows, before = trained.seen[-1].step, log_of(output), weights.load(output).id
    tensors = checkpoint_of(output)
    assert stopped > 0

    lost = output.with_suffix(".csv").read_text().splitlines()[-1].split(",", 1)[1]
    with output.with_suffix(".csv").open("a", newline="") as file:
        file.write(f"{stopped + 7},{lost}\n")  # of a run that went on after the checkpoint
    again = run(pictures, output, trained.seconds, resume=True)  # which are used up: nothing but the export is left
    assert [p.step for p in again] == [stopped] * len(again)
    assert log_of(output)[: len(rows)] == rows
    assert all(row["step"] <= stopped for row in log_of(output))

    sheet = sheet_of(output)
    seen = run(pictures, output, trained.seconds + 0.5, resume=True)
    assert np.array_equal(sheet_of(output)[:2], sheet[:2]), "the original and what it looked like before all training"
    assert not np.array_equal(sheet_of(output)[2], sheet[2])
    running = [p for p in seen if p.stage == "train"]
    assert running[0].step > stopped and running[0].elapsed > trained.seconds - 0.1
    assert seen[-1].step > stopped
    assert [row["step"] for row in log_of(output)] == sorted(row["step"] for row in log_of(output))
    assert weights.load(output).id != before
    assert tuning.load(tuning.path_of(output), LEAST, weights.load(output).id) is not None, "measured anew"
    moments = [name for name in tensors if name.endswith((".exp_avg", ".momentum"))]
    assert len(moments) == sum(1 for _ in models.RateDistortion(LEAST).parameters())


def test_sittings_come_to_what_one_run_would(pictures: Path, tmp_path: Path, unmeasured: None) -> None:
    """A run of so many crops in three sittings has the learning rates, phases and number of steps of a single one."""
    plan = dataclasses.replace(SMALL, large_from=1.1, prior_at=0.4, joint_at=0.6, polish_from=0.8)
    rates: dict[str, list[tuple[float, int]]] = {"whole": [], "parts": []}

    def watch(name: str) -> Any:
        take = step.take

        def taken(run: Any, crops: Any, share: float) -> None:
            rates[name].append((round(share, 6), int(run.phase)))
            take(run, crops, share)

        return taken

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "take", watch("whole"))
        run(pictures, whole, math.inf, schedule=plan, crops=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "take", watch("parts"))
        for sitting in range(10):
            run(pictures, parts, 0.4, schedule=plan, crops=80, resume=sitting > 0)
            if parts.exists():
                break
    assert sitting > 0 and len(rates["whole"]) == 20
    assert rates["parts"] == rates["whole"]
    assert {phase for _, phase in rates["whole"]} == {0, 1, 2, 3}
    assert [int(rows[-1]["crops"]) for rows in map(log_of, (whole, parts))] == [80, 80]


def test_a_resumed_run_starts_from_the_checkpoint(
    trained: Run, pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, averages, optimiser, facts and log: saving what was loaded gives the same checkpoint."""
    output = trained.copy(tmp_path)
    before, log = checkpoint_of(output), output.with_suffix(".csv").read_text()
    with safe_open(output.with_suffix(".ckpt"), framework="pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["facts"]) | {"averaged": 3, "rate_start": 0.25}  # other than at a start
    save_file(before, output.with_suffix(".ckpt"), metadata | {"facts": json.dumps(facts)})
    lost = log.splitlines()[-1].split(",", 1)[1]
    output.with_suffix(".csv").write_text(f"{log}{trained.seen[-1].step + 7},{lost}\n")  # after the checkpoint
    monkeypatch.setattr(validation, "validate", lambda _: None)
    run(pictures, output, 0.5, resume=True)  # no step, but the checkpoint is written again
    after = checkpoint_of(output)
    with safe_open(output.with_suffix(".ckpt"), framework="pt") as file:
        found = json.loads(file.metadata()["facts"])
    assert found == facts | {"spent": found["spent"]}
    assert output.with_suffix(".csv").read_text() == log
    assert before.keys() == after.keys()
    assert bool(before["model.distortion.seen"].all()), "the unit of the visual distance is learned"
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_moments_lie_in_memory_as_their_weights_do(
    rounded: Run, pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused Adam reads both in order. Kernels are channels-last, and a checkpoint keeps them contiguous."""
    output = rounded.copy(tmp_path)
    found: list[torch.optim.Optimizer] = []
    restore = checkpoint.restore

    def look(run: Any, saved: checkpoint.Saved) -> None:
        restore(run, saved)
        found.extend(run.optimisers.values())

    monkeypatch.setattr(checkpoint, "restore", look)
    monkeypatch.setattr(validation, "validate", lambda _: None)
    run(pictures, output, 0.5, schedule=dataclasses.replace(ROUNDING, prior_at=1.0), resume=True)
    layouts = [
        (weight.stride(), kept.stride())
        for optimiser in found
        for weight, moments in optimiser.state.items()
        for kept in moments.values()
        if kept.shape == weight.shape
    ]
    assert len(layouts) > 50 and all(weight == kept for weight, kept in layouts)


@pytest.mark.parametrize(("suffix", "place", "start"), [(".ckpt", 8, b"{"), (".csv", 0, b"step,"), (".png", 1, b"PNG")])
def test_an_interrupted_save_leaves_the_last_file(
    trained: Run,
    pictures: Path,
    tmp_path: Path,
    unmeasured: None,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    place: int,
    start: bytes,
) -> None:
    output = trained.copy(tmp_path)
    saved = output.with_suffix(suffix).read_bytes()
    write_all = files._write_all

    def interrupted(file: BinaryIO, data: bytes) -> None:
        if not data[place:].startswith(start):
            return write_all(file, data)
        write_all(file, data[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(pictures, output, trained.seconds + 0.2, resume=True)
    assert output.with_suffix(suffix).read_bytes() == saved
    assert not list(tmp_path.glob(".vqcodec-*"))
    seen = run(pictures, output, trained.seconds + 0.4, resume=True)
    assert seen[-1].step > trained.seen[-1].step
    assert seen[-1].stage == "export"


def at_step(number: int, act: Callable[[Any], None]) -> Callable[..., None]:
    """`step.take`, but before the step of this number something happens."""
    take = step.take

    def taken(run: Any, *args: Any) -> None:
        if run.step == number:
            act(run)
        take(run, *args)

    return taken


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT has Python's usual handler, even where the shell that started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_the_run_after_the_step(
    number: signal.Signals, pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, before = tmp_path / "mine.safetensors", signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", math.inf)
        patch.setattr(step, "take", at_step(3, lambda _: signal.raise_signal(number)))
        with pytest.raises(process.Interrupted) as caught:
            run(pictures, output, 1)
    assert caught.value.number == number
    assert signal.getsignal(number) == before
    assert not output.exists()
    seen = run(pictures, output, 1, resume=True)
    assert next(p.step for p in seen if p.stage == "train") == 5
    assert output.exists()


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_does_not_wait(
    pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(_: Any) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(step, "take", at_step(3, twice))
    with pytest.raises(KeyboardInterrupt) as caught:
        run(pictures, tmp_path / "mine.safetensors", 1)
    assert not isinstance(caught.value, process.Interrupted)


@pytest.mark.parametrize("last", ["validate", "export"])
def test_a_signal_after_the_last_step_does_not_wait(
    last: str, pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is that of the last step, and only what was interrupted is left to do."""
    output, steps, stopped = tmp_path / "mine.safetensors", [], []

    def report(run: Any, stage: str) -> None:
        steps.append(run.step)
        if stage == last and run.share >= 1 and not stopped:
            stopped.append(run.step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("vqcodec.train.state.Run.report", report)
    with pytest.raises(process.Interrupted) as caught:
        run(pictures, output, 0.3)
    assert caught.value.number == signal.SIGTERM
    assert not output.exists()
    steps.clear()
    run(pictures, output, 0.3, resume=True)
    assert set(steps) == set(stopped)
    assert output.exists()


def test_signals_with_a_handler_are_left_to_it() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with process.held_signals() as held, process.raised_signals():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (came, held) == ([signal.SIGTERM], [])


def test_where_there_is_a_log_there_is_a_checkpoint(
    pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a run is killed, it can be resumed or nothing of it is left."""
    output = tmp_path / "mine.safetensors"

    def killed(_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(SystemExit):
            run(pictures, output, 1)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(step, "take", at_step(0, killed))
        with pytest.raises(SystemExit):
            run(pictures, output, 1)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".ckpt", ".csv"]
    assert run(pictures, output, 0.2, resume=True)[-1].stage == "export"
    assert log_of(output)[0]["step"] == 0


def test_a_log_of_something_else(trained: Run, pictures: Path, tmp_path: Path, unmeasured: None) -> None:
    output = trained.copy(tmp_path)
    output.with_suffix(".csv").write_text("day,rain\n1,2\n")
    with pytest.raises(TrainingError, match=r"mine\.csv is not the log of a training run"):
        run(pictures, output, 4, resume=True)
    assert output.with_suffix(".csv").read_text() == "day,rain\n1,2\n"


def test_crops_of_processes_sittings_and_sides_differ(pictures: Path) -> None:
    """And are the same where nothing differs, so that a run can be repeated."""
    found = data.Pictures(sorted(pictures.iterdir()), None, cache_bytes=0)

    def first(rank: int = 0, step: int = 0, side: int = 64) -> torch.Tensor:
        job: Any = SimpleNamespace(device=torch.device("cpu"), schedule=SMALL, seed=1, rank=rank, world=2)
        stream = crops.stream(job, found, side, step)
        batch = next(stream)
        stream.close()  # type: ignore[attr-defined]
        return batch[:, :32, :32]

    again, *others = first(), first(rank=1), first(step=5), first(side=32)
    assert torch.equal(first(), again)
    assert not any(torch.equal(again[: len(other)], other) for other in others)


# What is not finite


def test_a_few_losses_may_not_be_finite(
    pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps without a finite loss change nothing; not even one of many may spoil weights and their averages."""
    output, calls = tmp_path / "mine.safetensors", itertools.count()

    def spoil(run: Any) -> None:
        run.model.distortion.register_forward_hook(lambda _, __, out: out * (math.nan if next(calls) % 3 else 1))

    monkeypatch.setattr(training, "MOST_LOST", 3)
    monkeypatch.setattr(step, "take", at_step(1, spoil))
    assert run(pictures, output, 0.6)[-1].stage == "export"
    assert next(calls) > 6
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint_of(output).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_end_the_run(
    value: float, pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is kept, and weights are not written."""
    output = tmp_path / "mine.safetensors"

    def spoil(run: Any) -> None:
        run.model.distortion.register_forward_hook(lambda *_: torch.tensor(value))

    monkeypatch.setattr(training, "MOST_LOST", 3)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", math.inf)
    monkeypatch.setattr(step, "take", at_step(2, spoil))
    with pytest.raises(
        TrainingError, match=r"not been finite for 3 steps, at step 5; .*mine\.ckpt is of an earlier one"
    ):
        run(pictures, output, 2)
    assert not output.exists()
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint_of(output).values())


def test_spoiled_weights_are_not_saved(
    pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mine.safetensors"

    def spoil(run: Any) -> None:
        run.model.vqvae.slice(1, 0).codebook.bias.data[0, 0] = math.nan

    monkeypatch.setattr(step, "take", at_step(2, spoil))
    with pytest.raises(TrainingError, match=r"mine\.ckpt is not saved at step \d+: not all numbers of model\.vqvae\."):
        run(pictures, output, 1)
    assert not output.exists()
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint_of(output).values())


# The process


@pytest.mark.parametrize("world", [1, 2])
def test_settings_are_put_back(world: int) -> None:
    def settings() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.backends.cudnn.benchmark,
            process._flushes_subnormals(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            list(warnings.filters),
        )

    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = settings()
            with pytest.raises(LookupError), process.tuned(torch.device("cpu"), world, 0):
                assert not any(a == b for a, b in zip(before[:6], settings()[:6], strict=True))
                torch.rand(3)
                raise LookupError
            assert settings() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_is_the_same_whatever_the_caller_has_set(pictures: Path, tmp_path: Path, unmeasured: None) -> None:
    outputs = [tmp_path / f"{name}.safetensors" for name in "ab"]
    run(pictures, outputs[0], math.inf, crops=16)
    torch.set_default_dtype(torch.float64)
    state = torch.get_rng_state()
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            run(pictures, outputs[1], math.inf, crops=16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = map(checkpoint_of, outputs)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


SCRIPT = """
import sys
from pathlib import Path
from vqcodec.models.config import Config
from vqcodec.train import begin, export
from vqcodec.train import run as training
from vqcodec.train.schedule import Schedule

modules = {{"run": training, "begin": begin, "export": export}}
for name, value in {settings!r}.items():
    setattr(modules[name.partition(".")[0]], name.partition(".")[2], value)
if __name__ == "__main__":
    training.train(
        [Path(sys.argv[1])],
        Path(sys.argv[2]),
        config=Config.from_json({config!r}),
        minutes=float(sys.argv[3]),
        device="cpu",
        schedule={schedule!r},
    )
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "run.py"
    settings = {**BOOKKEEPING, "run.CHECKPOINT_SECONDS": 0.1}
    path.write_text(SCRIPT.format(settings=settings, schedule=SMALL, config=TINY.to_json()), encoding="utf-8")
    return path


@pytest.mark.slow
def test_kill(pictures: Path, tmp_path: Path, script: Path, small: None) -> None:
    output = tmp_path / "mine.safetensors"
    checkpoint = output.with_suffix(".ckpt")
    command = [sys.executable, str(script), str(pictures), str(output), "5"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1.5)
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    seen = run(pictures, output, 6, config=TINY, resume=True)
    assert seen[0].step > 0
    assert output.exists()


@pytest.mark.slow
def test_two_processes(pictures: Path, tmp_path: Path, script: Path) -> None:
    """Under torchrun, on gloo: both take the same steps, and one of them writes."""
    output = tmp_path / "mine.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(pictures), str(output), str(6 / 60)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    rows = log_of(output)
    assert rows[0]["step"] == 0 < rows[-1]["step"]
    assert len(rows) <= 6, "one process writes the log"
    assert rows[-1]["cost"] < rows[0]["cost"]
    assert weights_file.describe(output)["notes"]["processes"] == 2
    codec.compress(models.picture(40, 40), weights=output, verify=True)


@pytest.mark.gpu
def test_on_a_gpu(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All phases, each recorded; a CPU decodes what comes of it, and goes on with it."""
    output = tmp_path / "mine.safetensors"
    plan = dataclasses.replace(SMALL, kernel_rate=None, prior_at=0.6, joint_at=0.8, polish_from=0.9)
    monkeypatch.setattr(step, "COMPILING_PAYS", {"cuda": 0.0})
    run(pictures, output, 150, config=TINY, device="cuda", schedule=plan)  # about a minute of it compiles
    rows = log_of(output)
    assert rows[-1]["cost"] < rows[0]["cost"]
    codec.compress(models.picture(40, 40), weights=output, verify=True, device="cpu")
    run(pictures, output, 155, config=TINY, device="cpu", schedule=plan, resume=True)
    assert log_of(output)[-1]["step"] > rows[-1]["step"]


def compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on a CPU are compiled however short the run is."""
    monkeypatch.setattr(step, "COMPILING_PAYS", {"cpu": -math.inf})
    monkeypatch.setattr(step, "PACE_STEPS", 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's of itself
def test_steps_can_be_compiled_on_a_cpu(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come to the same, but for the noise."""
    told, costs = list[str](), []
    plan = dataclasses.replace(ROUNDING, prior_at=1.0)
    for name in ("plain", "compiled"):
        output = tmp_path / f"{name}.safetensors"
        run(pictures, output, math.inf, crops=200, schedule=plan, on_warning=told.append)  # compiles for a minute
        first, *_, last = log_of(output)
        assert last["crops"] >= 200 and last["cost"] != first["cost"]
        costs.append(last["cost"])
        compile_at_once(monkeypatch)
    assert told == []
    assert costs[1] == pytest.approx(costs[0], rel=0.05)


def test_a_run_needs_no_compiler(
    pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one it says so once, and goes on."""
    compile_at_once(monkeypatch)

    def compile_nothing(model: torch.nn.Module, **_: object) -> torch.nn.Module:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no C++ compiler\nsecond line")

        broken = copy.copy(model)
        broken.forward = fail  # type: ignore[method-assign]
        return broken

    monkeypatch.setattr(torch, "compile", compile_nothing)
    told: list[str] = []
    seen = run(pictures, tmp_path / "mine.safetensors", 1, schedule=ROUNDING, on_warning=told.append)
    assert told == ["steps cannot be compiled: no C++ compiler"]
    assert seen[-1].step > 3


# Phases


def test_rounding_comes_first(rounded: Run, taken_over: Run, pictures: Path, tmp_path: Path, unmeasured: None) -> None:
    """Until codebooks take over, neither they nor the prior learn; then only they do, and weights are a codec."""
    started = RateDistortion(LEAST).state_dict()  # seeded by nothing: only what does not depend on it is looked at
    tensors = checkpoint_of(rounded.output)
    assert any(name.startswith("model.rounding.") for name in tensors)
    assert bool(tensors["model.vqvae.stages.0.decoder.0.expand.weight"].any())
    books = [name for name in started if name.endswith(("codebook.vectors", "codebook.bias"))]
    assert books and all(torch.equal(tensors[f"model.{name}"], started[name]) for name in books)

    after = checkpoint_of(taken_over.output)
    assert not any(name.startswith("model.rounding.") for name in after)
    assert not torch.equal(after["model.prior.levels.1.start.curve"], tensors["model.prior.levels.1.start.curve"])
    kernel = "vqvae.stages.0.decoder.0.expand.weight"
    assert torch.equal(after[f"model.{kernel}"], after[f"average.{kernel}"]), "what was learned until then stands still"
    output = taken_over.copy(tmp_path)
    commitment = dataclasses.replace(LEAST, commitment=0.1)
    again = run(pictures, output, taken_over.seconds, schedule=ROUNDING, resume=True, config=commitment)
    assert again[-1].step == taken_over.seen[-1].step, "the commitment may change on the way"
    source = models.picture(70, 90, seed=200)
    data = codec.compress(source, weights=output, verify=True)
    assert psnr(source, codec.decode_picture(data, weights=output).pixels) > 20


RENDERS = ("decoder", "cell_decoder", "renderer")


def test_in_the_end_codes_stand_still(pictures: Path, tmp_path: Path, untuned: None) -> None:
    """Polishing from the first step on: encoder, estimates and codebooks stay as they are, decoder and prior learn."""
    output = tmp_path / "mine.safetensors"
    plan = dataclasses.replace(SMALL, polish_from=0.0, polish_rate=1.0)
    run(pictures, output, 1, config=TINY, schedule=plan)
    rows = log_of(output)
    assert rows[-1]["cost"] < rows[0]["cost"]
    learned = {name: tensor for name, tensor in checkpoint_of(output).items() if name.endswith("expand.weight")}
    for name, tensor in learned.items():  # zero at the start
        renders = name.startswith(tuple(f"model.vqvae.stages.0.{part}" for part in RENDERS))
        if name.startswith("model.vqvae"):
            assert bool(tensor.any()) == renders, name

    longer = dataclasses.replace(plan, polish_from=0.9)
    seen = run(pictures, output, 1.5, config=TINY, schedule=longer, resume=True)
    assert seen[-1].step > rows[-1]["step"]
    before, after = learned, checkpoint_of(output)
    encoder = [name for name in before if ".encoder." in name]
    assert encoder and all(torch.equal(after[name], before[name]) for name in encoder), "polishing goes on"


# What counts as error


def test_distortions(pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    output, shares = tmp_path / "mine.safetensors", []
    monkeypatch.setattr(training, "_learn", lambda r: shares.append(r.model.distortion.share))
    squared = dataclasses.replace(SMALL, visual_share=0.0)
    for distortion, schedule, share in (
        ("mse", SMALL, 0.0),
        ("visual", squared, 0.5),
        (None, None, 0.5),
        (None, squared, 0.0),
    ):
        run(pictures, output, 1, distortion=distortion, schedule=schedule)
        assert shares.pop() == share == weights_file.describe(output)["notes"]["visual_share"]


def test_a_resumed_run_keeps_its_distortion(pictures: Path, tmp_path: Path, unmeasured: None) -> None:
    """Another is refused; a checkpoint that does not know goes on by the schedule."""
    output = tmp_path / "mine.safetensors"

    def share(seconds: float, **options: Any) -> float:
        run(pictures, output, seconds, resume=output.exists(), **options)
        notes: float = weights_file.describe(output)["notes"]["visual_share"]
        return notes

    assert SMALL.visual_share == 0.5
    assert share(0.2, distortion="mse") == 0.0
    assert share(0.3) == 0.0, "of the checkpoint"
    assert share(0.4, distortion="mse") == 0.0
    with pytest.raises(TrainingError, match=r"mine\.ckpt is of a run on distortion mse, not visual: leave out --dist"):
        share(0.5, distortion="visual")
    path = output.with_suffix(".ckpt")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["facts"])
    assert facts.pop("visual_share") == 0.0
    save_file(load_file(path), path, {**metadata, "facts": json.dumps(facts)})
    assert share(0.6, schedule=dataclasses.replace(SMALL, visual_share=0.25)) == 0.25
    with pytest.raises(TrainingError, match="run on distortion with a visual share of 0.25, not mse"):
        share(0.7, distortion="mse")


def test_an_unknown_distortion(pictures: Path, tmp_path: Path, small: None) -> None:
    with pytest.raises(ValueError, match="distortion must be one of mse, visual, got 'pretty'"):
        run(pictures, tmp_path / "mine.safetensors", 1, distortion="pretty")
    assert list(tmp_path.iterdir()) == []


def test_a_judge(trained: Run, pictures: Path, tmp_path: Path, untuned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS is in the log from where on it is asked for, and has no part in the loss."""

    def distance(features: list[Path], device: torch.device, expected: str) -> Any:
        assert (features, device.type, expected) == ([Path("a.safetensors")], "cpu", "alex")

        def measure(restored: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled() and restored.shape == original.shape == (1, 3, 64, 64)
            assert torch.equal(restored, restored.round().clamp(0, 255))
            return (restored - original).square().mean((1, 2, 3))

        return measure

    monkeypatch.setattr(perceptual, "distance", distance)
    output = trained.copy(tmp_path)
    columns = [f"lpips_alex_{quality}" for quality in QUALITIES]
    assert not log_of(output)[0].keys() & set(columns)
    run(pictures, output, trained.seconds + 0.1, resume=True, judge=Path("a.safetensors"))
    with output.with_suffix(".csv").open(newline="") as file:
        first, *_, last = csv.DictReader(file)
    for name in columns:
        assert first[name] == ""
        mse = 255**2 / 10 ** (float(last[name.replace("lpips_alex", "psnr")]) / 10)
        assert float(last[name]) == pytest.approx(mse + 1 / 12, rel=0.05), "with the rounding to 8 bits"
    run(pictures, output, trained.seconds + 0.2, resume=True)  # and without it again


def test_a_judge_needs_its_packages(
    pictures: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(*_: object) -> None:
        raise ImportError("No module named 'lpips'")

    monkeypatch.setattr(perceptual, "distance", distance)
    with pytest.raises(TrainingError, match=r"No module named 'lpips' \(pip install 'vqcodec\[natural\]'\)"):
        run(pictures, tmp_path / "mine.safetensors", 1, judge=Path("a.safetensors"))


# Going on from weights


@pytest.mark.parametrize("plan", [SMALL, dataclasses.replace(SMALL, prior_at=0.4, joint_at=0.6)])
def test_start_from_weights(trained: Run, pictures: Path, tmp_path: Path, untuned: None, plan: Schedule) -> None:
    first, second = trained.copy(tmp_path), tmp_path / "second.safetensors"
    run(pictures, second, 0.7, start_from=first, schedule=plan)
    before, after = log_of(first), log_of(second)
    assert after[0]["step"] == 0
    assert after[0]["cost"] == pytest.approx(before[-1]["cost"], rel=0.03)
    assert after[0]["cost"] < before[0]["cost"]
    assert after[-1]["cost"] < before[0]["cost"]


def test_the_configuration_comes_with_the_weights(
    trained: Run, pictures: Path, tmp_path: Path, unmeasured: None
) -> None:
    """All of it, unless another commitment is asked for."""
    first, second, third = trained.output, tmp_path / "second.safetensors", tmp_path / "third.safetensors"
    expected = dataclasses.replace(LEAST, commitment=0.1)
    run(pictures, second, 0.1, start_from=first, config=expected)
    assert weights.load(second).config == expected
    run(pictures, third, 0.1, start_from=second, config=None)
    assert weights.load(third).config == expected


def test_residual_blocks_come_and_go(pictures: Path, tmp_path: Path, untuned: None) -> None:
    """As the configuration has them: those that weights do not have begin by adding nothing, and then learn."""

    def tiny(**changes: Any) -> Config:
        return dataclasses.replace(TINY, stages=(dataclasses.replace(TINY.stages[0], **changes), *TINY.stages[1:]))

    few, many = tiny(cells=None), tiny(decoder_blocks=2)
    first = models.save(models.tiny(few), tmp_path / "first.safetensors")
    second, third = tmp_path / "second.safetensors", tmp_path / "third.safetensors"
    run(pictures, second, 0.5, start_from=first, config=many, schedule=ROUNDING)
    run(pictures, third, 0.1, start_from=first, config=None, schedule=ROUNDING)
    assert (weights.load(second).config, weights.load(third).config) == (many, few)
    assert log_of(second)[0]["cost"] == pytest.approx(log_of(third)[0]["cost"], rel=1e-4)
    learned = checkpoint_of(second)
    for block in ("cell_encoder.blocks.1", "cell_decoder.blocks.0", "decoder.1"):
        assert learned[f"average.vqvae.stages.0.{block}.expand.weight"].any(), block
        assert not (learned[f"average.vqvae.stages.0.{block}.deviation"] == 1).any(), "measured on pictures"
    assert not torch.equal(learned["average.vqvae.stages.0.cell_encoder.basis"], torch.eye(48))
    run(pictures, third, 0.1, start_from=second, config=few, schedule=ROUNDING)
    assert weights.load(third).config == few, "and left out again"


def test_what_stood_in_for_the_prior_goes_on(
    taken_over: Run, pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint beside weights to the first of those trained on from them, unless it does not fit."""
    first, second = taken_over.copy(tmp_path), tmp_path / "second.safetensors"
    run(pictures, first, taken_over.seconds + 0.1, schedule=ROUNDING, resume=True)
    checkpoint = first.with_suffix(".ckpt")
    name = "levels.1.0.usual"
    learned = checkpoint_of(first)[f"average.rounding.{name}"]

    def start() -> torch.Tensor:
        """What a run from the first weights begins with."""
        seen: list[torch.Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(training, "_learn", lambda r: seen.append(r.model.rounding.state_dict()[name].clone()))
            patch.setattr(training, "export", lambda _: None)
            run(pictures, second, 1, start_from=first, schedule=ROUNDING)
        return seen[0]

    assert torch.equal(start(), learned)
    tensors = load_file(checkpoint)
    save_file({k: v[:1] if k == "average.rounding.levels.0.0.out.bias" else v for k, v in tensors.items()}, checkpoint)
    measured = start()
    assert not torch.equal(measured, learned)
    checkpoint.unlink()
    assert torch.equal(start(), measured)


def test_weights_go_on_by_their_own_schedule(
    trained: Run, pictures: Path, tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, asked = trained.output, []
    monkeypatch.setattr(Schedule, "onward", lambda plan: asked.append(plan) or SMALL)
    run(pictures, tmp_path / "second.safetensors", 0.1, start_from=first, schedule=None)
    assert asked == [Schedule()]
    run(pictures, tmp_path / "second.safetensors", 0.1, resume=True, schedule=None)
    assert asked == [Schedule()] * 2, "after an interruption too, whether or not they are given again"
    run(pictures, tmp_path / "third.safetensors", 0.1, start_from=first, schedule=SMALL)
    assert len(asked) == 2, "unless another is asked for"


# Errors


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("photo", "name, stages, prior"),
        (dataclasses.replace(TINY, name="mine", commitment=0.3), "name"),
        (dataclasses.replace(TINY, prior=PriorConfig(channels=24, embedding=16)), "prior"),
    ],
)
def test_weights_of_another_configuration(pictures: Path, tmp_path: Path, config: str | Config, fields: str) -> None:
    name = config if isinstance(config, str) else config.name
    with pytest.raises(
        TrainingError, match=rf"tiny\.safetensors has another configuration than '{name}', differing in {fields}$"
    ):
        run(pictures, tmp_path / "mine.safetensors", 1, start_from=models.tiny_weights(), config=config)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_on(tmp_path: Path, small: None) -> None:
    with pytest.raises(TrainingError, match="no pictures found"):
        run(tmp_path, tmp_path / "mine.safetensors", 1)
    for number in range(3):
        (tmp_path / f"{number}.png").write_text(f"no picture {number}")
    with pytest.raises(TrainingError, match="could be read"):
        run(tmp_path, tmp_path / "mine.safetensors", 1)
    assert not (tmp_path / "mine.safetensors").exists()


def test_junk_does_not_refuse_a_training_set(pictures: Path, tmp_path: Path, unmeasured: None) -> None:
    """Not even junk whose hash would put it into validation, before all pictures."""
    folder, told = shutil.copytree(pictures, tmp_path / "pictures"), []
    for number in itertools.count():
        junk = f"no picture {number}".encode()
        if hashlib.sha256(junk).digest() < min(hashlib.sha256(p.read_bytes()).digest() for p in folder.glob("?.png")):
            break
    (folder / "junk.png").write_bytes(junk)
    output = tmp_path / "mine.safetensors"
    run(folder, output, 0.2, on_warning=told.append)
    assert output.exists()
    (line,) = told
    assert "junk.png: " in line and line.endswith(": skipped, 1 so far")


def test_unknown_configuration_or_device(
    pictures: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mine.safetensors"
    with pytest.raises(WeightsError, match="no configuration 'huge'"):
        run(pictures, output, 1, config="huge")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="no CUDA device"):
        run(pictures, output, 1, device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_resume(pictures: Path, tmp_path: Path, small: None) -> None:
    output = tmp_path / "mine.safetensors"
    checkpoint = output.with_suffix(".ckpt")
    for content in (None, b"", b"garbage" * 100, models.tiny_weights().read_bytes()):
        if content is not None:
            checkpoint.write_bytes(content)
        with pytest.raises(TrainingError, match="cannot resume from .*mine.ckpt") as caught:
            run(pictures, output, 1, resume=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "other", "options"),
    [
        ({"config": "vqvae2"}, "'vqvae2', differing in .*stages, .*", "--config"),
        ({"config": None, "start_from": models.tiny_weights()}, "'tiny', differing in name, stages.*", "--from"),
        ({"config": TINY, "start_from": models.tiny_weights()}, "'tiny', .*", "--config and --from"),
    ],
    ids=["config", "from", "both"],
)
def test_a_checkpoint_of_another_configuration(
    trained: Run, pictures: Path, small: None, asked: dict[str, Any], other: str, options: str
) -> None:
    own = f"leave out {options} to go on with its own, 'least'"
    with pytest.raises(TrainingError, match=rf"mine\.ckpt is of another configuration than {other}: {own}$"):
        run(pictures, trained.output, 4, resume=True, **asked)


def test_a_checkpoint_knows_what_its_run_began_with(pictures: Path, tmp_path: Path, unmeasured: None) -> None:
    """Resumed with nothing but --resume, a warm start goes on with its configuration, commitment and schedule."""
    output, first = tmp_path / "mine.safetensors", tmp_path / "first.safetensors"
    run(pictures, first, 0.1, schedule=None)
    commitment = dataclasses.replace(LEAST, commitment=0.1)
    run(pictures, output, 0.1, start_from=first, config=commitment, schedule=None)

    def known() -> tuple[str, bool]:
        with safe_open(output.with_suffix(".ckpt"), framework="pt") as file:
            metadata = file.metadata()
        return metadata["config"], json.loads(metadata["facts"])["onward"]

    began = known()
    assert began == (commitment.to_json(), True)
    for seconds, asked in ((0.2, {}), (0.3, {"start_from": first})):
        first_step = log_of(output)[-1]["step"]
        seen = run(pictures, output, seconds, resume=True, config=None, schedule=None, **asked)
        assert seen[-1].step > first_step and known() == began


def test_a_checkpoint_that_has_no_configuration(trained: Run, pictures: Path, tmp_path: Path, small: None) -> None:
    path = trained.copy(tmp_path).with_suffix(".ckpt")
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()["facts"]
    save_file(load_file(path), path, {"facts": facts})
    with pytest.raises(TrainingError, match="not a checkpoint of a training run of this version"):
        run(pictures, tmp_path / trained.output.name, 4, resume=True)
