"""Training as one function: pictures in, weights file out.

    start    KLT start from training crops
    round    the tokenizer on the rate-distortion loss, rounding in the place of codebooks and prior
    prior    codebooks take over; the prior learns their codes, under fake quantisation
    joint    all together
    polish   prior and decoder for codes that stand still
    export   the averaged weights, the prior as integers, validated as they will run; the visual tuning of the encoder

Another look of given weights is trained the same way, except that only what turns codes into pixels learns.

The schedule follows the clock: see schedule.py. A checkpoint beside the output survives any interruption; `resume` goes on from it. Under
torchrun the same function trains data-parallel, one process a device.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from vqcodec import precision, tuning, weights
from vqcodec.errors import TrainingError
from vqcodec.metrics import ms_ssim
from vqcodec.models.config import Config
from vqcodec.models.model import Model
from vqcodec.models.quantizer import Codebook
from vqcodec.models.recipes import load_config
from vqcodec.models.vqvae import Linear1x1, ResidualBlock, channels_last
from vqcodec.ssimulacra2 import score
from vqcodec.train import codebooks, data, perceptual, sensitivity
from vqcodec.train.loss import Losses, RateDistortion
from vqcodec.train.muon import Muon
from vqcodec.train.recording import Recording
from vqcodec.train.rounding import Rounding
from vqcodec.train.schedule import LOOK, SCHEDULES, Phase, Schedule
from vqcodec.train.start import start_from_pictures
from vqcodec.train.warm_start import load_networks
from vqcodec.visual import visual_distance

CHECKPOINT_SECONDS = 180
REPORT_SECONDS = 2.0
VALIDATIONS = 9  # a run, evenly spaced in time
VALIDATION_PICTURES, VALIDATION_BATCH = 32, 8
START_CROPS = 64  # from which the start is computed
TUNING_CROPS = 16  # on which the visual tuning is measured
SHEET_PICTURES, SHEET_QUALITY = 6, 30
# Where codebooks come from data: dead codes are moved every so many steps, in this share of the time before the prior's turn.
REVIVE_STEPS, REVIVE_SHARE = 50, 0.5
# What a checkpoint holds besides tensors.
FACTS = ("step", "spent", "rate_start", "phase", "averaged", "onward")
VALIDATION_QUALITIES = (10, 30, 50, 70, 90)
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Crops a step of a GPU: with fewer, most of it would be idle.
GPU_BATCH = 64
COMPILING_PAYS = 180.0  # seconds of rounding to come
COMPILED_BLOCKS = 64  # more than there are sizes, types and layouts of what residual blocks get
ROUNDING = "average.rounding."  # in checkpoints, and kept there when rounding has ended


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: "start", "train", "validate" or "export". step: optimiser steps done.
        elapsed, remaining: seconds of the run's budget.
        bpp, psnr: moving averages over training crops of all qualities (bits per pixel, dB). loss: of the last step.
        perplexity: codes in effective use per plane, averaged over planes.
    """

    stage: str
    step: int
    elapsed: float
    remaining: float
    bpp: float
    psnr: float
    loss: float
    perplexity: float


