"""The commands of vqcodec: each checks its arguments, calls the library and returns an exit code.

Exit codes: 0 everything was done, 1 at least one file failed, 2 wrong usage, 130 interrupted, 143 terminated.
Only data goes to stdout.
The commands import numpy and torch themselves, after the checks that need neither.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import sys
import threading
import time
import webbrowser
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vqcodec import __version__, batch, bitstream, files, limits, options, packaged, signals, streams, terminal
from vqcodec.errors import ImageError, VqcodecError
from vqcodec.packaged import TUNES
from vqcodec.target import HIGHEST, LOWEST, Target
from vqcodec.terminal import ErrorReport

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vqcodec.image import Picture

DEFAULT_MINUTES = 180.0  # of a training run


class _Program(click.Group):
    """A command group that reports wrong usage and interruption in one line, with the exit codes above."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit the process."""
        kwargs["standalone_mode"] = False
        kwargs.setdefault("prog_name", "vqcodec")
        streams.repair()
        terminal.unsaid.clear()
        try:
            with signals.exiting():
                status = super().main(*args, **kwargs)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "vqcodec"
            terminal.say(f"vqcodec: {error.format_message()} (see {path} --help)")
            status = 2
        except click.Abort:
            terminal.say("vqcodec: interrupted")
            status = 130
        except OSError as error:  # one that names no file is of what is printed
            name = "standard output" if error.filename is None else error.filename or "''"
            terminal.say(f"vqcodec: {name}: {terminal.message(error)}")
            streams.discard(sys.stdout)
            status = 1
        sys.exit(status or int(bool(terminal.unsaid)))


