"""Checkpoints: everything that resuming a run needs, as safetensors, beside its output.

    model.*, average.*              state of both
    adam.N.*, muon.N.*              state of optimisers, of parameter N
    average.rounding.*              what stood in for the prior, kept when its turn is over
    before.N                        validation crop N before training

The metadata have the configuration, the weights of which a look is trained, and `Facts`.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor, nn

from vqcodec import files
from vqcodec.errors import TrainingError
from vqcodec.models.config import Config
from vqcodec.train.job import differences
from vqcodec.train.schedule import DISTORTIONS, Phase, Schedule
from vqcodec.train.state import Run
from vqcodec.train.validation import shorten_log

ROUNDING = "average.rounding."


@dataclass(frozen=True)
class Facts:
    """What a checkpoint holds besides tensors: attributes of `Run` and `Job`.

    Attributes:
        phase: the number of a `Phase`. recent: bits per pixel, and PSNR in dB. visual_share: as of `Schedule`; None in
            checkpoints that are older than this field. crops: 0 in those that are older than this one.
    """

    step: int
    spent: float
    rate_start: float
    phase: int
    averaged: int
    onward: bool
    recent: list[float]
    visual_share: float | None = None
    crops: int = 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been read. `config` and `look_of` are as of `Job`."""

    path: Path
    facts: Facts
    tensors: dict[str, Tensor]
    config: Config
    look_of: str

    def check_config(self, asked: Config, options: str) -> None:
        """Refuse to go on with another configuration; the commitment may differ.

        Args:
            asked: the configuration. options: those of the command line that ask for it.

        Raises:
            TrainingError: it is another one.
        """
        if fields := differences(asked, self.config):
            raise TrainingError(
                f"{self.path} is of another configuration than {asked.name!r}, differing in {fields}:"
                f" leave out {options} to go on with its own, {self.config.name!r}"
            )

    def check_look(self, look: bool, look_of: str) -> None:
        """Refuse to go on with a look as with a model, with a model as with a look, and with a look of other weights.

        Args:
            look: whether a look is asked for. look_of: as of `Job`; "" for whatever the checkpoint is of.

        Raises:
            TrainingError: the checkpoint is of something else.
        """
        if look and not self.look_of:
            raise TrainingError(f"{self.path} is of a model of its own, not of a look: leave out --natural")
        if self.look_of and not look:
            raise TrainingError(f"{self.path} is of a look of weights {self.look_of}: give its features with --natural")
        if look_of not in ("", self.look_of):
            raise TrainingError(
                f"{self.path} is of a look of weights {self.look_of}, not of {look_of}: leave out --from"
            )

    def distorted(self, plan: Schedule, asked: str | None) -> Schedule:
        """The schedule with the distortion that the run began with, where the checkpoint knows it.

        Args:
            plan: the schedule. asked: as of `Schedule.with_distortion`, or None.

        Raises:
            TrainingError: another distortion is asked for.
        """
        share = self.facts.visual_share
        if share is None:
            return plan
        if asked is not None and DISTORTIONS[asked] != share:
            known = next(
                (name for name in DISTORTIONS if DISTORTIONS[name] == share), f"with a visual share of {share}"
            )
            raise TrainingError(f"{self.path} is of a run on distortion {known}, not {asked}: leave out --distortion")
        return dataclasses.replace(plan, visual_share=share)


def path_of(output: Path) -> Path:
    """Where the checkpoint of a run lies."""
    return output.with_suffix(".ckpt")


def save(run: Run) -> None:
    """Replace the checkpoint of a run, atomically.

    Raises:
        TrainingError: the weights are not finite any more, or the file cannot be written. The one before is kept.
    """
    tensors = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    for name, optimiser in run.optimisers.items():
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{k}": v for k, v in state.items()}
    tensors |= {f"before.{index}": torch.from_numpy(pixels) for index, pixels in enumerate(run.before)}
    tensors |= run.rounding_learned
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    job = run.job
    facts = Facts(
        step=run.step,
        spent=run.spent,
        rate_start=run.rate_start,
        phase=int(run.phase),
        averaged=run.averaged,
        onward=job.onward,
        recent=run.recent.tolist(),
        visual_share=job.schedule.visual_share,
        crops=run.crops,
    )
    metadata = {"config": job.config.to_json(), "facts": json.dumps(dataclasses.asdict(facts)), "look_of": job.look_of}
    path = path_of(job.output)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(f"{path} is not saved at step {run.step}: not all numbers of {name} are finite")
    files.write_atomically(path, serialised(tensors, metadata))


def read(output: Path) -> Saved:
    """Read the checkpoint of the run with this output.

    Raises:
        TrainingError: there is none, or it cannot be read.
    """
    path = path_of(output)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot resume from {path}: {error}") from None
    try:
        facts = Facts(**json.loads(metadata.get("facts", "{}")))
        config = Config.from_json(metadata["config"])
    except (KeyError, TypeError, ValueError):
        message = f"cannot resume from {path}: not a checkpoint of a training run of this version"
        raise TrainingError(message) from None
    return Saved(path, facts, tensors, config, metadata.get("look_of", ""))


def restore(run: Run, saved: Saved) -> None:
    """Go on where a checkpoint was saved."""
    facts, tensors = saved.facts, dict(saved.tensors)
    if facts.phase != Phase.ROUNDING:
        run.model.rounding = run.average.rounding = None
        run.rounding_learned = {k: tensors.pop(k) for k in list(tensors) if k.startswith(ROUNDING)}
    for prefix, module in (("model.", run.model), ("average.", run.average)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, optimiser in run.optimisers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}."):
                _, index, field = key.split(".")
                state.setdefault(int(index), {})[field] = tensor
        _load(optimiser, state)
    before = sorted((k for k in tensors if k.startswith("before.")), key=lambda k: int(k.removeprefix("before.")))
    run.before = [tensors[k].numpy() for k in before]
    run.step, run.crops, run.averaged = facts.step, facts.crops, facts.averaged
    run.spent = run.sitting = facts.spent
    run.rate_start, run.phase = facts.rate_start, Phase(facts.phase)
    run.recent = torch.tensor(facts.recent, device=run.job.device)
    if run.job.rank == 0:
        shorten_log(run)


def _load(optimiser: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Load what an optimiser keeps of each weight, laid out in memory as the weight: fused Adam reads both in order."""
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    for weight, kept in optimiser.state.items():
        for field, tensor in kept.items():
            if tensor.shape == weight.shape:
                kept[field] = torch.empty_like(weight).copy_(tensor)


def rounding_tensors(rounding: nn.Module) -> dict[str, Tensor]:
    """What stood in for the prior, by its names in a checkpoint."""
    return {f"{ROUNDING}{name}": tensor for name, tensor in rounding.state_dict().items()}


def rounding_of(output: Path) -> dict[str, Tensor]:
    """What stood in for the prior in the run that made some weights, by its own names; nothing without a checkpoint."""
    try:
        with safe_open(path_of(output), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(ROUNDING)]  # noqa: SIM118 (not a dict)
            return {name.removeprefix(ROUNDING): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return {}