def train(
    pictures: Sequence[Path],
    output: Path,
    *,
    config: str | Path | Config | None = None,
    minutes: float = 180,
    resume: bool = False,
    device: str = "auto",
    seed: int = 0,
    start_from: Path | None = None,
    features: Path | None = None,
    distortion: str | None = None,
    judge: Path | None = None,
    schedule: Schedule | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> None:
    """Train a model on pictures and write a weights file.

    Beside `output` lie the checkpoint (.ckpt, removed by nobody), the log (.csv: one line a validation) and a sheet
    of validation pictures before and after (.png).

    Args:
        pictures: files and folders. output: the weights file, .safetensors.
        config: a configuration, the name of one, or a JSON file; None for "photo", or that of `start_from`, from which
            only the commitment may differ. minutes: budget
            of the whole run, earlier parts included.
        resume: go on from the checkpoint. device: "auto", "cpu" or "cuda". seed: of crops and initial weights.
        start_from: a weights file to train on from, instead of from scratch.
            Where training begins with rounding, codebooks begin again as integers; what stood in for the prior when these weights were
            trained goes on if their checkpoint still lies beside them.
        features: of the network of LPIPS that says how alike pictures look, SqueezeNet 1.1 as safetensors: train the natural look
            of the weights `start_from`, in a file of its own. Where `output` is a look of these weights already, it goes on from
            that. Needs the packages lpips and torchvision.
        distortion: "mse", or "visual" for half squared error and half SSIMULACRA2 (distortion.py); None for what the schedule says,
            "visual" for the photo model. judge: features of AlexNet as safetensors: the log has LPIPS as well. Needs the same packages.
        schedule: learning rates, batches and crops; None for the usual one of the configuration.
        on_progress, on_warning: called now and then with a `Progress`, and with one line for each picture skipped.

    Raises:
        TrainingError: no pictures, no such device, no checkpoint to resume from, or one of another configuration; weights
            of another configuration; features
            without weights to start from, or without the packages.
        ValueError: no such distortion.
        WeightsError: unknown configuration; unreadable features.
    """
    given = weights.load(start_from) if start_from else None
    if given and start_from and features and weights.is_look_of(output, given.id):
        given = weights.load(start_from, look=output)
    settings = config if isinstance(config, Config) else load_config(str(config or "photo"))
    if given and config is None:
        settings = given.config
    elif given and features is None and (fields := _differences(settings, given.config)):
        raise TrainingError(f"{start_from} has another configuration than {settings.name!r}, differing in {fields}")
    if features is not None:
        if given is None:
            raise TrainingError("a look needs the weights that it is for")
        settings = given.config if given.looks else given.config.look()
    with _process_group() as (rank, world):
        target = _device(device, rank)
        torch.manual_seed(seed)
        plan = schedule or (LOOK if features else SCHEDULES.get(settings.name, Schedule()))
        if target.type == "cuda" and not schedule:
            plan = plan.with_batch(GPU_BATCH * world)
        if distortion is not None:
            plan = plan.with_distortion(distortion)
        if settings.rate == "after":  # the prior has its own part of the time already
            plan = dataclasses.replace(plan.without_rounding(), joint_rate=1.0, polish_from=1.0)
        elif not settings.structured:
            plan = dataclasses.replace(plan.without_rounding(), joint_rate=1.0)
        run = _Run(settings, plan, output, target, rank, world, minutes * 60, seed, on_progress, on_warning)
        run.onward = given is not None and plan.prior_at > 0 and not schedule
        if given and features:
            run.only_look(given, features)
        if judge:
            run.judge = _lpips(lambda: perceptual.distance("alex", judge, target))
        paths = data.find_pictures(pictures)
        if resume:
            run.load()
        if run.onward:
            run.schedule = plan.onward()
        run.open_data(paths)
        if given and start_from and not resume:
            run.start_from(given, start_from)
        elif not resume:
            run.start_fresh()
        run.loop()
        if rank == 0:
            run.export()


class _process_group:  # noqa: N801 (used as a function)
    """Joins the process group that torchrun announces, if it does: yields (rank, world size)."""

    def __enter__(self) -> tuple[int, int]:
        self.joined = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if not self.joined:
            return 0, 1
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backends, timeout=timedelta(minutes=20))
        return distributed.get_rank(), distributed.get_world_size()

    def __exit__(self, *_: object) -> None:
        if self.joined:
            distributed.destroy_process_group()


