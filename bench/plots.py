"""Rate-distortion plots."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure

from bench.bd_rate import Curve
from bench.curves import Result
from bench.measures import Measure

COLOURS = {
    "vqcodec": "#c2410c",
    "vqcodec-psnr": "#e11d48",
    "vqcodec-natural": "#f59e0b",
    "vqcodec-effort-3": "#9a3412",
    "vqcodec-effort-9": "#7c2d12",
    "vqcodec-psnr-effort-9": "#881337",
    "jpeg": "#6b7280",
    "webp": "#15803d",
    "jpeg2000": "#a16207",
    "avif": "#1d4ed8",
    "avif-psnr": "#60a5fa",
    "jxl": "#7e22ce",
}
PUBLISHED_DASHES = (
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 2, 1, 2)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 2)),
    (0, (1, 4)),
    (0, (9, 2, 1, 2)),
)
MAX_RATE = 1.5  # bits per pixel: beyond it every codec looks perfect


@dataclass(frozen=True)
class Line:
    """A curve to draw: `key` is the codec's, or "" for a published one."""

    key: str
    title: str
    curve: Curve


def rate_distortion(lines: Sequence[Line], axis: str) -> bytes:
    """A plot of quality over rate as PNG bytes; vqcodec is drawn strongest, published curves thin and broken."""
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.add_subplot()
    shown: list[float] = []
    published = 0
    for line in sorted(lines, key=lambda line: (line.key != "vqcodec", not line.key)):
        shown.extend(line.curve.quality[line.curve.rate <= MAX_RATE])
        quality = np.linspace(line.curve.quality[0], line.curve.quality[-1], 400)
        rate = line.curve.rate_at(quality)  # the interpolation that BD-rates are computed with
        if line.key:
            own = line.key == "vqcodec"
            colour = COLOURS[line.key]
            axes.plot(
                rate, quality, color=colour, linewidth=2.6 if own else 1.4, zorder=3 if own else 2, label=line.title
            )
            axes.scatter(line.curve.rate, line.curve.quality, color=colour, s=22 if own else 9, zorder=3 if own else 2)
        else:
            dashes = PUBLISHED_DASHES[published % len(PUBLISHED_DASHES)]
            grey = str(0.25 + 0.12 * (published % 4))
            axes.plot(rate, quality, color=grey, linewidth=1, linestyle=dashes, zorder=1, label=line.title)
            published += 1
    axes.set_xlim(0, min(MAX_RATE, 1.02 * max(float(line.curve.rate[-1]) for line in lines)))
    if shown:
        margin = 0.03 * (max(shown) - min(shown)) or 1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel(axis)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160)
    return buffer.getvalue()


def draw(curves: Sequence[Result], chosen: Sequence[Measure]) -> dict[str, bytes]:
    """A plot for each measure, as PNG bytes."""
    images = {}
    for measure in chosen:
        lines = [Line(result.key, result.title, c) for result in curves if (c := result.curve(measure))]
        if lines:
            images[measure.key] = rate_distortion(lines, measure.axis)
    return images
