"""Finds weights files, by path or by the name of one that comes with the package."""

from pathlib import Path

from vqcodec.errors import WeightsError

DEFAULT = "photo"
# The decoders of a model: "faithful" minimises the distortion and is part of the weights file; "natural" is trained for
# perceptual quality and has a file of its own.
LOOKS = ("faithful", "natural")
# The distortion that the encoder minimises: SSIMULACRA2's model of what the eye sees, or squared error.
TUNES = ("visual", "psnr")


def find(weights: str | Path | None = None) -> Path:
    """Find a weights file.

    Args:
        weights: a path, or the name of packaged weights without the suffix; None for the packaged photo model.

    Raises:
        WeightsError: there is no such file.
    """
    if weights is not None and (path := Path(weights)).is_file():
        return path
    here = Path(__file__).resolve().parent
    name = f"{weights or DEFAULT}.safetensors"
    for folder in (here / "weights_data", here.parent / "weights"):
        if Path(name).name == name and (folder / name).is_file():
            return folder / name
    if weights is not None:
        raise WeightsError(f"no weights file {weights}")
    raise WeightsError(f"the packaged weights {name} are missing: reinstall vqcodec or give a weights file")


def every() -> list[Path]:
    """All weights files that come with the package, the photo model first.

    Raises:
        WeightsError: that is missing.
    """
    first = find()
    found = (path for path in sorted(first.parent.glob("*.safetensors")) if len(path.suffixes) == 1)  # no looks
    return [first, *(path for path in found if path != first)]


def find_look(weights: Path, look: str) -> Path | None:
    """Find the file with a look of some weights, beside the weights file.

    Args:
        weights: path of the weights file.
        look: one of LOOKS.

    Returns:
        The path; None for the faithful look, which is part of the weights file.

    Raises:
        ValueError: there is no look of this name.
        WeightsError: these weights do not have the look.
    """
    if look not in LOOKS:
        raise ValueError(f"look must be one of {', '.join(LOOKS)}, got {look!r}")
    if look == LOOKS[0]:
        return None
    path = weights.with_suffix(f".{look}.safetensors")
    if not path.is_file():
        raise WeightsError(f"no {look} look for the weights {weights}: there is no {path.name} beside them")
    return path
