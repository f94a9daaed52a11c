"""One optimisation step: gradients, optimisers, averages."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from vqcodec import precision
from vqcodec.models.layers import ResidualBlock
from vqcodec.models.quantizer import Codebook
from vqcodec.pictures.caught import caught_warnings
from vqcodec.train import codebooks, phases, process
from vqcodec.train.loss import RateDistortion
from vqcodec.train.optimisers import set_learning_rates
from vqcodec.train.recording import Recording
from vqcodec.train.state import PACE_STEPS, Run

# Where codebooks come from data: dead codes are moved every so many steps, in this share of the time before the prior's
# turn.
REVIVE_STEPS, REVIVE_SHARE = 50, 0.5
# Seconds of rounding to come from which compiling pays, by the type of device. It takes one minute, on a CPU three.
COMPILING_PAYS = {"cuda": 180.0, "cpu": 1800.0}
COMPILED_BLOCKS = 64  # more than there are sizes, types and layouts of what residual blocks get
RECENT = 0.02  # what the last step counts in moving averages of bits per pixel and PSNR


def take(run: Run, crops: Tensor, share: float) -> None:
    """Take one step.

    Args:
        crops: of this process, uint8 (B, H, W, 3). share: of the run's time that has passed, 0..1.
    """
    job, schedule = run.job, run.job.schedule
    rate_weight = schedule.rate_weight(share, run.rate_start)
    if not job.config.joint:
        turn, share = schedule.part(share)
        rate_weight = float(turn)
    set_learning_rates(run.optimisers, schedule.learning_rate(run.step, share))
    run.trained.train()
    quality = _qualities(run, len(crops))
    if job.device.type == "cuda" and job.world == 1 and job.config.joint:
        inputs = crops, quality, torch.tensor(rate_weight)
        if run.recording is None:
            run.recording = _record(run, [x.to(job.device) for x in inputs])
        recent, run.loss = run.recording(*inputs)
    else:
        if job.device.type == "cpu" and not run.compiled and _compiling_pays(run):
            _compile(run, crops, quality)
        revives = not job.config.structured and run.step % REVIVE_STEPS == 0
        revives = revives and share < REVIVE_SHARE and rate_weight < 1
        with maintaining(run.model, codebooks.revive if revives else None):
            weight = torch.tensor(rate_weight) if run.compiled else rate_weight  # a new number would be compiled anew
            recent, run.loss = _gradients(run, crops.to(job.device), quality.to(job.device), weight)
        means = process.sum_over_processes(torch.cat([recent, run.loss[None]]) / job.world)
        recent, run.loss = means[:2], means[2]
    run.lost = torch.where(run.loss.isfinite(), 0, run.lost + 1)
    for optimiser in run.optimisers.values():
        optimiser.step()
    run.step += 1
    run.crops += len(crops) * job.world
    run.recent = _follow(run.recent, recent)
    _average(run)


def _qualities(run: Run, count: int) -> Tensor:
    """Qualities of this process's crops, float (count,), 1..100.

    They are stratified over all processes: every step sees low and high ones.
    """
    total = count * run.job.world
    generator = torch.Generator().manual_seed((run.job.seed << 32) + run.step)
    places = (torch.randperm(total, generator=generator) + torch.rand(total, generator=generator)) / total
    return 1 + 99 * places[run.job.rank :: run.job.world] ** run.job.schedule.low_qualities


def _gradients(run: Run, crops: Tensor, quality: Tensor, rate_weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the loss, at most of the schedule's length; none where that is not finite.

    Args:
        crops: uint8 (B, H, W, 3). quality: float (B,). rate_weight: as of `RateDistortion.forward`.

    Returns:
        bits per pixel and PSNR (2,), and the loss.
    """
    run.model.zero_grad(set_to_none=True)
    pixels = crops.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
    with precision.autocast(run.job.device):
        losses = run.trained(pixels, quality, rate_weight)
    # Torch would do this itself, but not inside of another autocast: the next step would see the weights of this one.
    torch.clear_autocast_cache()
    losses.total.backward()
    for weights in run.clipped:
        nn.utils.clip_grad_norm_(weights, run.job.schedule.clip_norm)
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    ratio = (10 * torch.log10(255**2 / losses.mse.clamp(min=1e-3))).mean()
    return torch.stack([losses.bpp.mean(), ratio]), losses.total.detach()


def _record(run: Run, inputs: Sequence[Tensor]) -> Recording[tuple[Tensor, Tensor]]:
    """`_gradients` of such inputs, recorded on a GPU.

    While rounding for long, residual blocks are compiled, which takes a minute and saves a third of a step's time.
    Without a compiler the run goes on as it is.
    """

    def work(*x: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(run, *x)

    if _compiling_pays(run):
        for block in run.model.modules():
            if isinstance(block, ResidualBlock):
                block.compile(dynamic=False)
        try:
            with torch._dynamo.config.patch(cache_size_limit=COMPILED_BLOCKS):
                return Recording(work, inputs)
        except (RuntimeError, OSError) as error:
            if run.job.on_warning:
                run.job.on_warning(f"residual blocks cannot be compiled: {str(error).strip().splitlines()[0]}")
    with torch.compiler.set_stance("force_eager"):
        return Recording(work, inputs)


def _compile(run: Run, crops: Tensor, quality: Tensor) -> None:
    """Compile the model on a CPU for such crops and qualities: a step takes up to two fifths less time.

    Without a compiler the run goes on as it is.
    """
    run.trained, run.compiled = run.model, True  # free of hooks, see phases.py
    try:
        with caught_warnings():  # torch's of itself
            compiled: nn.Module = torch.compile(run.model, dynamic=False)  # type: ignore[assignment]
            run.trained = phases.distributed(run, compiled)
            _gradients(run, crops, quality, torch.tensor(1.0))
    except (RuntimeError, OSError) as error:
        run.trained = run.model
        run.trained = phases.distributed(run, run.model)
        if run.job.on_warning:
            run.job.on_warning(f"steps cannot be compiled: {str(error).strip().splitlines()[0]}")


def _compiling_pays(run: Run) -> bool:
    """Whether rounding goes on for so long that it is worth compiling."""
    job = run.job
    if run.model.rounding is None or (job.device.type == "cpu" and run.step < PACE_STEPS):
        return False
    left = run.seconds_until(job.schedule.prior_at)
    if job.crops:
        left = min(left, run.sitting + job.seconds - run.spent)
    return left > COMPILING_PAYS[job.device.type]


@contextlib.contextmanager
def maintaining(model: RateDistortion, work: Callable[[Codebook, Tensor], object] | None) -> Iterator[None]:
    """In forward passes of the body, do this to each codebook without a structured start and its vectors (N, P, D)."""
    if work is not None:
        model.maintain = lambda book, v: None if book.config.structured else work(book, v)
    try:
        yield
    finally:
        model.maintain = None


def _follow(averages: Tensor, values: Tensor) -> Tensor:
    """Exponential moving averages; what is nan does not count."""
    moved = averages.lerp(values, RECENT)
    return torch.where(averages.isnan(), values, torch.where(values.isnan(), averages, moved))


@torch.no_grad()
def _average(run: Run) -> None:
    """Let the exponential moving average of the weights follow a step; its memory grows up to the schedule's."""
    count = run.step - run.averaged
    decay = min(run.job.schedule.average_decay, (1 + count) / (10 + count))
    means: list[Tensor] = list(run.average.parameters())
    values: list[Tensor] = list(run.model.parameters())
    torch._foreach_lerp_(means, values, 1 - decay)
    torch._foreach_copy_(list(run.average.buffers()), list(run.model.buffers()))
