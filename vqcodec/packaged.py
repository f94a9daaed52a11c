"""Where weights files are: given by path, or by the name of one that comes with the package."""

from pathlib import Path

from vqcodec.errors import WeightsError

DEFAULT = "photo"
# What a picture is restored for: its pixels, or what it looks like. The first needs nothing but the weights themselves.
LOOKS = ("faithful", "natural")
# What the encoder chooses codes for: what a picture looks like, or its pixels.
TUNES = ("visual", "psnr")


def find(weights: str | Path | None = None) -> Path:
    """Path of a weights file: the one named, which may be a packaged one without its suffix, or the packaged default.

    Raises:
        WeightsError: there is none.
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


def find_look(weights: Path, look: str) -> Path | None:
    """Path of the file that has another look of these weights, beside them; None for the faithful one, which needs none.

    Raises:
        ValueError: no such look. WeightsError: these weights do not have it.
    """
    if look not in LOOKS:
        raise ValueError(f"look must be one of {', '.join(LOOKS)}, got {look!r}")
    if look == LOOKS[0]:
        return None
    path = weights.with_suffix(f".{look}.safetensors")
    if not path.is_file():
        raise WeightsError(f"no {look} look for the weights {weights}: there is no {path.name} beside them")
    return path
