"""What the command line says to people: error lines, results, tables and progress bars.

Errors, notes, results and progress bars go to stderr, the answers of `vqcodec info` and `vqcodec compare` and what
--json asks for to stdout.
"""

import contextlib
import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vqcodec import streams
from vqcodec.bitstream import Info
from vqcodec.errors import VqcodecError, one_line
from vqcodec.files import Job

if TYPE_CHECKING:
    from vqcodec.train.run import Progress

T = TypeVar("T")

unsaid: list[str] = []  # lines that stderr did not take; when there are any, the exit code is not 0

_BAR_STEPS = 1000  # of a progress bar over a share or over time


@dataclass(frozen=True)
class Failure:
    """An error of one file, which may come from another process.

    Attributes:
        name: of the file.
        message: one line that says what went wrong.
        trace: the traceback.
    """

    name: str
    message: str
    trace: str = ""

    @classmethod
    def of(cls, name: str, error: Exception) -> "Failure":
        """What an exception that is being handled means for the file `name`, unless it names another one."""
        if isinstance(error, OSError) and error.filename is not None:
            name = str(error.filename)
        return cls(name, message(error), traceback.format_exc().rstrip())


class ErrorReport:
    """Reports the errors of a command on stderr, one line each, and counts them.

    Attributes:
        failed: how many errors were reported.
    """

    def __init__(self) -> None:
        self.failed = 0

    @contextlib.contextmanager
    def errors_of(self, name: str) -> Iterator[None]:
        """Report an exception that the body raises as an error of the file `name`, and go on after the body.

        Wrong usage and interruption pass through: they end the command. `vqcodec --debug` prints a traceback first.
        """
        try:
            yield
        except (click.ClickException, click.Abort):
            raise
        except Exception as error:  # noqa: BLE001 - an error in one file must not stop the others
            self.add(Failure.of(name, error))

    def add(self, failure: Failure) -> None:
        """Report an error."""
        self.failed += 1
        if failure.trace and click.get_current_context().find_root().params["debug"]:
            for line in failure.trace.splitlines():
                say(line)
        say(f"vqcodec: {failure.name or repr(failure.name)}: {failure.message}")

    @property
    def status(self) -> int:
        """The exit code: 1 if there was an error, else 0."""
        return 1 if self.failed else 0


def message(error: Exception) -> str:
    """One line that says what went wrong, and for an unexpected error how to see more."""
    expected = isinstance(error, (VqcodecError, OSError, MemoryError))
    return one_line(error) + ("" if expected else " (vqcodec --debug ... shows where)")


def say(text: str) -> None:
    """Write a line to stderr. On a terminal, it replaces a progress bar that stands on the current line.

    Control characters, which names of files may contain, are escaped. A stderr that takes no more must not stop the
    work: the line is lost, and `unsaid` has it.
    """
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    try:
        click.echo(("\r\x1b[K" if sys.stderr.isatty() else "") + text, err=True)
    except OSError:
        unsaid.append(text)
        streams.discard(sys.stderr)


def warn(text: str) -> None:
    """Write a warning to stderr."""
    say(f"vqcodec: warning: {text}")


