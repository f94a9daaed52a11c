"""The figures of record: measurements on Kodak that are kept, and the tables and plots that are made of them.

    python -m bench.record [CODEC.json ...]

Takes over what bench.rate_distortion measured (the files CODEC.json of its output folder) into bench/results/, with
numbers rounded to five digits. Then writes what README.md, docs/results.md and bench/README.md say between the marks

    <!-- record: NAME --> ... <!-- end of record -->

anew from all that is in bench/results/, and draws the plots in docs/. Without files it only does the latter.
"""

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import plots
from bench.bd_rate import Curve, bd_rate
from bench.curves import AIM_RATES, Result, Row
from bench.measures import MEASURES

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "bench" / "results"
DOCUMENTS = ("README.md", "docs/results.md", "bench/README.md")
DIGITS = 5
BLOCK = re.compile(r"(<!-- record: ([a-z-]+) -->\n).*?(<!-- end of record -->)", re.DOTALL)

LOOKS = (30, 45, 60, 70, 80)  # SSIMULACRA2, points
LOOKS_CODECS = ("jpeg", "webp", "jxl", "avif", "vqcodec", "vqcodec-effort-9")
DECIBELS = (28, 30, 32, 34, 36)  # PSNR
DECIBELS_CODECS = ("jpeg", "webp", "jxl", "avif", "avif-psnr", "vqcodec-psnr", "vqcodec-psnr-effort-9")
OPPONENTS = ("jpeg", "webp", "jxl", "avif", "avif-psnr")
NATURAL_RATES = (0.1, 0.15, 0.3, 0.5)  # bits per pixel
NATURAL_MEASURES = ("psnr", "ssimulacra2", "lpips", "gmsd", "haarpsi")
PLOTTED = ("vqcodec", "vqcodec-psnr", "avif", "avif-psnr", "jxl", "webp", "jpeg")
PLOTS = {"ssimulacra2": "docs/kodak-ssimulacra2.png", "psnr": "docs/kodak-psnr.png"}

Record = Mapping[str, Result]  # by the key of the codec


def rounded(x: float | None) -> float | None:
    """x with DIGITS significant digits."""
    return None if x is None else float(f"{x:.{DIGITS}g}")


def compact(content: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a results file of rate_distortion.py: all but the seconds, each picture's values in columns."""
    columns = ["bytes", *(m.column for m in MEASURES.values() if m.column in content["results"])]
    pictures: dict[str, dict[str, Any]] = {}
    for row in content["pictures"]:
        entry = {"picture": row["picture"], "width": row["width"], "height": row["height"]}
        entry = pictures.setdefault(row["picture"], entry | {column: [] for column in columns})
        for column in columns:
            entry[column].append(row[column] if column == "bytes" else rounded(row[column]))
    kept = {key: content[key] for key in ("name", "description", "meta")}
    kept["results"] = {"quality": [int(q) if q == int(q) else q for q in content["results"]["quality"]]}
    kept["pictures"] = list(pictures.values())
    for column, means in result("", kept).columns.items():
        kept["results"].setdefault(column, [rounded(mean) for mean in means])
    return kept


def result(key: str, content: Mapping[str, Any]) -> Result:
    """Of a compact results file: the means, and what they were taken over."""
    own = ("picture", "width", "height", "bytes")
    rows = []
    for entry in content["pictures"]:
        size = entry["picture"], entry["width"], entry["height"]
        for i, quality in enumerate(content["results"]["quality"]):
            values = {name: column[i] for name, column in entry.items() if name not in own}
            values = {name: math.nan if value is None else value for name, value in values.items()}
            rows.append(Row(*size, quality, entry["bytes"][i], 0.0, 0.0, values))
    found = Result.of(key, content["name"], content["description"], rows)
    columns = {name: values for name, values in found.columns.items() if not name.endswith("_time")}
    return Result(key, found.title, found.description, columns, rows)


def text_of(content: Mapping[str, Any]) -> str:
    """JSON with a line for each column."""

    def line(found: re.Match[str]) -> str:
        return re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]")

    return re.sub(r"\[[^][{}]*\]", line, json.dumps(content, indent=1, allow_nan=False)) + "\n"


