"""Rate-distortion curves of vqcodec and the classic codecs.

Every picture is encoded at every quality, the file written and its bytes counted, read back, decoded and compared with
the original. Results: one JSON file per codec, one plot per measure, BD-rates, and a report in one HTML file.

    python -m bench.rate_distortion [FOLDER_OR_PICTURES...] [-o out/rd]
"""

import argparse
import functools
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench import codecs, measures, plots, report
from bench.bd_rate import BdRate, bd_rate
from bench.curves import AIM_RATES, Aim, Comparison, Result, Row, aim, comparisons, published
from bench.measures import MEASURES, Measure
from vqcodec import files
from vqcodec.errors import VqcodecError
from vqcodec.metrics import psnr

REPOSITORY = Path(__file__).resolve().parents[1]
KODAK = REPOSITORY.parent / "shared" / "data" / "kodak"
ANCHORS = REPOSITORY.parent / "shared" / "anchors" / "kodak"
SAMPLE = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
KODAK_NAMES = {f"kodim{number:02d}" for number in range(1, 25)}

TABLE_RATES = (0.08, 0.15, 0.3, 0.5, 1.0)  # bits per pixel
COMPARED_PICTURES = 4
COMPARED_RATES = (0.15, 0.5)  # bits per pixel
COMPARED_CODECS = ("vqcodec", "vqcodec-psnr", "vqcodec-natural", "avif", "jxl", "jpeg")
COMPARED_SIDE = 1024  # bigger pictures are cut to their middle, to keep the report small
BD_RATE_TEXT = (
    "How many bits a codec (row) needs more or less than another (column) at equal quality, averaged over the range of "
    "quality given below each number, which is the range both curves reach. Negative is better. Bits per pixel and "
    "quality "
    "are first averaged over the pictures."
)
COMPARED_TEXT = (
    "Point at a picture to see the same place of all of them pixel for pixel. The first codec takes its quality "
    "nearest to "
    "the stated rate, the others theirs nearest to its bytes."
)
BROWSER_TYPES = {".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif", ".png": "image/png"}