def silence_libraries() -> None:
    """Keep Pillow's log off stderr: what matters of it arrives as an exception or as a warning."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


# Results


def say_result(
    job: Job,
    *,
    width: int,
    height: int,
    read: int,
    written: int,
    bpp: float,
    seconds: float,
    quality: int | None = None,
    tested: bool = False,
) -> None:
    """Report one compressed, decompressed or tested picture on stderr.

    Args:
        job: the file and what was made of it.
        width, height: of the picture that was compressed or made, in pixels.
        read: bytes read.
        written: bytes written.
        bpp: bits of the .vqz file per pixel of the picture in it, all of which may not have been asked for.
        seconds: how long it took.
        quality: the quality that was found for a target, if any.
        tested: whether the file was decoded without writing the picture.
    """
    what = f"{job.source}: fine, {read:,}" if tested else f"{job.source} -> {job.target}: {read:,} -> {written:,}"
    found = "" if quality is None else f", quality {quality}"
    say(f"{what} bytes, {width} x {height}, {bpp:.4f} bpp{found}, {seconds:.2f} s")


def say_total(files: int, failed: int, *, read: int, written: int, skipped: int = 0, left_out: int = 0) -> None:
    """Report on stderr how many of several files were done, and the bytes read and written for them."""
    others = "".join(f"{count} {name}, " for count, name in ((skipped, "skipped"), (left_out, "left out")) if count)
    done = files - failed - skipped - left_out
    say(f"vqcodec: {done} of {files} files done, {others}{failed} failed; {read:,} -> {written:,} bytes")


def print_line(values: dict[str, Any]) -> None:
    """Print names and values on stdout, as a JSON object in one line."""
    click.echo(json.dumps(values))


# Tables


def print_table(values: dict[str, Any], *, as_json: bool) -> None:
    """Print names and values on stdout, a line each or as one JSON object."""
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        shown = json.dumps(value) if isinstance(value, (dict, list)) else value
        click.echo(f"{name}: {shown}")


def print_infos(infos: Sequence[tuple[str, Info]], *, as_json: bool) -> None:
    """Print what `bitstream.read_info` says of files on stdout, given with their names."""
    if as_json:
        click.echo(json.dumps([_info_json(path, info) for path, info in infos], indent=2))
        return
    for path, info in infos:
        click.echo(_info_text(path, info))


def _info_json(path: str, info: Info) -> dict[str, Any]:
    header = info.header
    return {
        "file": path,
        "bytes": info.file_bytes,
        "bpp": info.bits_per_pixel,
        "format": header.version,
        "width": header.width,
        "height": header.height,
        "grey": header.grey,
        "quality": header.quality,
        "weights": header.weights_id.hex(),
        "tile": header.tile,
        "tiles": list(header.tiles),
        "layer_bytes": list(info.layer_bytes),
        "chunks": [{"kind": kind, "bytes": size} for kind, size in info.chunks],
    }


def _info_text(path: str, info: Info) -> str:
    header = info.header
    rows, columns = header.tiles
    lines = [
        click.format_filename(path),
        f"  size      {header.width} x {header.height} pixels, {'grey' if header.grey else 'colour'}",
        f"  file      {info.file_bytes:,} bytes, {info.bits_per_pixel:.4f} bits per pixel, format {header.version}",
        f"  quality   {header.quality}",
        f"  weights   {header.weights_id.hex()}",
        f"  tiles     {columns} x {rows}" + (f" of {header.tile} pixels a side" if header.tile else ""),
        f"  layers    {len(info.layer_bytes)}: {', '.join(f'{size:,}' for size in info.layer_bytes)} bytes",
    ]
    if info.chunks:
        lines.append(f"  metadata  {', '.join(f'{kind.strip()} {size:,} bytes' for kind, size in info.chunks)}")
    return "\n".join(lines)


def print_comparison(
    width: int,
    height: int,
    compressed: dict[str, int],
    *,
    psnr: float,
    ms_ssim: float,
    ssimulacra2: float | None,
    as_json: bool,
) -> None:
    """Print on stdout how much two pictures differ.

    Args:
        width, height: of both pictures, in pixels.
        compressed: bytes of each .vqz file among the two, by name.
        psnr: dB; infinity for equal pictures.
        ms_ssim: at most 1; nan for pictures that are too small.
        ssimulacra2: at most 100; nan for pictures that are too small, None if it is not computed.
        as_json: print a JSON object, in which null stands for infinity, nan and None.
    """
    files = [{"file": path, "bytes": size, "bpp": 8 * size / (width * height)} for path, size in compressed.items()]
    if as_json:
        numbers = {"psnr": psnr, "ms_ssim": ms_ssim, "ssimulacra2": ssimulacra2}
        finite = {name: None if x is None or not math.isfinite(x) else x for name, x in numbers.items()}
        click.echo(json.dumps({"width": width, "height": height, "files": files, **finite}, indent=2))
        return
    for path, size in compressed.items():
        click.echo(f"{click.format_filename(path)}: {size:,} bytes, {8 * size / (width * height):.4f} bpp")
    score = "-" if ssimulacra2 is None else f"{ssimulacra2:.1f}"
    click.echo(f"PSNR {psnr:.2f} dB, MS-SSIM {ms_ssim:.4f}, SSIMULACRA2 {score}")


# Progress


@contextlib.contextmanager
def file_bar(count: int, *, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over files if there are several and stderr is a terminal, with speed and time left.

    Yields:
        A function to call after each file, with its number of pixels.
    """
    if not (wanted and count > 1 and sys.stderr.isatty()):
        yield lambda pixels: None
        return
    begun, total = time.monotonic(), 0
    with click.progressbar(length=count, show_pos=True, item_show_func=lambda text: text, file=sys.stderr) as bar:

        def show(pixels: int) -> None:
            nonlocal total
            total += pixels
            bar.update(1, f"{total / 1e6 / (time.monotonic() - begun):.2f} MP/s")

        yield show


@contextlib.contextmanager
def counted_bar(items: Iterable[T], count: int) -> Iterator[Iterable[T]]:
    """The `count` items, with a progress bar over them if stderr is a terminal."""
    with click.progressbar(items, length=count, file=sys.stderr, hidden=not sys.stderr.isatty()) as steps:
        yield steps


@contextlib.contextmanager
def search_bar(*, wanted: bool) -> Iterator[Callable[[float], None] | None]:
    """A progress bar over the search for better codes, if stderr is a terminal.

    Yields:
        A function that takes the share of the search that is done, 0 to 1, or None if there is no bar. A share below
        the last one starts the bar again: the next quality is tried.
    """
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    with click.progressbar(length=_BAR_STEPS, label="searching", file=sys.stderr) as bar:

        def show(share: float) -> None:
            reached = round(_BAR_STEPS * share)
            if reached < bar.pos:
                bar.pos, bar.finished = 0, False
            bar.update(reached - bar.pos)

        yield show


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[["Progress"], None]]:
    """A progress bar over the time of a training run; without a terminal, a line whenever the stage changes.

    Yields:
        A function that shows the progress it is given.
    """
    if not sys.stderr.isatty():
        shown = ""

        def show_stage(progress: "Progress") -> None:
            nonlocal shown
            if progress.stage != shown:
                shown = progress.stage
                say(_training_line(progress))

        yield show_stage
        return

    with click.progressbar(length=_BAR_STEPS, file=sys.stderr, show_eta=False, item_show_func=_training_line) as bar:

        def show(progress: "Progress") -> None:
            total = progress.elapsed + progress.remaining
            reached = int(_BAR_STEPS * progress.elapsed / total) if 0 < total < math.inf else 0
            bar.update(max(0, reached - bar.pos), progress)

        yield show


def _training_line(progress: "Progress | None") -> str:
    if progress is None:  # before the first step
        return ""
    line = f"{progress.stage}, step {progress.step}"
    if not math.isnan(progress.bpp):  # as it is before the first step
        line += f": {progress.bpp:.3f} bpp, {progress.psnr:.2f} dB"
    if not math.isfinite(progress.remaining):
        return line
    minutes, seconds = divmod(int(progress.remaining), 60)
    return f"{line}, {minutes // 60:02}:{minutes % 60:02}:{seconds:02} left"