def _device(name: str, rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("no CUDA device is available")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    return torch.device(name)


def _optimisers(model: RateDistortion, schedule: Schedule) -> dict[str, torch.optim.Optimizer]:
    """Adam, and Muon for the weights of convolutions if it has a rate; each group with its peak learning rate."""
    klt = [p for m in model.modules() if isinstance(m, Linear1x1) for p in m.parameters()]
    muon = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)] if schedule.kernel_rate else []
    known = {id(p) for p in [*klt, *muon]}
    prior = [p for p in model.prior.parameters() if id(p) not in known]
    known |= {id(p) for p in prior}
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [
        {"params": others, "peak": schedule.rate},
        {"params": klt, "peak": schedule.klt_rate},
        {"params": prior, "peak": schedule.prior_rate},
    ]
    optimisers: dict[str, torch.optim.Optimizer] = {
        "adam": torch.optim.Adam([g for g in groups if g["params"]], schedule.rate, betas=(0.9, 0.99), fused=True)
    }
    if schedule.kernel_rate:
        optimisers["muon"] = Muon([{"params": muon, "peak": schedule.kernel_rate}], schedule.kernel_rate)
    return optimisers


def _differences(asked: Config, given: Config) -> str:
    """The fields in which two configurations differ; the commitment may."""
    names = (field.name for field in dataclasses.fields(Config) if field.name != "commitment")
    return ", ".join(name for name in names if getattr(asked, name) != getattr(given, name))