def load(folder: Path = FOLDER) -> dict[str, Result]:
    """All that is kept, by the key of the codec."""
    return {path.stem: result(path.stem, json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json"))}


# Tables


def _curve(record: Record, key: str, measure: str) -> Curve | None:
    return record[key].curve(MEASURES[measure]) if key in record else None


def _percent(record: Record, test: str, anchor: str, measure: str, rates: tuple[float, float] | None = None) -> str:
    """BD-rate in percent; empty if one of the two was not measured by it."""
    a, b = _curve(record, anchor, measure), _curve(record, test, measure)
    found = bd_rate(a, b, rates=rates) if a and b else None
    if found is None:
        return ""
    return f"{found.percent:+.1f} %" if abs(found.percent) < 9.95 else f"{found.percent:+.0f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _titles(record: Record, keys: Sequence[str]) -> list[str]:
    return [record[key].title for key in keys]


def _rates_table(record: Record, measure: str, levels: Sequence[float], unit: str, keys: Sequence[str]) -> str:
    """Bits per pixel that each codec needs for each quality; empty where its curve does not reach."""
    rows = []
    for level in levels:
        cells = []
        for key in keys:
            curve = _curve(record, key, measure)
            inside = curve is not None and curve.quality[0] <= level <= curve.quality[-1]
            cells.append(f"{float(curve.rate_at(level)):.3f}" if curve and inside else "")
        rows.append([f"{level:g}{unit}", *cells])
    return _table([MEASURES[measure].title, *_titles(record, keys)], rows)


def saving(record: Record) -> str:
    """The README's first figures."""

    def against(key: str, anchor: str, measure: str) -> str:
        percent = _percent(record, key, anchor, measure)
        return f"{percent[1:]} {'smaller' if percent.startswith('-') else 'larger'} than {record[anchor].title}"

    looks, squares, searched, searched_squares = (
        [against(key, anchor, measure) for anchor in ("jpeg", "jxl", "avif")]
        for key, measure in (
            ("vqcodec", "ssimulacra2"),
            ("vqcodec-psnr", "psnr"),
            ("vqcodec-effort-9", "ssimulacra2"),
            ("vqcodec-psnr-effort-9", "psnr"),
        )
    )
    text = (
        f"At equal looks (SSIMULACRA2, BD-rates on Kodak) files are {looks[0]}, {looks[1]} and {looks[2]}; with"
        f" `--effort 9` they are {searched[0]}, {searched[1]} and {searched[2]}."
        f" At equal PSNR, with `--tune psnr`, they are {squares[0]}, {squares[1]} and {squares[2]}; with `--effort 9`"
        f" {searched_squares[0]}, {searched_squares[1]} and {searched_squares[2]}."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def source(record: Record) -> str:
    """What was measured."""
    pictures = len({row.picture for row in record["vqcodec"].rows})
    found = re.search(r"id ([0-9a-f]{8})", record["vqcodec"].description)
    return f"Kodak, {pictures} pictures, means, weights {found[1] if found else 'unknown'}."


def looks_table(record: Record) -> str:
    return _rates_table(record, "ssimulacra2", LOOKS, "", LOOKS_CODECS)


def psnr_table(record: Record) -> str:
    return _rates_table(record, "psnr", DECIBELS, " dB", DECIBELS_CODECS)


def bd_rates_table(record: Record) -> str:
    """Both tunes against the best opponents, and against each other."""
    return _bd_rates(record, ("jxl", "avif"))


def all_bd_rates_table(record: Record) -> str:
    """Both tunes against all others, and against each other."""
    return _bd_rates(record, OPPONENTS)


def _bd_rates(record: Record, opponents: Sequence[str]) -> str:
    pairs = [("vqcodec", key) for key in (*opponents, "vqcodec-psnr")] + [("vqcodec-psnr", key) for key in opponents]
    measures = [key for key in MEASURES if _curve(record, pairs[0][0], key)]
    rows = [
        [record[test].title, record[anchor].title, *(_percent(record, test, anchor, key) for key in measures)]
        for test, anchor in pairs
    ]
    return _table(["BD-rate of", "against", *(MEASURES[key].title for key in measures)], rows)


def jpeg_table(record: Record) -> str:
    """Everything that is kept against JPEG, BD-rates."""
    first = ("vqcodec", "vqcodec-psnr")
    others = [key for key in (*first, *(k for k in record if k not in first)) if key in record and key != "jpeg"]
    measures = [key for key in MEASURES if _curve(record, "jpeg", key)]
    low, high = AIM_RATES
    rows = [
        [
            record[key].title,
            _percent(record, key, "jpeg", "psnr", AIM_RATES),
            *(_percent(record, key, "jpeg", measure) for measure in measures),
        ]
        for key in others
    ]
    return _table(["against JPEG", f"PSNR, {low}-{high} bpp", *(MEASURES[key].title for key in measures)], rows)


def effort_table(record: Record) -> str:
    """Searches of different length against none and against the best opponents, BD-rates."""
    keys = [key for key in record if "-effort-" in key]
    measures = [key for key in MEASURES if any(_curve(record, k, key) for k in keys)]
    rows = [
        [record[key].title, record[anchor].title, *(_percent(record, key, anchor, measure) for measure in measures)]
        for key in keys
        for anchor in (key.partition("-effort-")[0], "jxl", "avif")
    ]
    return _table(["BD-rate of", "against", *(MEASURES[key].title for key in measures)], rows)


def natural_table(record: Record) -> str:
    """The faithful and the natural look of the same files at given rates."""
    measures = [MEASURES[key] for key in NATURAL_MEASURES if _curve(record, "vqcodec-natural", key)]
    lowest = np.array(record["vqcodec-natural"].columns["bpp"], float).min() if measures else 0.0
    rows = []
    for rate in (rate for rate in NATURAL_RATES if rate >= lowest):
        cells = []
        for measure in measures:
            values = (_at(record[key], measure.column, rate) for key in ("vqcodec", "vqcodec-natural"))
            cells.append(" / ".join(f"{value:.{min(3, measure.digits)}f}" for value in values))
        rows.append([f"{rate:g}", *cells])
    return _table(["bits per pixel", *(measure.title for measure in measures)], rows)


def _at(found: Result, column: str, rate: float) -> float:
    """A mean between measured points, interpolated over the logarithm of the rate."""
    bpp, values = (np.array(found.columns[name], float) for name in ("bpp", column))
    return float(np.interp(np.log(rate), np.log(bpp), values))


BLOCKS: dict[str, Callable[[Record], str]] = {
    "saving": saving,
    "source": source,
    "looks": looks_table,
    "psnr": psnr_table,
    "bd-rates": bd_rates_table,
    "all-bd-rates": all_bd_rates_table,
    "against-jpeg": jpeg_table,
    "effort": effort_table,
    "natural": natural_table,
}


def fill(text: str, record: Record) -> str:
    """A document with everything between marks made anew.

    Raises:
        ValueError: a mark names nothing that is known.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise ValueError(f"no block is called '{found[2]}': expected one of {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[found[2]](record)}\n{found[3]}"

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="CODEC.json", help="results of bench.rate_distortion")
    given = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    try:
        for path in given.files:
            (FOLDER / path.name).write_text(text_of(compact(json.loads(path.read_text("utf-8")))), "utf-8")
        record = load()
        filled = {name: fill((REPOSITORY / name).read_text("utf-8"), record) for name in DOCUMENTS}
    except (OSError, ValueError, KeyError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    for name, text in filled.items():
        (REPOSITORY / name).write_text(text, "utf-8")
    images = plots.draw([record[key] for key in PLOTTED], [MEASURES[key] for key in PLOTS])
    for key, data in images.items():
        (REPOSITORY / PLOTS[key]).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