@dataclass(frozen=True)
class Settings:
    """What a worker process needs to know."""

    qualities: dict[str, tuple[float, ...]]
    measures: tuple[str, ...]
    weights: Path | None
    lpips: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # of worker processes, which import torch later
    torch.set_num_threads(1)  # of this one
    try:
        pictures = find_pictures(options.pictures)
        chosen = choose_codecs(options.codecs, options.weights)
        chosen_measures = choose_measures(options.metrics, options.lpips)
        qualities = parse_qualities(options.qualities, chosen)
    except ValueError as error:
        print(f"rate_distortion: {error}", file=sys.stderr)
        return 2
    if not chosen or not chosen_measures:
        print("rate_distortion: nothing to measure", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)

    settings = Settings(qualities, tuple(m.key for m in chosen_measures), options.weights, options.lpips)
    results = []
    for codec in chosen:
        start = time.perf_counter()
        description = f"{codec.settings}. {codec.version}"
        rows = None
        if options.reuse and not codec.key.startswith("vqcodec"):
            rows = reusable(options.output / f"{codec.key}.json", description, pictures, settings, codec.key)
        try:
            rows = rows or measure_all(codec.key, pictures, settings, options.jobs)
        except VqcodecError as error:
            print(f"rate_distortion: {codec.title}: {error}", file=sys.stderr)
            return 1
        results.append(Result.of(codec.key, codec.title, description, rows))
        note = f"{len(pictures)} pictures, {len(qualities[codec.key])} qualities"
        print(f"{codec.title}: {note}, {time.perf_counter() - start:.0f} s", file=sys.stderr)

    curves = [*results, *load_published(pictures, options.anchors)]
    meta = {"dataset": ", ".join(sorted({p.parent.name for p in pictures})), "pictures": len(pictures), **versions()}
    for result in results:
        _write_json(options.output / f"{result.key}.json", result.to_json(meta))
    images = plots.draw(curves, chosen_measures)
    for key, data in images.items():
        (options.output / f"{key}.png").write_bytes(data)
    compared = comparisons(curves, chosen_measures)
    reached = aim(results, MEASURES["psnr"])
    summary = {"bd_rate": [comparison.to_json() for comparison in compared], "meta": meta}
    _write_json(options.output / "bd_rate.json", summary)
    rows_shown = compare_pictures(pictures, chosen)
    page = build_report(results, curves, chosen_measures, images, compared, reached, rows_shown, pictures, options.jobs)
    (options.output / "report.html").write_text(page, "utf-8")

    for measure in chosen_measures:
        print(f"\nBD-rate by {measure.title}, % [range of {measure.unit}]")
        print(text_table(*bd_table(compared, measure)))
        print(f"\n{measure.title} at equal rates\n{text_table(*rate_table(curves, measure))}")
    print("\n" + "\n".join(aim_lines(reached)))
    print(f"\nReport: {options.output / 'report.html'}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rate-distortion curves of vqcodec and the classic codecs.")
    parser.add_argument(
        "pictures", nargs="*", type=Path, help="folders or pictures; default: the Kodak folder, else a sample photo"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out/rd"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--codecs", default=",".join(codecs.USUAL), help=f"of {', '.join(codecs.KEYS)}; default: %(default)s"
    )
    parser.add_argument("--weights", type=Path, help="weights file of vqcodec (default: the packaged one)")
    parser.add_argument(
        "--qualities",
        action="append",
        default=[],
        metavar="CODEC=Q,Q,...",
        help="operating points of one codec, on its own scale; may be repeated",
    )
    parser.add_argument("--metrics", default=",".join(MEASURES), help="default: %(default)s")
    parser.add_argument(
        "--lpips", type=Path, metavar="FOLDER", help="has alexnet_features.safetensors; needed for LPIPS"
    )
    parser.add_argument(
        "--anchors", type=Path, default=ANCHORS, metavar="FOLDER", help="published Kodak curves (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes, one thread each; times are best with 1 (default)"
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="take the other codecs' results from the output folder where version, pictures and qualities are the same",
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def find_pictures(given: Sequence[Path]) -> list[Path]:
    """The picture files of folders and files; without any, the Kodak folder or else matplotlib's sample photo."""
    if not given:
        given = [KODAK if KODAK.is_dir() else SAMPLE]
    for path in given:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    return [Path(name) for name, _ in files.find(map(str, given), files.PICTURE_SUFFIXES)]


def choose_codecs(names: str, weights: Path | None) -> list[codecs.Codec]:
    """The codecs of a comma-separated list; one that cannot run is skipped with a line."""
    chosen = []
    for key in dict.fromkeys(names.split(",")):
        try:
            chosen.append(codecs.get(key, weights=weights))
        except codecs.CodecUnavailableError as error:
            print(f"{key}: left out: {error}", file=sys.stderr)
    return chosen


def choose_measures(names: str, lpips: Path | None) -> list[Measure]:
    """The measures of a comma-separated list; one that cannot be computed is skipped with a line."""
    chosen = []
    for key in dict.fromkeys(names.split(",")):
        try:
            measures.function(key, lpips)
        except measures.MeasureUnavailableError as error:
            print(f"{key}: left out: {error}", file=sys.stderr)
        else:
            chosen.append(MEASURES[key])
    return chosen


def parse_qualities(given: Sequence[str], chosen: Sequence[codecs.Codec]) -> dict[str, tuple[float, ...]]:
    """Operating points by codec: the defaults, replaced by "CODEC=Q,Q,..."."""
    qualities = {codec.key: codec.qualities for codec in chosen}
    for text in given:
        key, _, values = text.partition("=")
        if key not in codecs.KEYS:
            raise ValueError(f"--qualities {text}: unknown codec '{key}', expected one of {', '.join(codecs.KEYS)}")
        try:
            points = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"--qualities {text}: expected CODEC=NUMBER,NUMBER,...") from None
        if key in qualities:
            qualities[key] = points
    return qualities


