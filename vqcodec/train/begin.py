"""How a run begins: afresh, by the KLT start, or with trained weights (a warm start)."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from vqcodec import weights
from vqcodec.models.layers import channels_last
from vqcodec.models.model import Model
from vqcodec.train import checkpoint, codebooks, crops, validation
from vqcodec.train.start import start_from_pictures
from vqcodec.train.state import Run
from vqcodec.train.step import maintaining

START_CROPS = 64  # from which the start is computed


def open_weights(path: Path | None, output: Path, look: bool) -> Model | None:
    """The weights to begin with, if any.

    Args:
        path: their file. output: of the run.
        look: whether another look of them is trained. If `output` is one already, the weights render by it.

    Raises:
        WeightsError: not a readable weights file.
    """
    if path is None:
        return None
    given = weights.load(path)
    return weights.load(path, look=output) if look and weights.is_look_of(output, given.id) else given


def afresh(run: Run) -> None:
    """The KLT start; codebooks without a structured start come from data."""
    pixels = _start_crops(run)
    start_from_pictures(run.model.vqvae, pixels)
    if run.model.rounding is not None:
        run.model.rounding.start_from_pictures(run.model.vqvae, pixels)
    if not run.job.config.structured:
        with torch.no_grad(), maintaining(run.model, codebooks.start_by_k_means):
            run.model(pixels, torch.full((len(pixels),), 50))
    _start_files(run, _validate_first(run))


def with_weights(run: Run, given: Model, path: Path) -> None:
    """Go on from exported weights. The rate counts in full from the first step.

    Where rounding comes first, code vectors begin again as they do before all training. What stood in for the prior
    when these weights were trained goes on, if their checkpoint still lies beside them and it fits. Residual blocks
    that the weights do not have add nothing at first; those that only they have are left out.

    Args:
        given: the weights, and path: their file.
    """
    if run.job.config.stages != given.config.stages:
        start_from_pictures(run.model.vqvae, _start_crops(run))
    run.model.vqvae.load_state_dict(given.vqvae.state_dict(), strict=False)
    prior = copy.deepcopy(given.prior)
    prior.thaw()
    run.model.prior.load_state_dict(prior.state_dict())
    run.rate_start = 1.0
    rounding = run.model.rounding
    run.model.rounding = run.average.rounding = None
    first = _validate_first(run)  # the log begins with the weights as they are
    if rounding is not None:
        for book in codebooks.books_of(run.model.vqvae):
            codebooks.restart(book)
        rounding.start_from_pictures(run.model.vqvae, _start_crops(run))
        learned = checkpoint.rounding_of(path)
        if {k: v.shape for k, v in learned.items()} == {k: v.shape for k, v in rounding.state_dict().items()}:
            rounding.load_state_dict(learned)
        run.model.rounding = rounding
        run.average.rounding = copy.deepcopy(rounding).requires_grad_(False).eval()
        _start_average(run)
    _start_files(run, first)


def _start_crops(run: Run) -> Tensor:
    """Training crops, float (B, 3, H, W), 0..255, on the CPU; so is the model from here until it is averaged."""
    run.report("start")
    run.model.cpu()
    return crops.first(run.job, run.pictures, START_CROPS).permute(0, 3, 1, 2).float()


def _start_average(run: Run) -> None:
    """Take the model as it is for what learns, and for the average so far."""
    channels_last(run.model, run.job.device)
    run.average.load_state_dict(run.model.state_dict())


def _validate_first(run: Run) -> dict[str, float]:
    """Take the model as it is, and see what it does before it has learned anything: the first line of the log."""
    _start_average(run)
    if run.job.rank:
        return {}
    run.before = validation.restored(run)
    return validation.line_of(run)


def _start_files(run: Run, first: dict[str, float]) -> None:
    """Save the first checkpoint and then begin the log: wherever there is a log, the run can be resumed."""
    if run.job.rank == 0:
        checkpoint.save(run)
        validation.write_log(run, [first])
