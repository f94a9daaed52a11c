"""What learns in which phase of a run."""

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from vqcodec.train import checkpoint
from vqcodec.train.codebooks import books_of
from vqcodec.train.schedule import Phase
from vqcodec.train.state import Run


def enter(run: Run, phase: Phase) -> None:
    """Begin a phase, or go on in it."""
    run.trained = run.model  # free of the hooks that DistributedDataParallel has on the parameters
    if phase is not Phase.ROUNDING and run.model.rounding is not None:
        _end_rounding(run)
    run.phase, run.recording, run.compiled = phase, None, False
    model, vqvae, books = run.model, run.model.vqvae, books_of(run.model.vqvae)
    rate_model = [parameter for book in books for parameter in book.rate_parameters()]
    if run.job.look_of:
        _learn_only(model, vqvae.renderer().values())
    elif model.rounding is not None:
        _learn_only(model, (vqvae, model.rounding))
        for book in books:
            book.requires_grad_(False)
    elif phase is Phase.PRIOR:
        _learn_only(model, (model.prior, *rate_model))
    elif phase is Phase.POLISH:
        _learn_only(model, (model.prior, *vqvae.renderer().values(), *rate_model))
    else:
        _learn_only(model, (vqvae, model.prior))
        for book in books:
            book.vectors.requires_grad_(book.learn == "gradient")
    run.trained = distributed(run, model)


def _end_rounding(run: Run) -> None:
    """Codebooks and prior take over, from the averaged weights of the rest."""
    assert run.average.rounding is not None
    run.rounding_learned = checkpoint.rounding_tensors(run.average.rounding)
    run.model.rounding = run.average.rounding = None
    run.model.vqvae.load_state_dict(run.average.vqvae.state_dict())
    run.average.load_state_dict(run.model.state_dict())
    run.averaged = run.step


def _learn_only(model: nn.Module, parts: Iterable[nn.Module | Tensor]) -> None:
    """Everything else stands still: optimisers pass over what gets no gradient."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


@contextlib.contextmanager
def shared(run: Run) -> Iterator[None]:
    """In the body, several processes may share gradients; afterwards nothing in the run holds on to their group."""
    try:
        yield
    finally:
        run.trained = run.model


def distributed(run: Run, model: nn.Module) -> nn.Module:
    """The model of a run, under several processes with shared gradients of what is trainable."""
    if run.job.world == 1:
        return model
    ids = [run.job.device.index] if run.job.device.type == "cuda" else None
    unused = not run.job.config.joint
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=unused)
