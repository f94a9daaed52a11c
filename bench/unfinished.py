"""What a run has learned since earlier weights, in a file that is small enough to keep in a repository.

    python -m bench.unfinished pack weights/photo.safetensors run/photo.ckpt weights/photo.ckpt
    python -m bench.unfinished unpack weights/photo.safetensors weights/photo.ckpt next/photo.safetensors
    vqcodec train PICTURES -o better.safetensors --from next/photo.safetensors

It is for runs that go on elsewhere, without the checkpoint of twenty times the size. Kept are the averaged transforms:
their differences to the weights', in eight bits with a unit for every row, and in half precision what the weights do
not have. What stands in for the prior while rounding is kept in half precision as well, by its names in a checkpoint.
Codebooks, prior and optimisers begin anew.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqcodec import weights
from vqcodec.errors import TrainingError, VqcodecError
from vqcodec.models.config import Config
from vqcodec.models.vqvae import VQVAE
from vqcodec.train import checkpoint
from vqcodec.train.job import differences, with_blocks

TRANSFORMS = "average.vqvae."
DIFFERENCE, UNIT, NEW = "since.", "unit.", "new."


def pack(start: Path, run: Path, output: Path) -> None:
    """Write what a run has learned.

    Args:
        start: the weights that the run began with, or earlier ones. run: its checkpoint. output: the small file.

    Raises:
        VqcodecError: the files cannot be read or do not fit, or the run did not begin with rounding.
    """
    model, saved = weights.load(start), checkpoint.read(run)
    tensors = {k: v.half() for k, v in saved.tensors.items() if k.startswith(checkpoint.ROUNDING)}
    if differences(saved.config, with_blocks(model.config, saved.config)) or not tensors:
        raise TrainingError(f"{run} is not of a run of the configuration of {start} that began with rounding")
    known = model.vqvae.state_dict()
    for name in _transforms(VQVAE(saved.config)):
        learned = saved.tensors[TRANSFORMS + name].float()
        if name not in known:
            tensors[NEW + name] = learned.half()
            continue
        change = (learned - known[name]).reshape(_rows(learned), -1)
        unit = (change.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        tensors[DIFFERENCE + name] = (change / unit).round().to(torch.int8)
        tensors[UNIT + name] = unit
    facts = {"weights": model.id.hex(), "crops": str(saved.facts.crops), "config": saved.config.to_json()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, output, facts)


def unpack(start: Path, packed: Path, output: Path) -> None:
    """Write weights to train on from, and beside them a checkpoint of what stood in for the prior.

    Args:
        start: the weights of `pack`. packed: the small file. output: of the weights, .safetensors.

    Raises:
        VqcodecError: the files cannot be read or do not fit.
    """
    model = weights.load(start)
    try:
        with safe_open(packed, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise TrainingError(f"cannot read {packed}: {error}") from None
    if facts.get("weights") != model.id.hex():
        raise TrainingError(f"{packed} is of weights {facts.get('weights')}, {start} are {model.id.hex()}")
    config = Config.from_json(facts.get("config", ""))
    if fields := differences(config, with_blocks(model.config, config)):
        raise TrainingError(f"{packed} is of another configuration than {start}, differing in {fields}")
    vqvae, prior = VQVAE(config), copy.deepcopy(model.prior)
    vqvae.load_state_dict(model.vqvae.state_dict(), strict=False)
    try:
        for name, tensor in _transforms(vqvae).items():
            if NEW + name in tensors:
                tensor.copy_(tensors[NEW + name])
            else:
                tensor += (tensors[DIFFERENCE + name] * tensors[UNIT + name]).reshape(tensor.shape)
    except (LookupError, RuntimeError):
        raise TrainingError(f"{packed} lacks what {start} needs: {DIFFERENCE}{name}") from None
    prior.thaw()
    weights.save_model(output, config, vqvae, prior, {"from": model.id.hex()})
    learned = {k: v for k, v in tensors.items() if k.startswith(checkpoint.ROUNDING)}
    save_file(learned, checkpoint.path_of(output))


def _transforms(vqvae: VQVAE) -> dict[str, Tensor]:
    """What a run changes while it rounds: all but the codebooks, by name."""
    return {name: tensor for name, tensor in vqvae.state_dict().items() if ".codebook." not in name}


def _rows(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() > 1 else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("weights", type=Path)
    parser.add_argument("file", type=Path, help="the checkpoint of the run, or what was packed")
    parser.add_argument("output", type=Path)
    given = parser.parse_args(arguments)
    try:
        (pack if given.action == "pack" else unpack)(given.weights, given.file, given.output)
    except (VqcodecError, OSError) as error:
        print(f"unfinished: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"file": str(given.output), "bytes": given.output.stat().st_size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
