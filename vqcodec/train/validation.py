"""What the averaged weights do on the validation crops: lines of the log (.csv), and a sheet of pictures (.png)."""

import contextlib
import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqcodec import files, image, precision
from vqcodec.errors import TrainingError
from vqcodec.metrics import ms_ssim
from vqcodec.ssimulacra2 import score
from vqcodec.train import data
from vqcodec.train.codebooks import perplexity
from vqcodec.train.loss import Losses, RateDistortion
from vqcodec.train.state import Run
from vqcodec.visual import visual_distance

VALIDATION_QUALITIES = (10, 30, 50, 70, 90)
VALIDATION_BATCH = 8
SHEET_PICTURES, SHEET_QUALITY = 6, 30


def validate(run: Run) -> None:
    """Append a line to the log."""
    line = line_of(run)
    write_log(run, [*_log(run, run.step), line])


def line_of(run: Run) -> dict[str, float]:
    """What the averaged weights do now, as a line of the log."""
    run.report("validate")
    row: dict[str, float] = {"step": run.step, "crops": run.crops, "minutes": round(run.spent / 60, 2)}
    row |= {"gpu": int(run.job.device.type == "cuda"), **measure(run, run.average)}
    row["perplexity"] = round(perplexity(run.model.vqvae), 2)
    return row


def shorten_log(run: Run) -> None:
    """Drop the lines of the log that came after the run's step: after an interruption these steps are lost."""
    if rows := _log(run, run.step + 1):
        write_log(run, rows)


def _log(run: Run, end: int) -> list[dict[str, Any]]:
    """The lines of the log before a step."""
    path = run.job.output.with_suffix(".csv")
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [row for row in csv.DictReader(file) if int(row["step"]) < end]
        except (KeyError, TypeError, ValueError):
            raise TrainingError(f"{path} is not the log of a training run") from None


def write_log(run: Run, rows: list[dict[str, Any]]) -> None:
    file = io.StringIO(newline="")
    # A run that is resumed may log more than before, or less.
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    files.write_atomically(run.job.output.with_suffix(".csv"), file.getvalue().encode())


@torch.no_grad()
def measure(run: Run, model: RateDistortion, autocast: bool = True) -> dict[str, float]:
    """Means over the validation crops at a few qualities.

    Args:
        model: what to measure. autocast: whether it runs in the precision of training.

    Returns:
        bpp, psnr, cost (bpp + lambda * squared error) and measures of likeness at each quality q, as "bpp_q" and so on;
        and "cost", the geometric mean of the costs, in which a gain of one percent counts alike at every quality.
    """
    row: dict[str, float] = {}
    total, count = 0.0, len(run.validation)
    for quality in VALIDATION_QUALITIES:
        bpp, ratio, cost = 0.0, 0.0, 0.0
        likeness: dict[str, float] = {}
        for start in range(0, count, VALIDATION_BATCH):
            crops = run.validation[start : start + VALIDATION_BATCH]
            losses = _forward(run, model, crops, quality, autocast)
            bpp += float(losses.bpp.sum())
            cost += float(losses.cost.sum())
            ratio += float((10 * torch.log10(255**2 / losses.mse.clamp(min=1e-3))).sum())
            for name, value in _likeness(run, losses, crops).items():
                likeness[name] = likeness.get(name, 0.0) + value
        row[f"bpp_{quality}"] = round(bpp / count, 5)
        row[f"psnr_{quality}"] = round(ratio / count, 4)
        row[f"cost_{quality}"] = round(cost / count, 5)
        row |= {f"{name}_{quality}": round(value / count, 5) for name, value in likeness.items()}
        total += math.log(cost / count)
    row["cost"] = round(math.exp(total / len(VALIDATION_QUALITIES)), 5)
    return row


def _likeness(run: Run, losses: Losses, crops: Sequence[data.Pixels]) -> dict[str, float]:
    """Sums over crops of what says how alike restored pictures look, as 8-bit pictures."""
    restored = losses.reconstruction.round()
    original = _pixels(run, crops)
    sums = visual_distance(restored, original).tolist()
    found = {
        "ssimulacra2": sum(map(score, sums)),
        "ms_ssim": sum(ms_ssim(a, b) for a, b in zip(crops, _pictures(restored), strict=True)),
    }
    if run.job.look_of:
        found["lpips"] = float(losses.perceptual.sum())
    if run.judge is not None:
        found["lpips_alex"] = float(run.judge(restored, original).sum())
    return found


@torch.no_grad()
def restored(run: Run) -> list[data.Pixels]:
    """The crops of the sheet as the averaged weights restore them, uint8 (H, W, 3)."""
    losses = _forward(run, run.average, run.validation[:SHEET_PICTURES], SHEET_QUALITY, autocast=True)
    return _pictures(losses.reconstruction.round())


def write_sheet(run: Run) -> None:
    """Rows: original, before training, after; columns: validation crops."""
    original, after = run.validation[:SHEET_PICTURES], restored(run)
    before = run.before or [np.full_like(p, 128) for p in original]
    rows = [np.concatenate(list(row), axis=1) for row in (original, before, after)]
    sheet = image.Picture(np.concatenate(rows, axis=0))
    files.write_atomically(run.job.output.with_suffix(".png"), image.save(sheet, ".png"))


def _forward(run: Run, model: RateDistortion, crops: Sequence[data.Pixels], quality: int, autocast: bool) -> Losses:
    pixels = _pixels(run, crops)
    with precision.autocast(run.job.device) if autocast else contextlib.nullcontext():
        losses: Losses = model(pixels, torch.full((len(crops),), quality, device=run.job.device))
    return losses


def _pixels(run: Run, crops: Sequence[data.Pixels]) -> Tensor:
    """Crops as float (B, 3, H, W), 0..255, on the device."""
    pixels = torch.from_numpy(np.stack(crops)).to(run.job.device).permute(0, 3, 1, 2).float()
    return pixels.contiguous(memory_format=torch.channels_last)


def _pictures(restored: Tensor) -> list[data.Pixels]:
    """The inverse of `_pixels`, for whole numbers."""
    return list(restored.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
