"""Arguments and options that several commands of the command line share, and the types of their values."""

import contextlib
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import click

from vqcodec import packaged
from vqcodec.errors import VqcodecError
from vqcodec.limits import DEFAULT_MAX_PIXELS
from vqcodec.target import HIGHEST, LOWEST


class FilePath(click.Path):
    """The path of a file. OSError if it cannot be read: that is no wrong usage."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        open(value, "rb").close()
        return super().convert(value, param, ctx)


class WeightsPath(FilePath):
    """The path of a weights file; the name of a packaged one is replaced by its path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        with contextlib.suppress(VqcodecError):  # FilePath refuses what is neither
            value = str(packaged.find(value))
        return super().convert(value, param, ctx)


class RegionType(click.ParamType[tuple[int, ...]]):
    """A part of a picture, as X,Y,W,H: left, top, width and height in pixels."""

    name = "region"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", str(value).replace(" ", ""))
        if not found:
            self.fail(f"{value!r} is not four numbers X,Y,W,H.", param, ctx)
        return tuple(map(int, found.groups()))


REGION = RegionType()
ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def size_option(name: str, text: str) -> Callable[[Any], Any]:
    """An option whose value is a number of bytes, at least 1, given as 50000, 50KB, 48.8KiB or 1.5MB."""
    return click.option(name, callback=_bytes_of, metavar="SIZE", help=text)


def _bytes_of(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", value.strip().lower())
    size = int(Decimal(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise click.BadParameter(f"{value!r} is not a size like 50000, 50KB or 1.5MiB.")
    return size


PATH = click.Path(allow_dash=True, readable=False)  # the command says what cannot be read, and goes on with the others

inputs = click.argument("inputs", metavar="IN...", nargs=-1, required=True, type=PATH)
output = click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=PATH,
    help="File, folder, or - for standard output.  [default: a name like that of IN]",
)
output_picture = click.option("-o", "--output", metavar="OUT", type=PATH, required=True, help="Picture to write.")
quality = click.option(
    "-q", "--quality", type=click.IntRange(LOWEST, HIGHEST), default=50, show_default=True, help="Quality of the codes."
)
max_pixels = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_PIXELS,
    show_default=True,
    help="Refuse larger pictures.",
)
weights = click.option(
    "--weights", type=WeightsPath(), help="Weights file, or name of packaged weights.  [default: photo]"
)
weights_of_files = click.option(
    "--weights",
    type=WeightsPath(),
    help="Weights file, or name of packaged weights.  [default: the packaged ones that the .vqz file names]",
)
device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to compute on.",
)
force = click.option("-f", "--force", is_flag=True, help="Overwrite existing files.")
ray = click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Work on all processors of a Ray cluster, or of this machine; OUT is a folder. See docs/scale.md.",
)
jobs = click.option(
    "-j",
    "--jobs",
    "count",
    metavar="N",
    type=click.IntRange(min=1),
    help="Work on N files at a time, each in a process of one thread with memory of its own; 1 does them one after the "
    "other, with all threads.  [default: as many as there are processor cores; 1 on a GPU]",
)
skip_existing = click.option(
    "--skip-existing",
    is_flag=True,
    help="Leave out files whose output exists and is not older, however it was made; make older outputs again, but "
    "not with --rm.",
)
preserve = click.option(
    "--preserve/--no-preserve", default=True, show_default=True, help="Give outputs the times of their sources."
)
remove = click.option(
    "--rm", "remove", is_flag=True, help="Remove each source after its output was written, checked and read back."
)
manifest = click.option(
    "--json", "as_json", is_flag=True, help="Print what became of each file, as a line of JSON on standard output."
)


def many_files(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that make a file of each of many."""
    for option in (manifest, jobs, remove, preserve, skip_existing):  # the first to be applied is the last to be shown
        command = option(command)
    return command


quiet = click.option("--quiet", is_flag=True, help="Print errors and warnings only.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random numbers."
)
