"""Loads, checks and saves weights files; `weights_file` says what is in them."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vqcodec import caller, files
from vqcodec.errors import WeightsError
from vqcodec.models.config import Config
from vqcodec.models.counts import Tables
from vqcodec.models.integers import IntegerConv, QualityBias
from vqcodec.models.model import Model
from vqcodec.models.prior import Prior
from vqcodec.models.quantizer import Codebook
from vqcodec.models.vqvae import VQVAE, SliceQuantizer
from vqcodec.weights_file import FORMAT, LOOK_FORMAT, WeightsFile, check_shapes, id_of, read

DEVICES = ("cpu", "cuda")  # on others nobody has shown that codes are exact


@caller.undisturbed()
def load(path: Path, device: str = "cpu", look: Path | None = None) -> Model:
    """Load a model from a weights file. The last two models are cached.

    Args:
        path: a file that `save_model` wrote.
        device: "cpu", "cuda" or "auto" (CUDA if there is one).
        look: a file that `save_look` wrote for these weights, to decode with; None for the weights' own decoder.

    Raises:
        WeightsError: the file is unreadable or invalid, the look belongs to other weights, or there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in DEVICES:
        raise WeightsError(f"device must be auto, {' or '.join(DEVICES)}, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise WeightsError("no CUDA device is available")
    return _load(path, device, look, tuple(_version(file) for file in (path, look) if file))


def _version(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=2)
def _load(path: Path, device: str, look: Path | None, versions: tuple[tuple[int, int], ...]) -> Model:
    file = read(path)
    config, shapes, tensors = file.config, file.shapes, _tensors(file)
    if look is not None:
        second = read(look, LOOK_FORMAT)
        config, of, own = second.config, second.metadata.get("weights"), _tensors(second)
        if of != file.id.hex():
            raise WeightsError(f"{look} is a look of weights {of}, {path} are {file.id.hex()}")
        shapes, tensors = {**shapes, **second.shapes}, {**tensors, **own}
    check_shapes(look or path, config, shapes)
    _check_numbers(look or path, tensors)
    vqvae, prior, tables = _blank(config)
    if look is not None:
        replaced = tuple(f"vqvae.{name}." for name in vqvae.renderer())
        tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(replaced)}
    for module, prefix in ((vqvae, "vqvae."), (prior, "prior."), (tables, "tables.")):
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            problems = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise WeightsError(f"weights {look or path} do not fit their configuration: {reason}") from None
        missing = sorted(set(problems.missing_keys) - _not_stored(module))
        if missing or problems.unexpected_keys:
            raise WeightsError(f"weights {look or path} lack {missing} and have unknown {problems.unexpected_keys}")
    try:
        prior.check()
        for level in range(len(config.levels)):
            for index in range(len(config.levels[level].slices)):
                tables.slice(level, index).check()
    except ValueError as error:
        raise WeightsError(f"weights {path}: {error}") from None
    return Model(config, vqvae, prior, tables, file.id, torch.device(device))


