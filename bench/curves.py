"""Measured and published results: averaging, results files, BD-rates."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bd_rate import BdRate, Curve, bd_rate
from bench.measures import Measure

# What the table of published curves shows: file (and entry of extra-published.json), title.
PUBLISHED = (
    ("jpeg.json", "", "JPEG, published"),
    ("webp.json", "", "WebP, published"),
    ("8bit-decoded/compressai-mbt2018-mean_mse_ans_cuda.json", "", "mean-scale hyperprior, published"),
    ("bpg_444_x265_ycbcr.json", "", "BPG 4:4:4, published"),
    ("av1.json", "", "AV1, published"),
    ("vtm.json", "", "VTM, published"),
    ("paper-elic2022_mse.json", "", "ELIC, published"),
    ("extra-published.json", "HPCM-Large", "HPCM-Large, published"),
)
PUBLISHED_JPEG = "JPEG, published"

# The first aim of the project: this many percent against JPEG between these rates, and never behind it.
AIM_PERCENT = -20.0
AIM_RATES = (0.15, 0.8)


@dataclass(frozen=True)
class Row:
    """One picture at one quality of one codec.

    Attributes:
        picture: file name.
        width: pixels.
        height: pixels.
        quality: the codec's own scale.
        bytes: size of the file on disk.
        encoding_time: seconds.
        decoding_time: seconds.
        values: measure column -> value of the decoded 8-bit picture.
    """

    picture: str
    width: int
    height: int
    quality: float
    bytes: int
    encoding_time: float
    decoding_time: float
    values: Mapping[str, float]

    @property
    def bpp(self) -> float:
        return 8 * self.bytes / (self.width * self.height)


@dataclass(frozen=True)
class Result:
    """A codec's mean curve.

    Attributes:
        key: the codec's name on the command line, "" for a published curve.
        title: its name in tables and plots.
        description: library, version, settings.
        columns: column -> one mean for each operating point, None where it is not finite.
        rows: what the means were taken over.
    """

    key: str
    title: str
    description: str
    columns: Mapping[str, Sequence[float | None]]
    rows: Sequence[Row] = ()

    @staticmethod
    def of(key: str, title: str, description: str, rows: Sequence[Row]) -> "Result":
        """Means over pictures for each quality: of bits per pixel, of every measure (PSNR in dB), of seconds."""
        columns: dict[str, list[float | None]] = {}
        for quality in dict.fromkeys(row.quality for row in rows):
            group = [row for row in rows if row.quality == quality]
            means: dict[str, float] = {"quality": quality, "bpp": statistics.fmean([row.bpp for row in group])}
            for column in group[0].values:
                means[column] = statistics.fmean([row.values[column] for row in group])
            means["encoding_time"] = statistics.fmean([row.encoding_time for row in group])
            means["decoding_time"] = statistics.fmean([row.decoding_time for row in group])
            for column, mean in means.items():
                columns.setdefault(column, []).append(finite(mean))
        return Result(key, title, description, columns, rows)

    def curve(self, measure: Measure) -> Curve | None:
        """Quality, on the measure's scale, over rate; None if it was not measured."""
        if measure.column not in self.columns:
            return None
        quality = [None if x is None else measure.scale(x) for x in self.columns[measure.column]]
        return Curve.of(self.columns["bpp"], quality)

    def curve_of(self, picture: str, measure: Measure) -> Curve | None:
        """The curve of one picture."""
        rows = [row for row in self.rows if row.picture == picture]
        return Curve.of([row.bpp for row in rows], [measure.scale(row.values[measure.column]) for row in rows])

    def to_json(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The results file: CompressAI's keys, and the single measurements under "pictures"."""
        pictures = [
            {
                "picture": row.picture,
                "width": row.width,
                "height": row.height,
                "quality": row.quality,
                "bytes": row.bytes,
                "bpp": row.bpp,
                **{column: finite(value) for column, value in row.values.items()},
                "encoding_time": row.encoding_time,
                "decoding_time": row.decoding_time,
            }
            for row in self.rows
        ]
        return {
            "name": self.title,
            "description": self.description,
            "meta": dict(meta),
            "results": dict(self.columns),
            "pictures": pictures,
        }


def finite(x: float) -> float | None:
    """x, or None where JSON has no number for it."""
    return x if math.isfinite(x) else None


def published(folder: Path) -> list[Result]:
    """The curves of PUBLISHED that are in `folder`, means over the 24 Kodak pictures."""
    results = []
    for file, entry, title in PUBLISHED:
        if not (folder / file).is_file():
            continue
        content = json.loads((folder / file).read_text("utf-8"))
        if not entry:
            results.append(Result("", title, content["description"], content["results"]))
            continue
        for found in content["entries"]:
            if found["name"] == entry:
                columns = dict(zip(found["metrics"], zip(*found["points"], strict=True), strict=True))
                results.append(Result("", title, f"{found['repo']} {found['path']}", columns))
    return results


@dataclass(frozen=True)
class Comparison:
    """BD-rate of `test` against `anchor` by one measure, None if the curves share no range of quality."""

    measure: str
    test: str
    anchor: str
    rates: tuple[float, float] | None
    value: BdRate | None

    def to_json(self) -> dict[str, Any]:
        value = self.value
        return {
            "measure": self.measure,
            "test": self.test,
            "anchor": self.anchor,
            "rates": self.rates,
            "percent": value and value.percent,
            "quality_range": value and [value.low, value.high],
        }


def comparisons(results: Sequence[Result], measures: Sequence[Measure]) -> list[Comparison]:
    """BD-rates of every curve against JPEG (measured and published), vqcodec, AVIF and JPEG XL.

    Against JPEG also over AIM_RATES.
    """
    anchors = ("vqcodec", "avif", "avif-psnr", "jxl")
    found = []
    for measure in measures:
        curves = {result.title: curve for result in results if (curve := result.curve(measure))}
        keys = {result.title: result.key for result in results}
        jpeg = [title for title in curves if keys[title] == "jpeg"]
        others = [title for title in curves if title == PUBLISHED_JPEG or keys[title] in anchors]
        pairs = [(anchor, None) for anchor in jpeg + others] + [(anchor, AIM_RATES) for anchor in jpeg]
        for anchor, rates in pairs:
            for test, curve in curves.items():
                if test != anchor:
                    value = bd_rate(curves[anchor], curve, rates=rates)
                    found.append(Comparison(measure.key, test, anchor, rates, value))
    return found


@dataclass(frozen=True)
class AimLevel:
    """One operating point beside JPEG at the same PSNR.

    Outside the PSNR range of the JPEG curve `jpeg_bpp` is None. There `holds` is True for fewer bits than JPEG's best
    point, False for more than its worst one, and else None: the two cannot be compared.
    """

    quality: float
    bpp: float
    psnr: float
    jpeg_bpp: float | None
    holds: bool | None


@dataclass(frozen=True)
class Aim:
    """Whether vqcodec needs 20 % fewer bits than JPEG over 0.15 to 0.8 bpp and is no worse at every quality level."""

    value: BdRate | None
    levels: tuple[AimLevel, ...]

    @property
    def average_holds(self) -> bool:
        return self.value is not None and self.value.percent <= AIM_PERCENT

    @property
    def levels_hold(self) -> bool:
        verdicts = {level.holds for level in self.levels}
        return True in verdicts and False not in verdicts


def aim(results: Sequence[Result], psnr: Measure) -> Aim | None:
    """Check the aim on the mean PSNR curves; None unless both vqcodec and JPEG were measured."""
    by_key = {result.key: result for result in results if result.key}
    if "vqcodec" not in by_key or "jpeg" not in by_key:
        return None
    own, jpeg = by_key["vqcodec"].curve(psnr), by_key["jpeg"].curve(psnr)
    if own is None or jpeg is None:
        return None
    columns = by_key["vqcodec"].columns
    levels = []
    for quality, bpp, value in zip(columns["quality"], columns["bpp"], columns[psnr.column], strict=True):
        if quality is None or bpp is None or value is None:
            continue
        if jpeg.quality[0] <= value <= jpeg.quality[-1]:
            jpeg_bpp = float(jpeg.rate_at(value))
            levels.append(AimLevel(quality, bpp, value, jpeg_bpp, bpp <= jpeg_bpp))
        elif value > jpeg.quality[-1]:
            levels.append(AimLevel(quality, bpp, value, None, True if bpp <= jpeg.rate[-1] else None))
        else:
            levels.append(AimLevel(quality, bpp, value, None, False if bpp >= jpeg.rate[0] else None))
    return Aim(bd_rate(jpeg, own, rates=AIM_RATES), tuple(levels))