def reusable(file: Path, description: str, pictures: Sequence[Path], settings: Settings, key: str) -> list[Row] | None:
    """The rows of an earlier run of the same codec version on the same pictures, qualities and measures, if any."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text("utf-8"))
    columns = [MEASURES[name].column for name in settings.measures]
    rows = content["pictures"]
    wanted = [(path.name, quality) for path in pictures for quality in settings.qualities[key]]
    if content["description"] != description or [(r["picture"], r["quality"]) for r in rows] != wanted:
        return None
    if any(r.get(column) is None for r in rows for column in columns):
        return None
    own = ("picture", "width", "height", "quality", "bytes", "encoding_time", "decoding_time")
    return [Row(**{name: r[name] for name in own}, values={c: r[c] for c in columns}) for r in rows]


def measure_all(key: str, pictures: Sequence[Path], settings: Settings, jobs: int) -> list[Row]:
    """Every picture at every quality of one codec, in as many processes as `jobs` says."""
    work = functools.partial(measure_picture, key, settings=settings)
    if jobs == 1:
        return [row for path in pictures for row in work(path)]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(jobs, len(pictures)), mp_context=context) as pool:
        return [row for rows in pool.map(work, pictures) for row in rows]


def measure_picture(key: str, path: Path, settings: Settings) -> list[Row]:
    """One picture at every quality of one codec: real files, read back."""
    codec = _codec(key, settings.weights)
    pixels = load(path)
    functions = {MEASURES[name].column: _function(name, settings.lpips) for name in settings.measures}
    _warm_up(key, settings.weights)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"picture{codec.suffix}"
        for quality in settings.qualities[key]:
            start = time.perf_counter()
            data = codec.encode(pixels, quality)
            encoding_time = time.perf_counter() - start
            file.write_bytes(data)
            size = file.stat().st_size
            data = file.read_bytes()
            start = time.perf_counter()
            decoded = codec.decode(data)
            decoding_time = time.perf_counter() - start
            values = {column: compute(pixels, decoded) for column, compute in functions.items()}
            height, width = pixels.shape[:2]
            rows.append(Row(path.name, width, height, quality, size, encoding_time, decoding_time, values))
    return rows


@functools.cache
def _codec(key: str, weights: Path | None) -> codecs.Codec:
    return codecs.get(key, weights=weights)


@functools.cache
def _function(key: str, lpips: Path | None) -> measures.Function:
    return measures.function(key, lpips)


@functools.cache
def _warm_up(key: str, weights: Path | None) -> None:
    """Load weights and libraries before the first measured time, once a process."""
    codec = _codec(key, weights)
    codec.decode(codec.encode(np.zeros((64, 64, 3), np.uint8), codec.qualities[len(codec.qualities) // 2]))


def load(path: Path) -> NDArray[np.uint8]:
    """A picture file as uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def load_published(pictures: Sequence[Path], folder: Path) -> list[Result]:
    """The published curves, if the pictures are the 24 that those are means of."""
    if not folder.is_dir():
        return []
    if len(pictures) != len(KODAK_NAMES) or {path.stem for path in pictures} != KODAK_NAMES:
        print("published curves: left out: they are means over the 24 Kodak pictures", file=sys.stderr)
        return []
    return published(folder)


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("vqcodec", "torch", "numpy", "pillow", "imagecodecs", "cvvdp")
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return {"python": platform.python_version(), "machine": platform.platform(), **installed}