def _check_numbers(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that the prior and its tables are integers, and that all other tensors are finite fractions.

    Raises:
        WeightsError: they are not.
    """
    for name, tensor in tensors.items():
        if name.startswith(("prior.", "tables.")):
            if tensor.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
                raise WeightsError(f"weights {path}: {name} must hold integers, not {tensor.dtype}")
        elif tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise WeightsError(f"weights {path}: {name} must hold fractions, not {tensor.dtype}")
        else:
            _check_finite(path, {name: tensor})


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that all numbers are finite.

    Raises:
        WeightsError: they are not.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"weights {path}: not all numbers of {name} are finite")


class _Uninitialised(TorchFunctionMode):
    """New modules keep the memory of their parameters as it is: the functions of `torch.nn.init` do nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return (*args, kwargs.get("tensor"))[0]
        return func(*args, **kwargs)


def _blank(config: Config) -> tuple[VQVAE, Prior, Tables]:
    """Networks and tables whose contents are still to be loaded. The caller's random numbers stay as they are."""
    with _Uninitialised():
        vqvae, prior, tables = VQVAE(config).float(), Prior(config).float(), Tables(config)
    for part in prior.modules():
        if isinstance(part, IntegerConv | QualityBias):
            part.frozen = True
    return vqvae, prior, tables


def with_id(paths: Sequence[Path], weights_id: bytes) -> Path | None:
    """The first of some weights files that has this id; None if none has."""
    return next((path for path in paths if _id_of_file(path, _version(path)) == weights_id), None)


@functools.lru_cache(maxsize=64)
def _id_of_file(path: Path, version: tuple[int, int]) -> bytes:
    return id_of(path.read_bytes())


def is_look_of(path: Path, weights_id: bytes) -> bool:
    """Whether a file is a look of the weights with this id."""
    try:
        return path.is_file() and read(path, LOOK_FORMAT).metadata.get("weights") == weights_id.hex()
    except WeightsError:
        return False


def _tensors(file: WeightsFile) -> dict[str, Tensor]:
    """All tensors of a file by name."""
    try:
        return load_tensors(file.data)
    except SafetensorError as error:
        raise WeightsError(f"cannot read weights {file.path}: {error}") from None


def _not_stored(module: torch.nn.Module) -> set[str]:
    """Names of the tensors that only training needs, which weights files omit."""
    names = set()
    for prefix, part in module.named_modules():
        if isinstance(part, Codebook):
            names |= {f"{prefix}.{name}" for name in ("usage", "sums", "steps")}
        if isinstance(part, QualityBias):
            names.add(f"{prefix}.curve")
    return names


def save_model(path: Path, config: Config, vqvae: VQVAE, prior: Prior, notes: dict[str, Any]) -> bytes:
    """Freeze the prior in place, and write a weights file atomically.

    Args:
        path: of the file. config: of the model. vqvae, prior: the trained networks.
        notes: on the training, JSON-serialisable; `describe` shows them.

    Returns:
        The id of the weights, 4 bytes.

    Raises:
        WeightsError: not all numbers are finite. Nothing is written, and the prior is as it was.
    """
    for prefix, part in (("vqvae", vqvae), ("prior", prior)):
        _check_finite(path, {f"{prefix}.{name}": tensor for name, tensor in part.state_dict().items()})
    prior.freeze()
    tables = Tables(config)
    for level in range(len(config.levels)):
        for index, piece in enumerate(vqvae.level_slices(level)):
            tables.slice(level, index).fill(piece.codebook)
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("vqvae", vqvae), ("prior", prior), ("tables", tables)):
        skipped = _not_stored(module)
        single = {
            f"{name}.{tensor}"
            for name, part in module.named_modules()
            for tensor in ("log_steps", "vectors", "bias", "spread", "family")
            if isinstance(part, SliceQuantizer | Codebook)
        }
        for name, tensor in module.state_dict().items():
            if name not in skipped:
                narrow = tensor.half() if prefix == "vqvae" and name not in single else tensor
                stored = narrow if prefix == "vqvae" else _narrow_integers(tensor)
                tensors[f"{prefix}.{name}"] = stored.detach().cpu().contiguous()
    return _write(path, tensors, {"format": FORMAT, "config": config.to_json()}, notes)


def save_look(path: Path, config: Config, vqvae: VQVAE, weights_id: str, notes: dict[str, Any]) -> None:
    """Write a look of weights atomically.

    Args:
        path: of the file. config: that of the weights. vqvae: the trained network.
        weights_id: id of the weights whose codes the look decodes, in hexadecimal. notes: as `save_model`.
    """
    tensors = {
        f"vqvae.{name}.{key}": tensor.detach().half().cpu().contiguous()
        for name, part in vqvae.renderer().items()
        for key, tensor in part.state_dict().items()
    }
    _write(path, tensors, {"format": LOOK_FORMAT, "config": config.to_json(), "weights": weights_id}, notes)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], notes: dict[str, Any]) -> bytes:
    """Write a safetensors file atomically; return its id.

    Raises:
        WeightsError: not all numbers are finite, in half precision where they are stored so.
    """
    _check_finite(path, tensors)
    data = _sort_header(save(tensors, {**metadata, "notes": json.dumps(notes, sort_keys=True)}))
    files.write_atomically(path, data)
    return id_of(data)


def _sort_header(data: bytes) -> bytes:
    """Sort the header of a safetensors file.

    The library writes metadata in random order, so that equal models would get different ids.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _narrow_integers(tensor: Tensor) -> Tensor:
    """Convert integers held in floats to the smallest integer type that holds them all."""
    largest = int(tensor.abs().max()) if tensor.numel() else 0
    assert bool((tensor == tensor.round()).all())
    for kind in (torch.int8, torch.int16, torch.int32):
        if largest <= torch.iinfo(kind).max:
            return tensor.to(kind)
    return tensor.to(torch.int64)
