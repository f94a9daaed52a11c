"""Where weights files are: given by path, or by the name of one that comes with the package."""

from pathlib import Path

from vqcodec.errors import WeightsError

DEFAULT = "photo"


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