def _lpips(load: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        return load()
    except ImportError as error:
        raise TrainingError(f"{error} (pip install 'vqcodec[natural]')") from None


def _stood_in(checkpoint: Path) -> dict[str, Tensor]:
    """What stood in for the prior in the run of a checkpoint; nothing if there is none."""
    try:
        with safe_open(checkpoint, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(ROUNDING)]  # noqa: SIM118 (not a dict)
            return {name.removeprefix(ROUNDING): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return {}


def _follow(averages: Tensor, values: Tensor) -> Tensor:
    """Moving averages; what is nan does not count."""
    return torch.where(averages.isnan(), values, torch.where(values.isnan(), averages, averages.lerp(values, 0.02)))


def _keep_memory() -> None:
    """Let the process keep what it frees: the C library of Linux would hand large tensors back to the system, which clears
    their memory again at every step (a fifth of the time, where measured)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of another C library, or none
        for parameter, value in ((MALLOC_MMAP_THRESHOLD, 1 << 25), (MALLOC_TRIM_THRESHOLD, (1 << 31) - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


class _Run:
    """The state of one training run; its methods are the stages that `train` names."""

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        output: Path,
        device: torch.device,
        rank: int,
        world: int,
        budget: float,
        seed: int,
        on_progress: Callable[[Progress], None] | None,
        on_warning: Callable[[str], None] | None,
    ) -> None:
        self.config, self.schedule, self.output, self.device = config, schedule, output, device
        self.rank, self.world, self.budget, self.seed = rank, world, budget, seed
        self.on_progress = on_progress if rank == 0 else None
        self.on_warning = on_warning if rank == 0 else None
        model = RateDistortion(config, visual_share=schedule.visual_share)
        if schedule.prior_at:
            model.rounding = Rounding(config)
        self.model = channels_last(model, device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimisers = _optimisers(self.model, schedule)
        self.look_of = ""  # id of the weights, in hexadecimal, of which another look is trained
        self.step, self.spent = 0, 0.0
        self.phase = schedule.phase(0.0)
        self.averaged = 0  # the step from which on weights are averaged
        self.onward = False  # whether the run began with weights that were good already
        self.stood_in: dict[str, Tensor] = {}  # what rounding had learned at its end
        self.rate_start = schedule.rate_start
        # Kept where the model is, so that no step waits for numbers: moving averages of bits per pixel and PSNR; the last loss.
        self.recent, self.loss = torch.full((2,), math.nan, device=device), torch.tensor(math.nan)
        self.recording: Recording[tuple[Tensor, Tensor]] | None = None  # for this phase and size of crops
        self.judge: Callable[[Tensor, Tensor], Tensor] | None = None  # LPIPS, for the log alone
        self.before: list[data.Pixels] = []  # validation crops as the untrained model decodes them
        self.validation: list[data.Pixels] = []

    # Stages

    def only_look(self, given: Model, features: Path) -> None:
        """Train what turns the codes of given weights into pixels, and export nothing else."""
        self.look_of = given.id.hex()
        distance = _lpips(lambda: perceptual.distance("squeeze", features, self.device))
        self.model.perceptual = self.average.perceptual = distance

    def open_data(self, paths: list[Path]) -> None:
        training, held = data.split(paths, VALIDATION_PICTURES)
        self.pictures = data.Pictures(training, self.on_warning, data.CACHE_BYTES // self.world)
        rng = np.random.default_rng(0)
        size = self.schedule.crop_side(0, self.config.multiple)
        if self.rank:
            return  # the first process validates
        reserved = data.Pictures(held, self.on_warning, cache_bytes=0)
        pictures = (reserved.get(i) for i in range(len(held)))
        # Copies: a crop is a view that would keep its whole picture in memory.
        self.validation = [data.crop(p, size, rng, self.schedule.mirror).copy() for p in pictures if p is not None]
        if not self.validation:
            raise TrainingError("none of the pictures set aside for validation could be read")

    def start_from(self, given: Model, path: Path) -> None:
        """Continue from exported weights, read from `path`; the rate counts in full from the first step."""
        load_networks(self.model.vqvae, given.vqvae)
        prior = copy.deepcopy(given.prior)
        prior.thaw()
        self.model.prior.load_state_dict(prior.state_dict())
        self.rate_start = 1.0
        rounding = self.model.rounding
        self.model.rounding = self.average.rounding = None
        self._begin()  # the log begins with the weights as they are
        if rounding is not None:
            for book in self._books():
                codebooks.restart(book)
            rounding.start_from_pictures(self.model.vqvae, self._start_crops())
            stood_in = _stood_in(path.with_suffix(".ckpt"))
            if {k: v.shape for k, v in stood_in.items()} == {k: v.shape for k, v in rounding.state_dict().items()}:
                rounding.load_state_dict(stood_in)
            self.model.rounding = rounding
            self.average.rounding = copy.deepcopy(rounding).requires_grad_(False).eval()
            self._take()

    def start_fresh(self) -> None:
        """The KLT start."""
        pixels = self._start_crops()
        start_from_pictures(self.model.vqvae, pixels)
        if self.model.rounding is not None:
            self.model.rounding.start_from_pictures(self.model.vqvae, pixels)
        if not self.config.structured:
            with torch.no_grad(), self._maintenance(codebooks.start_by_k_means):
                self.model(pixels, torch.full((len(pixels),), 50))
        self._begin()

    def _start_crops(self) -> Tensor:
        """Training crops (B, 3, H, W), 0..255, on the CPU as the model is until it begins."""
        self._report("start")
        self.model.cpu()
        return self._crops(START_CROPS).permute(0, 3, 1, 2).float()

    def _crops(self, count: int) -> Tensor:
        """Training crops, uint8 (B, H, W, 3)."""
        size = self.schedule.crop_side(0, self.config.multiple)
        mirror = self.schedule.mirror
        stream = data.batches(self.pictures, batch=count, size=size, seed=self.seed, mirror=mirror)
        crops = next(stream)
        stream.close()  # type: ignore[attr-defined]
        return crops

    def _books(self) -> list[Codebook]:
        return [book for book in self.model.vqvae.modules() if isinstance(book, Codebook)]

    def _take(self) -> None:
        """The model as it is now is what learns, and the average of it so far."""
        channels_last(self.model, self.device)
        self.average.load_state_dict(self.model.state_dict())

    def _begin(self) -> None:
        self._take()
        if self.rank == 0:
            self.before = self._sheet_row()
            self._validate()

    def loop(self) -> None:
        """Optimise until the budget is spent."""
        after = self.config.rate == "after"
        trained = self._enter(self.phase)
        # A 1x1 weight has the same layout under both names; DistributedDataParallel takes them for different.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.set_flush_denormal(True)  # subnormal products slow CPUs down several times and mean nothing here
        _keep_memory()
        begun = time.monotonic() - self.spent
        reported = saved = validated = time.monotonic()
        stream: Iterator[Any] | None = None
        side = 0
        while True:
            share = self._agree((time.monotonic() - begun) / self.budget)
            self.spent = time.monotonic() - begun
            if share >= 1:
                break
            share = max(share, self.schedule.begins(self.phase))  # what was given more time goes on where it was
            if self.schedule.phase(share) > self.phase:
                del trained  # with its hooks on the parameters
                trained = self._enter(self.schedule.phase(share))
            if stream is None or side != self.schedule.crop_side(share, self.config.multiple):
                side = self.schedule.crop_side(share, self.config.multiple)
                stream, self.recording = self._batches(side), None
            rate_weight = self.schedule.rate_weight(share, self.rate_start)
            if after:
                turn, share = self.schedule.part(share)
                rate_weight = float(turn)
            self._set_rates(share)
            revive = (
                not self.config.structured
                and self.step % REVIVE_STEPS == 0
                and share < REVIVE_SHARE
                and rate_weight < 1
            )
            self._optimise(trained, next(stream), rate_weight, revive)
            now = time.monotonic()
            if self.rank == 0 and now - reported > REPORT_SECONDS:
                reported = now
                self._report("train")
            if self.rank == 0 and now - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
            if self.rank == 0 and now - validated > self.budget / VALIDATIONS:
                self._validate()
                validated = time.monotonic()
        if self.rank == 0:
            self._validate()
            self._save()

    def export(self) -> None:
        """Write the weights file and the sheet."""
        self._report("export")
        self._write_sheet()
        notes = {
            "minutes": round(self.spent / 60, 1),
            "steps": self.step,
            "processes": self.world,
            "pictures": len(self.pictures),
            "visual_share": self.schedule.visual_share,
            "trained": self._measure(self.average),
        }
        path = self.output
        if self.look_of:
            weights.save_look(path, self.config, self.average.vqvae, self.look_of, notes)
            return
        beside = tuning.path_of(path)
        beside.unlink(missing_ok=True)  # of older weights of this name
        weights.save_model(path, self.config, self.average.vqvae, self.average.prior, notes)
        # As it will run: half precision, integers, no autocast.
        model = weights.load(path)
        exported = RateDistortion(self.config, model.vqvae, model.prior).eval()
        notes["exported"] = self._measure(exported.to(self.device), autocast=False)
        weights_id = weights.save_model(path, self.config, self.average.vqvae, self.average.prior, notes)
        if self.config.rate == "joint":
            crops = [pixels.numpy() for pixels in self._crops(TUNING_CROPS)]
            sensitivity.measure(weights.load(path, self.device.type), crops).save(beside, weights_id)

    # One step

    def _distributed(self) -> nn.Module:
        """The model, under several processes with shared gradients of what is trainable."""
        if self.world == 1:
            return self.model
        ids = [self.device.index] if self.device.type == "cuda" else None
        unused = self.config.rate == "after"
        return nn.parallel.DistributedDataParallel(self.model, device_ids=ids, find_unused_parameters=unused)

    def _enter(self, phase: Phase) -> nn.Module:
        """Begin a phase, or go on in it: what learns, as one module."""
        if phase is not Phase.ROUNDING and self.model.rounding is not None:
            self._end_rounding()
        self.phase = phase
        self.recording = None
        vqvae = self.model.vqvae
        books = self._books()
        biases = [book.bias for book in books]  # of the rate model
        if self.look_of:
            self._learn_only(vqvae.renderer().values())
        elif self.model.rounding is not None:
            self._learn_only((vqvae, self.model.rounding))
            for book in books:
                book.requires_grad_(False)
        elif phase is Phase.PRIOR:
            self._learn_only((self.model.prior, *biases))
        elif phase is Phase.POLISH:
            self._learn_only((self.model.prior, *vqvae.renderer().values(), *biases))
        else:
            self._learn_only((vqvae, self.model.prior))
            for book in books:
                book.vectors.requires_grad_(book.learn == "gradient")
        return self._distributed()

    def _end_rounding(self) -> None:
        """Codebooks and prior take over, from the averaged weights of the rest."""
        assert self.average.rounding is not None
        self.stood_in = {f"{ROUNDING}{k}": v for k, v in self.average.rounding.state_dict().items()}
        self.model.rounding = self.average.rounding = None
        self.model.vqvae.load_state_dict(self.average.vqvae.state_dict())
        self.average.load_state_dict(self.model.state_dict())
        self.averaged = self.step

    def _learn_only(self, parts: Iterable[nn.Module | Tensor]) -> None:
        """Everything else stands still: optimisers pass over what gets no gradient."""
        self.model.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)

    def _batches(self, side: int) -> Iterator[Any]:
        batch = self.schedule.crops_a_step(side, self.world)
        # Every process, every resumption and every size of crops draws its own.
        seed = self.seed + 1000 * self.rank + self.step + (side << 20)
        gpu = self.device.type == "cuda"
        threads = min(16, os.cpu_count() or 1) if gpu else 1
        mirror = self.schedule.mirror
        return data.batches(
            self.pictures, batch=batch, size=side, seed=seed, threads=threads, mirror=mirror, pinned=gpu
        )

    def _agree(self, share: float) -> float:
        """All processes must take the same number of steps: the first one's clock counts."""
        if self.world == 1:
            return share
        clock = torch.tensor([share], device=self.device)
        distributed.broadcast(clock, 0)
        return float(clock)

    def _set_rates(self, share: float) -> None:
        rate = self.schedule.learning_rate(self.step, share)
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate

    @contextlib.contextmanager
    def _maintenance(self, work: Callable[[Codebook, Tensor], object] | None) -> Iterator[None]:
        """In forward passes of the body, do this to each codebook that has no structured start."""
        if work is not None:
            self.model.maintain = lambda book, v: None if book.config.structured else work(book, v)
        try:
            yield
        finally:
            self.model.maintain = None

    def _optimise(self, trained: nn.Module, crops: Tensor, rate_weight: float, revive: bool) -> None:
        trained.train()
        # Stratified over all processes: every step sees low and high qualities.
        count = len(crops) * self.world
        generator = torch.Generator().manual_seed((self.seed << 32) + self.step)
        places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        quality = 1 + 99 * places[self.rank :: self.world] ** self.schedule.low_qualities
        if self.device.type == "cuda" and self.world == 1 and self.config.rate == "joint" and self.config.structured:
            inputs = crops, quality, torch.tensor(rate_weight)
            if self.recording is None:
                self.recording = self._record(trained, [x.to(self.device) for x in inputs])
            recent, self.loss = self.recording(*inputs)
        else:
            with self._maintenance(codebooks.revive if revive else None):
                recent, self.loss = self._gradients(
                    trained, crops.to(self.device), quality.to(self.device), rate_weight
                )
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.step += 1
        self.recent = _follow(self.recent, recent)
        count = self.step - self.averaged
        decay = min(self.schedule.average_decay, (1 + count) / (10 + count))
        with torch.no_grad():
            means: list[Tensor] = list(self.average.parameters())
            values: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(means, values, 1 - decay)
            torch._foreach_copy_(list(self.average.buffers()), list(self.model.buffers()))

    def _record(self, trained: nn.Module, inputs: Sequence[Tensor]) -> Recording[tuple[Tensor, Tensor]]:
        """`_gradients` of such inputs. While rounding for long, residual blocks are compiled, which takes a minute and saves a third of
        a step's time; without a compiler it goes on as it is."""

        def work(*x: Tensor) -> tuple[Tensor, Tensor]:
            return self._gradients(trained, *x)

        if self.model.rounding is not None and self.schedule.prior_at * self.budget - self.spent > COMPILING_PAYS:
            torch._dynamo.config.cache_size_limit = COMPILED_BLOCKS
            blocks = [part for part in self.model.modules() if isinstance(part, ResidualBlock)]
            for block in blocks:
                block.compile(dynamic=False)
            try:
                return Recording(work, inputs)
            except (RuntimeError, OSError) as error:
                if self.on_warning:
                    self.on_warning(f"residual blocks cannot be compiled: {str(error).strip().splitlines()[0]}")
        with torch.compiler.set_stance("force_eager"):
            return Recording(work, inputs)

    def _gradients(
        self, trained: nn.Module, crops: Tensor, quality: Tensor, rate_weight: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the loss of crops, uint8 (B, H, W, 3), of at most the schedule's length; none where that is not finite.

        Returns:
            bits per pixel and PSNR (2,), and the loss.
        """
        self.model.zero_grad(set_to_none=True)
        pixels = crops.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
        with precision.autocast(self.device):
            losses = trained(pixels, quality, rate_weight)
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip_norm)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        ratio = (10 * torch.log10(255**2 / losses.mse.clamp(min=1e-3))).mean()
        return torch.stack([losses.bpp.mean(), ratio]), losses.total.detach()

    # Validation and the sheet

    @torch.no_grad()
    def _measure(self, model: RateDistortion, autocast: bool = True) -> dict[str, float]:
        """bpp, cost and likeness of the validation crops at a few qualities, and the geometric mean of the costs, bpp + lambda * squared error."""
        row: dict[str, float] = {}
        total = 0.0
        for quality in VALIDATION_QUALITIES:
            bpp, ratio, cost = 0.0, 0.0, 0.0
            likeness: dict[str, float] = {}
            for start in range(0, len(self.validation), VALIDATION_BATCH):
                crops = self.validation[start : start + VALIDATION_BATCH]
                losses = self._forward(model, crops, quality, autocast)
                bpp += float(losses.bpp.sum())
                cost += float(losses.cost.sum())
                ratio += float((10 * torch.log10(255**2 / losses.mse.clamp(min=1e-3))).sum())
                for name, value in self._likeness(losses, crops).items():
                    likeness[name] = likeness.get(name, 0.0) + value
            count = len(self.validation)
            row[f"bpp_{quality}"] = round(bpp / count, 5)
            row[f"psnr_{quality}"] = round(ratio / count, 4)
            row[f"cost_{quality}"] = round(cost / count, 5)
            row |= {f"{name}_{quality}": round(value / count, 5) for name, value in likeness.items()}
            total += math.log(cost / count)
        # The geometric mean counts a gain of one percent alike at every quality.
        row["cost"] = round(math.exp(total / len(VALIDATION_QUALITIES)), 5)
        return row

    def _likeness(self, losses: Losses, crops: Sequence[data.Pixels]) -> dict[str, float]:
        """Sums over crops of what says how alike restored pictures look, as 8-bit pictures."""
        restored = losses.reconstruction.round().clamp(0, 255)
        original = self._pixels(crops)
        sums = visual_distance(restored, original).tolist()
        eight_bits = restored.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        found = {
            "ssimulacra2": sum(map(score, sums)),
            "ms_ssim": sum(ms_ssim(a, b) for a, b in zip(crops, eight_bits, strict=True)),
        }
        if self.look_of:
            found["lpips"] = float(losses.perceptual.sum())
        if self.judge is not None:
            found["lpips_alex"] = float(self.judge(restored, original).sum())
        return found

    def _validate(self) -> None:
        """Append a line to the log: what the averaged weights do on the validation crops."""
        self._report("validate")
        row = {"step": self.step, "minutes": round(self.spent / 60, 2), **self._measure(self.average)}
        row["perplexity"] = round(self._perplexity(), 2)
        self._write_log([*(self._log(self.step) if self.step else []), row])

    def _log(self, end: int) -> list[dict[str, Any]]:
        """The lines of the log before a step."""
        path = self.output.with_suffix(".csv")
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if int(row["step"]) < end]

    def _write_log(self, rows: list[dict[str, Any]]) -> None:
        with self.output.with_suffix(".csv").open("w", newline="") as file:
            # A run that is resumed may log more than before, or less.
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)

    def _forward(self, model: RateDistortion, crops: Sequence[data.Pixels], quality: int, autocast: bool) -> Losses:
        pixels = self._pixels(crops)
        with precision.autocast(self.device) if autocast else contextlib.nullcontext():
            losses: Losses = model(pixels, torch.full((len(crops),), quality, device=self.device))
        return losses

    def _pixels(self, crops: Sequence[data.Pixels]) -> Tensor:
        """(B, 3, H, W), 0..255."""
        pixels = torch.from_numpy(np.stack(crops)).to(self.device).permute(0, 3, 1, 2).float()
        return pixels.contiguous(memory_format=torch.channels_last)

    def _perplexity(self) -> float:
        values = []
        for level in range(len(self.config.levels)):
            for piece in self.model.vqvae.level_slices(level):
                share = piece.codebook.usage / piece.codebook.usage.sum(1, keepdim=True).clamp(min=1e-9)
                values.append(torch.exp(-(share * share.clamp(min=1e-12).log()).sum(1)))
        return float(torch.cat(values).mean())

    @torch.no_grad()
    def _sheet_row(self) -> list[data.Pixels]:
        losses = self._forward(self.average, self.validation[:SHEET_PICTURES], SHEET_QUALITY, autocast=True)
        pixels = losses.reconstruction.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return list(pixels)

    def _write_sheet(self) -> None:
        """Rows: original, before training, after; columns: validation crops."""
        original, after = self.validation[:SHEET_PICTURES], self._sheet_row()
        before = self.before or [np.full_like(p, 128) for p in original]
        rows = [np.concatenate(list(row), axis=1) for row in (original, before, after)]
        Image.fromarray(np.concatenate(rows, axis=0)).save(self.output.with_suffix(".png"))

    # Checkpoints

    def _checkpoint(self) -> Path:
        return self.output.with_suffix(".ckpt")

    def _save(self) -> None:
        """Everything that resuming needs, as safetensors, replaced atomically."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{k}": v for k, v in state.items()}
        tensors |= {f"before.{index}": torch.from_numpy(pixels) for index, pixels in enumerate(self.before)}
        tensors |= self.stood_in
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        facts = {name: getattr(self, name) for name in FACTS} | {"recent": self.recent.tolist()}
        metadata = {"config": self.config.to_json(), "facts": json.dumps(facts), "look_of": self.look_of}
        temporary = self._checkpoint().with_suffix(".ckpt.tmp")
        save_file(tensors, temporary, metadata)
        os.replace(temporary, self._checkpoint())

    def load(self) -> None:
        path = self._checkpoint()
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"cannot resume from {path}: {error}") from None
        facts = json.loads(metadata.get("facts", "{}"))
        if not facts.keys() >= {*FACTS, "recent"}:
            raise TrainingError(f"cannot resume from {path}: not a checkpoint of a training run of this version")
        shape = dataclasses.replace(Config.from_json(metadata["config"]), commitment=self.config.commitment)
        if shape != self.config:
            raise TrainingError(f"{path} is of another configuration")
        if metadata.get("look_of", "") != self.look_of:
            what = f"a look of weights {metadata['look_of']}" if metadata.get("look_of") else "a model of its own"
            raise TrainingError(f"{path} is of {what}")
        if facts["phase"] != Phase.ROUNDING:
            self.model.rounding = self.average.rounding = None
            self.stood_in = {k: tensors.pop(k) for k in list(tensors) if k.startswith(ROUNDING)}
        for prefix, module in (("model.", self.model), ("average.", self.average)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(f"{name}."):
                    _, index, field = key.split(".")
                    state.setdefault(int(index), {})[field] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self.before = [tensors[f"before.{i}"].numpy() for i in range(SHEET_PICTURES) if f"before.{i}" in tensors]
        for name in FACTS:
            setattr(self, name, facts[name])
        self.phase = Phase(facts["phase"])
        self.recent = torch.tensor(facts["recent"], device=self.device)
        if self.rank == 0 and (rows := self._log(self.step + 1)):
            self._write_log(rows)  # without what came after the checkpoint and is lost

    def _report(self, stage: str) -> None:
        if self.on_progress:
            remaining = max(0.0, self.budget - self.spent)
            bpp, psnr = self.recent.tolist()
            loss, perplexity = float(self.loss), self._perplexity()
            self.on_progress(Progress(stage, self.step, self.spent, remaining, bpp, psnr, loss, perplexity))