def compare_pictures(pictures: Sequence[Path], chosen: Sequence[codecs.Codec]) -> list[tuple[str, list[report.Shot]]]:
    """Rows of pictures of nearly equal size: the original and each of COMPARED_CODECS.

    The first codec takes the quality nearest to the rate, the others the quality nearest to the first one's bytes.
    """
    by_key = {codec.key: codec for codec in chosen}
    shown = [by_key[key] for key in COMPARED_CODECS if key in by_key]
    count = min(COMPARED_PICTURES, len(pictures))
    picked = [pictures[round(i * (len(pictures) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = []
    for path in picked if shown else []:
        pixels = load(path)
        height, width = pixels.shape[:2]
        for rate in COMPARED_RATES:
            shots = [_shot("Original", f"{width} x {height}", pixels, None, "")]
            size = rate * width * height / 8
            for codec in shown:
                quality, data = codecs.nearest_quality(codec, pixels, size)
                size = size if shots[1:] else len(data)
                decoded = codec.decode(data)
                bpp = 8 * len(data) / (width * height)
                decibel = psnr(pixels, decoded)
                caption = f"{len(data):,} bytes, {bpp:.3f} bpp, {decibel:.2f} dB, quality {quality:g}"
                shots.append(_shot(codec.title, caption, decoded, data, codec.suffix))
            rows.append((f"{path.stem} at {rate} bits per pixel", shots))
    return rows


def _shot(title: str, caption: str, pixels: NDArray[np.uint8], data: bytes | None, suffix: str) -> report.Shot:
    """A picture as a browser can show it: the codec's own file where it knows the format, else lossless WebP."""
    height, width = pixels.shape[:2]
    if data is not None and suffix in BROWSER_TYPES and max(height, width) <= COMPARED_SIDE:
        return report.Shot(title, caption, BROWSER_TYPES[suffix], data, width, height)
    top, left = max(height - COMPARED_SIDE, 0) // 2, max(width - COMPARED_SIDE, 0) // 2
    middle = np.ascontiguousarray(pixels[top : top + COMPARED_SIDE, left : left + COMPARED_SIDE])
    buffer = io.BytesIO()
    Image.fromarray(middle).save(buffer, "WEBP", lossless=True)
    return report.Shot(title, caption, "image/webp", buffer.getvalue(), middle.shape[1], middle.shape[0])


def _columns(compared: Sequence[Comparison]) -> list[tuple[str, tuple[float, float] | None]]:
    return list(dict.fromkeys((c.anchor, c.rates) for c in compared))


def bd_table(compared: Sequence[Comparison], measure: Measure) -> tuple[list[str], list[list[str | report.Cell]]]:
    """Header and rows: a codec a row, an anchor a column."""
    mine = [c for c in compared if c.measure == measure.key]
    columns = _columns(mine)
    cells = {(c.test, c.anchor, c.rates): _bd_cell(c.value, measure) for c in mine}
    header = ["", *(f"vs {anchor}" + (f", {rates[0]}-{rates[1]} bpp" if rates else "") for anchor, rates in columns)]
    tests = list(dict.fromkeys(c.test for c in mine))
    return header, [[test, *(cells.get((test, *column), "") for column in columns)] for test in tests]


def rate_table(curves: Sequence[Result], measure: Measure) -> tuple[list[str], list[list[str | report.Cell]]]:
    """Header and rows: what each codec comes to at TABLE_RATES, interpolated over the logarithm of the rate."""
    rows: list[list[str | report.Cell]] = []
    for result in curves:
        values = result.columns.get(measure.column, ())
        points = [(b, x) for b, x in zip(result.columns["bpp"], values) if b is not None and x is not None]  # noqa: B905
        if points:
            bpp, value = (np.array(column) for column in zip(*sorted(points), strict=True))
            found = np.interp(np.log(TABLE_RATES), np.log(bpp), value, left=np.nan, right=np.nan)
            rows.append([result.title, *("" if np.isnan(x) else f"{x:.{measure.digits}f}" for x in found)])
    return ["bits per pixel", *map(str, TABLE_RATES)], rows


def _bd_cell(value: BdRate | None, measure: Measure) -> report.Cell:
    if value is None:
        return report.Cell("no common range")
    return report.Cell(f"{value.percent:+.1f} %", f"{value.low:.1f} to {value.high:.1f} {measure.unit}")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str | report.Cell]]) -> str:
    """A table for a terminal, the first column to the left."""

    def text(cell: str | report.Cell) -> str:
        if isinstance(cell, str):
            return cell
        low, _, high = cell.small.rpartition(" ")[0].partition(" to ")
        return f"{cell.text.removesuffix(' %')} [{low}..{high}]" if cell.small else cell.text

    lines = [list(header), *([text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def aim_lines(reached: Aim | None) -> list[str]:
    """The check against JPEG in words."""
    head = f"Against JPEG, PSNR, {AIM_RATES[0]} to {AIM_RATES[1]} bpp"
    if reached is None:
        return [f"{head}: not checked, vqcodec or JPEG was not measured"]
    value = reached.value
    found = f"{value.percent:+.1f} % over {value.low:.2f} to {value.high:.2f} dB" if value else "no common range"
    lines = [f"{head}: {found}; asked: at least 20 % fewer bits: {_verdict(reached.average_holds)}"]
    for level in reached.levels:
        jpeg = "outside its PSNR range" if level.jpeg_bpp is None else f"{level.jpeg_bpp:.3f} bpp"
        lines.append(
            f"  quality {level.quality:g}: {level.bpp:.3f} bpp, {level.psnr:.2f} dB;"
            f" JPEG at that PSNR: {jpeg}: {_verdict(level.holds)}"
        )
    lines.append(f"No worse than JPEG at every quality level: {_verdict(reached.levels_hold)}")
    return lines


def _verdict(holds: bool | None) -> str:
    return "not comparable" if holds is None else "holds" if holds else "FAILS"


def build_report(
    results: Sequence[Result],
    curves: Sequence[Result],
    chosen: Sequence[Measure],
    images: dict[str, bytes],
    compared: Sequence[Comparison],
    reached: Aim | None,
    shots: Sequence[tuple[str, list[report.Shot]]],
    pictures: Sequence[Path],
    jobs: int,
) -> str:
    """The HTML page."""
    own = frozenset({"vqcodec"})
    check = aim_lines(reached)
    sections = [
        report.Section(
            "BD-rate",
            [
                BD_RATE_TEXT,
                check[0] + ". " + (check[-1] + "." if reached else ""),
            ],
            tables=[
                (f"By {measure.title}", report.Table(header, rows, own))
                for measure in chosen
                for header, rows in [bd_table(compared, measure)]
                if rows
            ],
        ),
        report.Section(
            "At equal rates",
            ["Between measured points, interpolated over the logarithm of the rate."],
            tables=[
                (measure.title, report.Table(*table, own))
                for measure in chosen
                if (table := rate_table(curves, measure))[1]
            ],
        ),
        *([report.Section("Quality levels beside JPEG", tables=[("", _aim_table(reached))])] if reached else []),
        report.Section("Curves", plots=[(MEASURES[key].title, data) for key, data in images.items()]),
        report.Section(
            "Pictures at similar size",
            [COMPARED_TEXT],
            rows=shots,
        ),
        report.Section("Picture by picture", tables=[("", t) for t in _picture_tables(results)]),
        report.Section(
            "All operating points",
            [f"Means over {len(pictures)} pictures. Times with {jobs} process(es), one thread each."],
            tables=[(result.title, _points_table(result, chosen)) for result in results],
            folded=True,
        ),
        report.Section("Settings and versions", tables=[("", _settings_table(curves))]),
    ]
    names = ", ".join(sorted({path.parent.name for path in pictures}))
    return report.render(
        "Rate and distortion of vqcodec", f"{len(pictures)} pictures ({names}); {time.strftime('%Y-%m-%d')}", sections
    )


def _picture_tables(results: Sequence[Result]) -> Iterator[report.Table]:
    """BD-rates by PSNR against JPEG, and against AVIF for PSNR, for every picture."""
    psnr = MEASURES["psnr"]
    for anchor in results:
        if anchor.key not in ("jpeg", "avif-psnr") or psnr.column not in anchor.columns:
            continue
        others = [result for result in results if result is not anchor]
        rows: list[list[str | report.Cell]] = []
        for picture in dict.fromkeys(row.picture for row in anchor.rows):
            known = anchor.curve_of(picture, psnr)
            line: list[str | report.Cell] = [picture]
            for result in others:
                curve = result.curve_of(picture, psnr)
                line.append(_bd_cell(bd_rate(known, curve) if known and curve else None, psnr))
            rows.append(line)
        yield report.Table([f"By PSNR, against {anchor.title}", *(result.title for result in others)], rows)


def _points_table(result: Result, chosen: Sequence[Measure]) -> report.Table:
    columns = {
        "quality": ("quality", "{:g}"),
        "bpp": ("bpp", "{:.3f}"),
        **{measure.column: (measure.title, f"{{:.{measure.digits}f}}") for measure in chosen},
        "encoding_time": ("encoding, s", "{:.3f}"),
        "decoding_time": ("decoding, s", "{:.3f}"),
    }
    formatted = [
        ["" if value is None else style.format(value) for value in result.columns[name]]
        for name, (_, style) in columns.items()
    ]
    return report.Table([title for title, _ in columns.values()], list(zip(*formatted, strict=True)))


def _aim_table(reached: Aim) -> report.Table:
    rows = [
        [
            f"{level.quality:g}",
            f"{level.psnr:.2f}",
            f"{level.bpp:.3f}",
            *(
                (f"{level.jpeg_bpp:.3f}", f"{100 * (level.bpp / level.jpeg_bpp - 1):+.1f} %")
                if level.jpeg_bpp
                else ("", "")
            ),
            _verdict(level.holds),
        ]
        for level in reached.levels
    ]
    return report.Table(
        ["quality", "PSNR, dB", "bpp", "JPEG's bpp at that PSNR", "difference", "no worse than JPEG"], rows
    )


def _settings_table(curves: Sequence[Result]) -> report.Table:
    rows = [[result.title, result.description] for result in curves]
    return report.Table(["", ""], [*rows, *([name, text] for name, text in versions().items())], text=True)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