@click.group(
    "vqcodec",
    cls=_Program,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--debug", is_flag=True, help="Print a traceback with every error.")
@click.version_option(__version__, prog_name="vqcodec", message=f"%(prog)s %(version)s (format {bitstream.VERSION})")
def main(debug: bool) -> None:
    """Compress photos to .vqz files and restore them.

    \b
    Examples:
      vqcodec compress photo.png            makes photo.vqz
      vqcodec decompress photo.vqz -o restored.png

    Shell completion: eval "$(_VQCODEC_COMPLETE=bash_source vqcodec)", likewise zsh_source, and fish_source piped to
    source.
    """
    terminal.silence_libraries()


@main.command()
@options.inputs
@options.output
@click.option(
    "-q",
    "--quality",
    type=click.IntRange(LOWEST, HIGHEST),
    show_default="50",
    help="1 makes the smallest file, 100 the best picture.",
)
@options.size_option("--target-size", "Make a file of about SIZE.")
@click.option("--target-bpp", type=options.ABOVE_ZERO, metavar="BITS", help="Make a file of about BITS per pixel.")
@click.option("--target-psnr", type=options.ABOVE_ZERO, metavar="DB", help="Make a file with about this PSNR.")
@click.option(
    "--target-ssimulacra2",
    type=click.FloatRange(max=100, max_open=True),
    metavar="POINTS",
    help="Make a file with about this SSIMULACRA2: 90 looks like the original, 70 is high and 50 medium quality.",
)
@options.size_option("--max-size", "Never write a larger file. Without -q and targets, make the best file up to SIZE.")
@click.option(
    "--effort",
    type=click.IntRange(1, 9),
    default=1,
    show_default=True,
    help="How long to search for better codes. 3 takes about six times as long as 1, 9 about forty times.",
)
@click.option(
    "--tune",
    type=click.Choice(TUNES),
    help="Optimise for what the eye sees (SSIMULACRA2), or for squared error.  "
    "[default: visual; psnr with --target-psnr]",
)
@options.max_pixels
@options.weights
@options.device
@options.force
@click.option("--verify", is_flag=True, help="Decode the file again before writing it, and compare the codes.")
@options.ray
@click.option("--strip", is_flag=True, help="Leave out EXIF and XMP; colour profile and transparency stay.")
@click.option("--if-smaller", is_flag=True, help="Write only what is smaller than its source.")
@options.many_files
@options.quiet
def compress(
    inputs: tuple[str, ...],
    output: str | None,
    quality: int | None,
    target_size: int | None,
    target_bpp: float | None,
    target_psnr: float | None,
    target_ssimulacra2: float | None,
    max_size: int | None,
    effort: int,
    tune: str | None,
    max_pixels: int,
    weights: str | None,
    device: str,
    force: bool,
    verify: bool,
    ray: str | None,
    strip: bool,
    if_smaller: bool,
    skip_existing: bool,
    preserve: bool,
    remove: bool,
    count: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Compress pictures: PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF, PNM, and HEIF where pillow-heif is installed.

    IN is a picture, a folder that is searched for pictures, or - for standard input. photo.png becomes photo.vqz beside
    it unless -o says otherwise; after photo.jpg of the same folder, it becomes photo.png.vqz. With several inputs, -o
    is a folder.

    SIZE is a number of bytes, or has a unit: 50KB is 50,000 bytes and 50KiB is 51,200. A target needs several trial
    encodings, about eight for a size. It usually lies between two qualities, so -q with the quality shown only comes
    close to it.

    \b
    Examples:
      vqcodec compress photo.png -q 30 -o small.vqz
      vqcodec compress photo.png --max-size 100KB
      vqcodec compress holiday/ -o archive/ --skip-existing
    """
    numbers = {"size": target_size, "bpp": target_bpp, "psnr": target_psnr, "ssimulacra2": target_ssimulacra2}
    try:
        targets = [Target(name, value) for name, value in numbers.items() if value is not None]
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    if len(targets) + (quality is not None) > 1:
        raise click.UsageError("Give one of -q and the --target options.")
    target = targets[0] if targets else None
    if ray is not None:
        _refuse_with_ray(
            strip=strip,
            if_smaller=if_smaller,
            skip_existing=skip_existing,
            rm=remove,
            json=as_json,
            jobs=count,
            no_preserve=not preserve,
        )
        settings = {"quality": quality, "target": target, "max_size": max_size, "effort": effort, "tune": tune}
        settings |= {"verify": verify, "max_pixels": max_pixels}
        run_on_ray = functools.partial(batch.run_on_ray, "Compress", settings, inputs, output, ray)
        with _usage():
            return run_on_ray(weights=weights, device=device, overwrite=force, quiet=quiet)
    jobs = _plan(inputs, output, files.PICTURE_SUFFIXES, files.VQZ_SUFFIXES[0])

    if if_smaller and jobs[0].target == files.STREAM:
        raise click.UsageError("--if-smaller may write nothing, so it needs a file; give one with -o.")
    policy = batch.Policy(
        overwrite=force,
        quiet=quiet,
        skip_existing=skip_existing,
        if_smaller=if_smaller,
        preserve=preserve,
        remove=remove,
        as_json=as_json,
    )
    _check_policy(jobs, policy)
    work = functools.partial(
        _compress,
        strip=strip,
        max_pixels=max_pixels,
        searched=target is not None or max_size is not None,
        show_search=effort > 1 and len(jobs) == 1 and not quiet,
        quality=quality,
        target=target,
        max_size=max_size,
        weights=weights,
        device=device,
        effort=effort,
        tune=tune,
        verify=verify or remove,
    )
    return batch.run(jobs, work, policy, count=count, device=device)


def _compress(
    job: files.Job, *, strip: bool, max_pixels: int, searched: bool, show_search: bool, **settings: Any
) -> batch.Made:
    """Compress a picture file. The settings are those of `codec.compress`."""
    from vqcodec import codec, image

    start = time.perf_counter()
    before = files.status(job.source)
    data = files.read(job.source)
    with _naming_limit(max_pixels):
        picture = image.load(data, max_pixels=max_pixels)
    notes, picture = picture.notes, dataclasses.replace(picture, notes=())  # they are said later
    if strip:
        picture = dataclasses.replace(picture, exif=None, xmp=None)
    with terminal.search_bar(wanted=show_search) as show:
        encoded = codec.compress(picture, on_progress=show, **settings)
    header = bitstream.read_header(encoded)
    return batch.Made(
        data=encoded,
        read=len(data),
        bpp=8 * len(encoded) / header.pixels,
        width=header.width,
        height=header.height,
        quality=header.quality,
        seconds=time.perf_counter() - start,
        before=before,
        found=searched,
        notes=notes,
    )


@main.command()
@options.inputs
@options.output
@click.option(
    "--look",
    type=click.Choice(packaged.LOOKS),
    default=packaged.LOOKS[0],
    show_default=True,
    help="Stay closest to the pixels of the original, or look most like a photo.",
)
@click.option("--partial", is_flag=True, help="Decode the intact parts of a cut or damaged file.")
@click.option(
    "--region",
    metavar="X,Y,W,H",
    type=options.REGION,
    help="Decode only this part: left, top, width and height in pixels.",
)
@click.option(
    "--scale",
    type=click.Choice(["1", "1/2", "1/4", "1/8"]),
    default="1",
    show_default=True,
    help="Decode a smaller picture, in less time.",
)
@click.option("--grey", is_flag=True, help="Decode to shades of grey.")
@click.option("--test", is_flag=True, help="Decode, but write nothing.")
@options.max_pixels
@options.weights_of_files
@options.device
@options.force
@options.ray
@options.many_files
@options.quiet
def decompress(
    inputs: tuple[str, ...],
    output: str | None,
    look: str,
    partial: bool,
    region: tuple[int, int, int, int] | None,
    scale: str,
    grey: bool,
    test: bool,
    max_pixels: int,
    weights: str | None,
    device: str,
    force: bool,
    ray: str | None,
    skip_existing: bool,
    preserve: bool,
    remove: bool,
    count: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Restore pictures from .vqz files.

    IN is a .vqz file, a folder that is searched for .vqz files, or - for standard input. photo.vqz becomes photo.png
    beside it unless -o says otherwise. The suffix of OUT (.png .jpg .webp .avif .tif .bmp .ppm) sets the format;
    standard output gets PNG. With several inputs, -o is a folder.

    \b
    Examples:
      vqcodec decompress photo.vqz -o photo.jpg
      vqcodec decompress --test archive/
    """
    if test and output is not None:
        raise click.UsageError("--test writes nothing, so -o has no use.")
    for option, given in (("--partial", partial), ("--region", region), ("--scale", scale != "1"), ("--grey", grey)):
        if test and given:
            raise click.UsageError(f"--test checks whether files are whole, so {option} has no use.")
    if test and (skip_existing or remove):
        raise click.UsageError("--test writes nothing, so --skip-existing and --rm have no use.")
    if remove and (partial or region or scale != "1" or grey):
        raise click.UsageError("--rm would lose what --partial, --region, --scale and --grey leave out.")
    if test and ray is not None:
        raise click.UsageError("--ray makes files, and --test none.")
    if ray is not None:
        _refuse_with_ray(skip_existing=skip_existing, rm=remove, json=as_json, jobs=count, no_preserve=not preserve)
        settings = {"look": look, "partial": partial, "region": region, "scale": int(scale[-1]), "grey": grey}
        settings["max_pixels"] = max_pixels
        with _usage():
            return batch.run_on_ray(
                "Decompress",
                settings,
                inputs,
                output,
                ray,
                weights=weights,
                device=device,
                overwrite=force,
                quiet=quiet,
            )
    if test:
        with _usage():
            jobs = [files.Job(path, files.STREAM) for path, _ in files.find(inputs, files.VQZ_SUFFIXES)]
    else:
        jobs = _plan(inputs, output, files.VQZ_SUFFIXES, ".png")
        _check_suffixes(jobs)

    policy = batch.Policy(
        overwrite=force,
        quiet=quiet,
        skip_existing=skip_existing,
        preserve=preserve,
        remove=remove,
        as_json=as_json,
    )
    if not test:
        _check_policy(jobs, policy)
    work = functools.partial(
        _decompress,
        test=test,
        weights=weights,
        look=look,
        device=device,
        partial=partial,
        region=region,
        scale=int(scale[-1]),
        grey=grey,
        max_pixels=max_pixels,
    )
    return batch.run(jobs, work, policy, count=count, device=device)


def _decompress(job: files.Job, *, test: bool, max_pixels: int, **settings: Any) -> batch.Made:
    """Restore the picture of a .vqz file. The settings are those of `codec.decode_picture`."""
    from vqcodec import codec, image

    start = time.perf_counter()
    before = files.status(job.source)
    data = files.read(job.source)
    with _naming_limit(max_pixels):
        picture = codec.decode_picture(data, max_pixels=max_pixels, **settings)
    encoded: bytes | None = None
    notes: tuple[str, ...] = ()
    if not test:
        fitting = image.adapt(dataclasses.replace(picture, notes=()), _suffix(job.target))
        encoded, notes = image.save(fitting, _suffix(job.target)), fitting.notes
    header = bitstream.read_header(data)
    height, width, _ = picture.pixels.shape
    return batch.Made(
        data=encoded,
        read=len(data),
        bpp=8 * len(data) / header.pixels,
        width=width,
        height=height,
        quality=header.quality,
        seconds=time.perf_counter() - start,
        before=before,
        warnings=picture.notes,
        notes=notes,
    )


@main.command()
@click.argument("paths", metavar="FILE...", nargs=-1, type=options.PATH)
@click.option(
    "--weights",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Describe a weights file; without FILE, the packaged photo model.",
)
@options.as_json
def info(paths: tuple[str, ...], weights: str | None, as_json: bool) -> int:
    """Describe .vqz files without decoding them, or a weights file.

    FILE is a .vqz file, a folder that is searched for .vqz files, or - for standard input.

    \b
    Examples:
      vqcodec info photo.vqz
      vqcodec info --weights
    """
    if (weights is None) == (not paths):
        raise click.UsageError("Give either files or --weights.")
    report = ErrorReport()
    if weights is not None:
        with report.errors_of("weights"):
            from vqcodec.weights_file import describe

            described = describe(packaged.find(weights or None))
        if not report.failed:
            terminal.print_table(described, as_json=as_json)
        return report.status
    _check_streams(paths)
    with _usage():
        found = files.find(paths, files.VQZ_SUFFIXES)
    infos = []
    for path, _ in found:
        with report.errors_of(path):
            infos.append((path, bitstream.read_info(files.read(path))))
    terminal.print_infos(infos, as_json=as_json)
    return report.status


@main.command()
@click.argument("first", metavar="A", type=options.PATH)
@click.argument("second", metavar="B", type=options.PATH)
@click.argument("others", metavar="[C...]", nargs=-1, type=options.PATH)
@click.option("--html", metavar="OUT", type=options.PATH, help="Write a page to see the pictures before and after.")
@options.weights_of_files
@options.device
@options.force
@options.as_json
def compare(
    first: str,
    second: str,
    others: tuple[str, ...],
    html: str | None,
    weights: str | None,
    device: str,
    force: bool,
    as_json: bool,
) -> int:
    """Compare two pictures by PSNR, MS-SSIM and SSIMULACRA2, and show the sizes of .vqz files.

    The metrics compare 8-bit RGB values. They ignore transparency and colour profiles. SSIMULACRA2 takes A for the
    original; pictures above 64 megapixels, which would need more than 4 GB of memory, have none. In JSON, the PSNR of
    equal pictures is null, and so is the MS-SSIM of pictures with a side below 11 pixels, and a SSIMULACRA2 that is not
    computed or of a side below 8 pixels.

    With --html, the answer is a page that holds two or more pictures: any two of them under a slider, and a table of
    sizes, PSNR and SSIMULACRA2 against A.

    \b
    Examples:
      vqcodec compare photo.png photo.vqz
      vqcodec compare photo.png photo.vqz photo.avif --html photo.html
    """
    _check_streams((first, second, *others))
    if html is not None:
        if as_json:
            raise click.UsageError("Give one of --html and --json.")
        return _compare_on_a_page((first, second, *others), html, weights=weights, device=device, force=force)
    if others:
        raise click.UsageError("More than two pictures are compared on a page: give --html.")
    report = ErrorReport()
    pictures, sizes = [], {}
    for path in (first, second):
        with report.errors_of(path):
            data = files.read(path)
            pictures.append(_decode(data, weights, device).pixels)
            if data.startswith(bitstream.MAGIC):
                sizes[path] = len(data)
    if report.failed:
        return report.status
    from vqcodec import metrics
    from vqcodec.ssimulacra2 import BYTES_A_PIXEL, MOST_PIXELS, ssimulacra2

    a, b = pictures
    height, width, _ = a.shape
    if a.shape != b.shape:
        terminal.say(
            f"vqcodec: {second}: the picture has {b.shape[1]} x {b.shape[0]} pixels, {first} has {width} x {height}"
        )
        return 1
    too_large = width * height > MOST_PIXELS
    if too_large:
        memory = width * height * BYTES_A_PIXEL / 1e9
        terminal.say(f"vqcodec: {second}: note: no SSIMULACRA2, it would need {memory:.1f} GB of memory")
    with report.errors_of(second):
        psnr, ms_ssim = metrics.psnr(a, b), metrics.ms_ssim(a, b)
        score = None if too_large else ssimulacra2(a, b)
    if report.failed:
        return report.status
    terminal.print_comparison(width, height, sizes, psnr=psnr, ms_ssim=ms_ssim, ssimulacra2=score, as_json=as_json)
    return 0


def _compare_on_a_page(paths: Sequence[str], output: str, *, weights: str | None, device: str, force: bool) -> int:
    """Write the page of `compare --html`, and return the exit code."""
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise click.UsageError(f"the page must end in .html, got {output}")
    report = ErrorReport()
    with report.errors_of(output):
        files.check(files.Job(files.STREAM, output), overwrite=force)
    for path in paths:
        with report.errors_of(path):
            files.check(files.Job(path, files.STREAM), overwrite=force)
    if report.failed:
        return report.status
    from vqcodec.studio import page

    entries: list[page.Entry] = []
    for path in paths:
        with report.errors_of(path):
            data = files.read(path)
            picture = _decode(data, weights, device)
            if entries and picture.pixels.shape != (wanted := entries[0].picture.pixels.shape):
                height, width, _ = picture.pixels.shape
                raise ImageError(
                    f"the picture has {width} x {height} pixels, {entries[0].name} has {wanted[1]} x {wanted[0]}"
                )
            entries.append(page.Entry(path, len(data), picture))
    if report.failed:
        return report.status
    with report.errors_of(output):
        files.write(output, page.render(entries).encode(), overwrite=force)
    return report.status


def _decode(data: bytes, weights: str | None, device: str) -> "Picture":
    """The picture in a .vqz file or in any picture file."""
    if data.startswith(bitstream.MAGIC):
        from vqcodec import codec

        return codec.decode_picture(data, weights=weights, device=device)
    from vqcodec import image

    return image.load(data, max_pixels=limits.DEFAULT_MAX_PIXELS)


@main.command()
@click.argument("picture", metavar="[PICTURE]", required=False, type=options.PATH)
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen to.  [default: a free one]")
@click.option("--no-browser", is_flag=True, help="Do not open the page in the browser.")
@options.weights
@options.device
def studio(picture: str | None, port: int | None, no_browser: bool, weights: str | None, device: str) -> int:
    """Try qualities, targets and looks on a page in the browser, beside AVIF at equal bytes.

    PICTURE is a picture or a .vqz file; the page opens others too. It is served to this computer alone until Ctrl-C.
    The studio needs pip install 'vqcodec[studio]'.

    \b
    Example:
      vqcodec studio photo.png
    """
    try:
        from vqcodec.studio import server
        from vqcodec.studio.session import Studio
    except ModuleNotFoundError as error:
        terminal.say(f"vqcodec: studio: {error.name} is not installed (pip install 'vqcodec[studio]')")
        return 1

    def started(address: str) -> None:
        terminal.say(f"vqcodec: the studio is at {address} (Ctrl-C ends it)")
        if not no_browser:  # which may be one in this terminal, and wait for the page
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    report = ErrorReport()
    with report.errors_of(picture or "studio"):
        opened = Studio(weights, device)
        if picture is not None:
            opened.open(os.path.basename(picture), files.read(picture))
    if not report.failed:
        with report.errors_of(f"port {port}" if port else "studio"), contextlib.suppress(KeyboardInterrupt):
            server.serve(opened, port or 0, started)
    return report.status


@main.command()
@click.argument("pictures", metavar="PICTURES...", nargs=-1, required=True, type=options.PATH)
@click.option("-o", "--output", metavar="OUT", type=options.PATH, required=True, help="Weights file.")
@click.option(
    "--config",
    metavar="NAME|FILE",
    help="Configuration of the model.  [default: that of the checkpoint, or of --from, or photo]",
)
@click.option(
    "--minutes",
    type=options.ABOVE_ZERO,
    help="How long to train. The time of a resumed run includes its earlier parts.  "
    "[default: 180; unlimited with --crops]",
)
@click.option(
    "--crops",
    type=click.IntRange(min=1),
    help="Train for so many crops, over any number of sittings: each ends after its own --minutes, --resume continues.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue from the checkpoint of an earlier run with the same OUT, which knows --config, --from and "
    "--distortion.",
)
@click.option(
    "--from",
    "start_from",
    metavar="FILE",
    type=options.WeightsPath(),
    help="Start from these weights and keep their configuration; --config can change only the commitment and the "
    "numbers of residual blocks.",
)
@click.option(
    "--natural",
    "features",
    metavar="FEATURES",
    multiple=True,
    type=options.FilePath(path_type=Path),
    help="Train the natural look of the weights that --from names, with LPIPS on these features of AlexNet or "
    "SqueezeNet 1.1; give both for the best look. A look is resumed with them too.",
)
@click.option(
    "--distortion",
    type=click.Choice(["mse", "visual"]),
    help="Train for squared error, or half for squared error and half for visual distance (SSIMULACRA2).  "
    "[default: visual for the photo model]",
)
@click.option(
    "--lpips",
    "judge",
    metavar="FEATURES",
    type=options.FilePath(path_type=Path),
    help="Also log LPIPS, on these features of AlexNet.",
)
@options.device
@options.seed
@options.force
def train(
    pictures: tuple[str, ...],
    output: str,
    config: str | None,
    minutes: float | None,
    crops: int | None,
    resume: bool,
    start_from: str | None,
    features: tuple[Path, ...],
    distortion: str | None,
    judge: Path | None,
    device: str,
    seed: int,
    force: bool,
) -> int:
    """Train weights on picture files and on folders of pictures.

    Beside OUT, the command writes a checkpoint (.ckpt), a log (.csv), a sheet of pictures before and after compression
    (.png) and the visual tuning, which compress --tune visual needs (.visual.json).

    \b
    Examples:
      vqcodec train photos/ -o my.safetensors --minutes 60
      vqcodec train photos/ -o my.safetensors --crops 2000000 --minutes 120 --resume
      vqcodec train scans/ -o scans.safetensors --from weights/photo.safetensors
      vqcodec train scans/ -o my.natural.safetensors --from my.safetensors --natural lpips.safetensors
    """
    with _usage():
        found = files.find(pictures, files.PICTURE_SUFFIXES)
    if minutes is not None and not math.isfinite(minutes):
        raise click.UsageError("--minutes must be finite.")
    _check_training(pictures, output, config=config, start_from=start_from, resume=resume, natural=bool(features))
    sheet = _sheet(output)
    found = [(path, name) for path, name in found if os.path.realpath(path) != sheet]  # of an earlier run
    report = ErrorReport()
    for path in pictures:
        with report.errors_of(path):
            files.check(files.Job(path, files.STREAM), overwrite=False)
    with report.errors_of(output):
        # Hours of work may lie in a checkpoint.
        for suffix in (".safetensors", ".ckpt", ".csv", ".png", ".visual.json"):
            files.check(files.Job(files.STREAM, str(Path(output).with_suffix(suffix))), overwrite=force or resume)
    if report.failed:
        return report.status
    with report.errors_of(output), terminal.training_bar() as show:
        from vqcodec.train import process, run

        process.keep_memory()
        try:
            over = run.train(
                [Path(path) for path, _ in found],
                Path(output),
                config=config,
                minutes=minutes or (math.inf if crops else DEFAULT_MINUTES),
                crops=crops,
                resume=resume,
                device=device,
                seed=seed,
                start_from=Path(start_from) if start_from else None,
                features=features,
                distortion=distortion,
                judge=judge,
                on_progress=show,
                on_warning=terminal.warn,
            )
        except process.Interrupted as stop:
            if process.is_first():
                terminal.say(f"{output}: interrupted, but nothing is lost; go on with: {_resuming(resume)}")
            return 128 + stop.number
        if not over and process.is_first():
            terminal.say(f"{output}: not trained to the end yet; go on with: {_resuming(resume)}")
    return report.status


def _resuming(resumed: bool) -> str:
    """This command as it is typed to go on with its run; `resumed` says whether it went on with one itself."""
    arguments = sys.argv[1:]
    if not resumed:  # what follows -- is no option
        arguments.insert(arguments.index("--") if "--" in arguments else len(arguments), "--resume")
    return shlex.join(["vqcodec", *arguments])


def _sheet(output: str) -> str:
    """Where the sheet of pictures of a run lies, whatever links lead there."""
    return os.path.realpath(Path(output).with_suffix(".png"))


def _check_training(
    pictures: Sequence[str],
    output: str,
    *,
    config: str | None,
    start_from: str | None,
    resume: bool,
    natural: bool,
) -> None:
    """Refuse combinations of arguments that `train` cannot use.

    Raises:
        click.UsageError: these arguments do not go together.
    """
    if Path(output).suffix != ".safetensors":
        raise click.UsageError(f"OUT must end in .safetensors, got {output}")
    if natural:
        if start_from is None and not resume:
            raise click.UsageError("--natural needs --from: the weights that the look is for.")
        name = Path(start_from).with_suffix(".natural.safetensors").name if start_from else Path(output).name
        if Path(output).name != name:
            raise click.UsageError(f"OUT of a natural look must be called {name} to be found, got {output}")
        if config is not None:
            raise click.UsageError("--natural has the configuration of --from: --config cannot change it.")
    sheet = _sheet(output)
    if any(os.path.realpath(path) == sheet for path in pictures):
        raise click.UsageError(f"the sheet of pictures beside OUT would replace the input {sheet}")


@main.command()
@click.argument("weights", metavar="[WEIGHTS]", required=False, type=options.WeightsPath())
@options.output_picture
@click.option("-n", "count", type=click.IntRange(1, 1024), default=16, show_default=True, help="Number of pictures.")
@click.option("--size", type=click.IntRange(1, 2048), help="Side of each picture in pixels.  [default: 256]")
@options.quality
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Below 1, probable codes are drawn more often; at 0, always the most probable.",
)
@click.option(
    "--complete",
    metavar="PICTURE",
    type=options.PATH,
    help="Keep the top of this picture and draw the rest.",
)
@click.option(
    "--rows", type=click.IntRange(min=0), help="Rows of codes to keep of --complete, from the top.  [default: half]"
)
@options.device
@options.seed
@options.force
def sample(
    weights: str | None,
    output: str,
    count: int,
    size: int | None,
    quality: int,
    temperature: float,
    complete: str | None,
    rows: int | None,
    device: str,
    seed: int,
    force: bool,
) -> int:
    """Draw pictures from the prior of a model. Several pictures make a contact sheet.

    \b
    Examples:
      vqcodec sample -n 9 -o sheet.png
      vqcodec sample my.safetensors --complete photo.png --rows 8 -o endings.png
    """
    if complete is None and rows is not None:
        raise click.UsageError("--rows says what to keep of --complete PICTURE.")
    if complete is not None and size is not None:
        raise click.UsageError("--complete PICTURE has a size of its own: --size cannot change it.")
    if not math.isfinite(temperature):
        raise click.UsageError("--temperature must be finite.")
    job = files.Job(complete or files.STREAM, output)
    _check_picture(job)
    report = ErrorReport()
    with report.errors_of(output):
        files.check(job, overwrite=force)
    picture = None
    if complete is not None and not report.failed:
        with report.errors_of(complete):
            from vqcodec import image

            picture = image.load(files.read(complete), max_pixels=limits.DEFAULT_MAX_PIXELS)
    if report.failed:
        return report.status
    with report.errors_of(complete or output):
        from vqcodec import image, sampling

        drawn = sampling.sample(
            count,
            weights_file=weights,
            height=size or 256,
            width=size or 256,
            quality=quality,
            temperature=temperature,
            seed=seed,
            picture=picture,
            rows=rows,
            device=device,
        )
        with terminal.counted_bar(drawn, count) as steps:
            sheet = image.contact_sheet(list(steps))
        _write_shown(job, image.Picture(sheet) if picture is None else _of_same_kind(picture, sheet), force)
    return report.status


@main.command()
@click.argument("source", metavar="PICTURE", type=options.PATH)
@options.output_picture
@options.quality
@click.option(
    "--levels",
    is_flag=True,
    help="Write a contact sheet: the coarsest level alone, then with each finer level, then the original.",
)
@options.weights
@options.device
@options.force
def reconstruct(
    source: str, output: str, quality: int, levels: bool, weights: str | None, device: str, force: bool
) -> int:
    """Show how a picture looks after compression, without making a .vqz file.

    \b
    Example:
      vqcodec reconstruct photo.png --levels -o levels.png
    """
    job = files.Job(source, output)
    _check_picture(job)
    report = ErrorReport()
    with report.errors_of(source):
        files.check(job, overwrite=force)
        from vqcodec import codec, image

        picture = image.load(files.read(source), max_pixels=limits.DEFAULT_MAX_PIXELS)
        restored = codec.reconstruct(picture, quality=quality, weights=weights, device=device)
        if levels:
            shown = _of_same_kind(picture, image.contact_sheet([*restored, picture.pixels]))
        else:
            shown = dataclasses.replace(picture, pixels=restored[-1], exif=None, xmp=None)
        _write_shown(job, shown, force)
    return report.status


def _of_same_kind(picture: "Picture", pixels: "NDArray[np.uint8]") -> "Picture":
    """Other pixels with the colours of a picture; they have no transparency."""
    notes = picture.notes if picture.alpha is None else (*picture.notes, "without its transparency")
    return dataclasses.replace(picture, pixels=pixels, alpha=None, exif=None, xmp=None, notes=notes)


def _write_shown(job: files.Job, picture: "Picture", force: bool) -> None:
    """Write a picture as its target can hold it, and print what is lost."""
    from vqcodec import image

    suffix = _suffix(job.target)
    adapted = image.adapt(picture, suffix)
    for note in adapted.notes:
        terminal.say(f"vqcodec: {job.source}: note: {note}")
    files.write(job.target, image.save(adapted, suffix), overwrite=force)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Report a ValueError of the body as wrong usage."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _plan(inputs: Sequence[str], output: str | None, suffixes: Sequence[str], new_suffix: str) -> list[files.Job]:
    """Decide which file goes where; see `files.plan`.

    Raises:
        click.UsageError: the inputs and the output do not go together, or standard output is a terminal.
    """
    with _usage():
        jobs = files.plan(inputs, output, suffixes=suffixes, new_suffix=new_suffix)
    _check_terminal(jobs)
    return jobs


def _check_picture(job: files.Job) -> None:
    """Refuse a target that no picture can be written to, or that is the source.

    Raises:
        click.UsageError: it is one of these.
    """
    _check_terminal([job])
    _check_suffixes([job])
    with _usage():
        files.check_distinct([job])


def _check_streams(paths: Sequence[str]) -> None:
    """Refuse to read standard input twice.

    Raises:
        click.UsageError: it is given more than once.
    """
    if list(paths).count(files.STREAM) > 1:
        raise click.UsageError("Standard input can be read only once.")


def _check_terminal(jobs: Iterable[files.Job]) -> None:
    """Refuse to write binary data to a terminal.

    Raises:
        click.UsageError: a target is standard output, and that is a terminal.
    """
    if any(job.target == files.STREAM for job in jobs) and sys.stdout.isatty():
        raise click.UsageError("Standard output is a terminal; give a file with -o, or redirect it.")


def _check_policy(jobs: Sequence[files.Job], policy: batch.Policy) -> None:
    """Refuse what cannot be done with standard streams and devices.

    Raises:
        click.UsageError: the policy asks for it.
    """
    names = [name for job in jobs for name in (job.source, job.target)]
    if policy.as_json and files.STREAM in [job.target for job in jobs]:
        raise click.UsageError("--json needs standard output for itself; give a file with -o.")
    if policy.remove and any(name == files.STREAM or _is_device(name) for name in names):
        raise click.UsageError("--rm needs files: standard streams and devices cannot be read back.")


def _is_device(path: str) -> bool:
    return files.is_special(path) and not os.path.isdir(path)


def _check_suffixes(jobs: Iterable[files.Job]) -> None:
    """Refuse targets whose suffix names no picture format that can be written.

    Raises:
        click.UsageError: there is such a target.
    """
    from vqcodec import image

    for suffix in {_suffix(job.target) for job in jobs}:
        try:
            image.check_suffix(suffix)
        except VqcodecError as error:
            raise click.UsageError(str(error)) from error


@contextlib.contextmanager
def _naming_limit(max_pixels: int) -> Iterator[None]:
    """Make an error of the body that states this limit name the option that sets it."""
    try:
        yield
    except VqcodecError as error:
        if str(error).endswith(f"the limit is {max_pixels}"):
            raise type(error)(f"{error}, --max-pixels changes it") from error
        raise


def _suffix(target: str) -> str:
    """The suffix that sets the format of a target: ".png" for standard output and for devices."""
    return ".png" if target == files.STREAM or files.is_special(target) else Path(target).suffix


def _refuse_with_ray(**given: object) -> None:
    """Refuse options that nothing of `batch.run_on_ray` heeds.

    Raises:
        click.UsageError: one of them is given.
    """
    for name, value in given.items():
        if value:
            raise click.UsageError(f"--ray does not know --{name.replace('_', '-')}.")
