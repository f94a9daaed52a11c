"""Short training runs that differ in one thing: what does it bring?

    python -m bench.ablate PICTURES... [--variants photo,d2] [--minutes 5] [--from WEIGHTS] [-o out/ablate] [--jobs 1]

Every variant trains for the same minutes, from the same seed or weights, on the same pictures, in a process of one
thread, and is validated on the same crops (`vqcodec train` sets them aside). Printed: steps and minutes, bits per
pixel, PSNR and SSIMULACRA2 at five qualities, and the cost, the geometric mean over these qualities of bpp + lambda *
squared error. Runs whose weights are there already are not repeated. Nothing else should keep the machine busy: the
clock ends the runs. On a busy machine, `--crops` gives all of them the same number of crops instead.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vqcodec.models.config import Config, PriorConfig, SliceConfig
from vqcodec.models.recipes import PHOTO
from vqcodec.train import process
from vqcodec.train import run as training
from vqcodec.train.schedule import Schedule
from vqcodec.train.validation import VALIDATION_QUALITIES


@dataclass(frozen=True)
class Variant:
    """One run.

    Attributes:
        about: what is different.
        config, schedule: see there.
    """

    about: str
    config: Config = PHOTO
    schedule: Schedule = field(default_factory=Schedule)


def _body(**changes: Any) -> Config:
    """The photo model with another body at stride 16."""
    return replace(PHOTO, stages=(replace(PHOTO.stages[0], **changes), *PHOTO.stages[1:]))


def _bottom() -> tuple[SliceConfig, ...]:
    return PHOTO.levels[-1].slices


def _pairs() -> Config:
    """Planes of two dimensions in the bottom level's weaker slices."""
    pairs = (replace(p, planes=p.planes // 2, dim=2, codes=512) for p in _bottom()[1:])
    return _body(slices=(_bottom()[0], *pairs))


def _without_top() -> Config:
    slices = tuple(replace(p, layer=p.layer - 1) for p in _bottom())
    return replace(PHOTO, stages=(replace(PHOTO.stages[0], slices=slices),))


# Rounding to the end: transforms, steps and estimates learn, and bits are those of what stands in for the prior.
ROUNDING = Schedule(prior_at=1.0, joint_at=1.0, polish_from=1.0, rate_rise=0.6)

# The same from weights (`--from`): the rate counts in full, and transforms learn at half of their rate, falling to 1 %.
ONWARD = replace(ROUNDING, rounding_rate=0.5, joint_rate=0.02, rate_start=1.0, large_from=1.0)

VARIANTS = {
    "photo": Variant("as shipped"),
    # The quantiser
    "no-rounding": Variant(
        "codebooks and prior from the start",
        schedule=Schedule(prior_at=0.0, joint_at=0.0, joint_rate=1.0, rate_rise=0.6),
    ),
    "d2": Variant("planes of two dimensions in the last two slices", _pairs()),
    "d4": Variant(
        "planes of four dimensions in the last slice",
        _body(slices=(*_bottom()[:-1], replace(_bottom()[-1], planes=44, dim=4, codes=128))),
    ),
    "half-codes": Variant(
        "codebooks of half the size", _body(slices=tuple(replace(p, codes=p.codes // 2) for p in _bottom()))
    ),
    "ema": Variant("codebooks learn by moving averages", replace(PHOTO, codebook="ema")),
    "commitment": Variant("a commitment loss", replace(PHOTO, commitment=0.25)),
    # Levels and prior
    "no-top": Variant("no top level", _without_top()),
    "prior-96": Variant("context of 96 channels", replace(PHOTO, prior=PriorConfig(96, 64, 1))),
    "prior-2-blocks": Variant("two gated blocks before each slice", replace(PHOTO, prior=PriorConfig(56, 32, 2))),
    # The body, rounding to the end, at about equal work
    "rounding": Variant("rounding to the end", schedule=ROUNDING),
    "mse": Variant("on squared error alone", schedule=replace(ROUNDING, visual_share=0.0)),
    "muon": Variant("kernels by Muon", schedule=replace(ROUNDING, kernel_rate=5e-3)),
    "dense": Variant("dense 3x3 of 128", _body(hidden=128, groups=1), ROUNDING),
    "depthwise": Variant("depthwise 3x3 of 384", _body(hidden=384, groups=384), ROUNDING),
    "no-renderer": Variant("five decoder blocks and no renderer", _body(decoder_blocks=5, renderer=0), ROUNDING),
    "encoder": Variant("sixteen encoder blocks", _body(encoder_blocks=16), ROUNDING),
    # The schedule
    "half-rate": Variant("half the learning rates", schedule=Schedule(rate=5e-4, prior_rate=1.5e-3)),
    "double-rate": Variant("twice the learning rates", schedule=Schedule(rate=2e-3, prior_rate=6e-3)),
    "fast-rate": Variant(
        "the rate's weight 0.5, 1 after a twentieth of the time", schedule=Schedule(rate_start=0.5, rate_rise=0.05)
    ),
    "full-rate": Variant("the rate's weight 1 throughout", schedule=Schedule(rate_start=1.0)),
    "batch-4": Variant("batches of 4", schedule=Schedule(batch=4)),
    "batch-16": Variant("batches of 16", schedule=Schedule(batch=16)),
    "crops-128": Variant("four times as many crops, of 128", schedule=Schedule(batch=32, crop=128, large_crop=192)),
    # From weights
    "onward": Variant("rounding to the end, from weights", schedule=ONWARD),
    "onward-batch-4": Variant(
        "the same in batches of 4", schedule=replace(ONWARD, batch=4, rate=7e-4, average_decay=0.9995)
    ),
    "onward-double-rate": Variant("the same at twice the rate", schedule=replace(ONWARD, rate=2e-3)),
    "onward-muon": Variant("the same, kernels by Muon", schedule=replace(ONWARD, kernel_rate=2e-3)),
}


def run(
    name: str, pictures: list[Path], minutes: float, crops: int | None, start_from: Path | None, folder: Path
) -> None:
    """Train one variant in this process."""
    variant = VARIANTS[name]
    process.keep_memory()
    training.train(
        pictures,
        folder / f"{name}.safetensors",
        config=variant.config,
        schedule=variant.schedule,
        minutes=math.inf if crops else minutes,
        crops=crops,
        device="cpu",
        start_from=start_from,
    )


def row(name: str, folder: Path) -> str:
    """A line of the table: what the last validation of a run says."""
    path = folder / f"{name}.csv"
    if not (folder / f"{name}.safetensors").exists():
        return f"| {name} | failed |"
    with path.open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    points = [
        f"{float(last[f'bpp_{q}']):.3f}/{float(last[f'psnr_{q}']):.2f}/{float(last[f'ssimulacra2_{q}']):.1f}"
        for q in VALIDATION_QUALITIES
    ]
    cells = [name, VARIANTS[name].about, last["step"], last["minutes"], *points, f"{float(last['cost']):.4f}"]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures to train on, or folders of them")
    parser.add_argument("--variants", default="photo,d2", help=f"some of {', '.join(VARIANTS)}, or all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each run")
    parser.add_argument("--crops", type=int, help="of each run, however long they take")
    parser.add_argument("--from", dest="start_from", type=Path, help="weights that every run begins with")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ablate"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: at most one a core")
    options = parser.parse_args(arguments)
    names = list(VARIANTS) if options.variants == "all" else options.variants.split(",")
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        parser.error(f"no such variant: {', '.join(unknown)}")
    options.output.mkdir(parents=True, exist_ok=True)

    def start(name: str) -> None:
        if (options.output / f"{name}.safetensors").exists():
            return
        call = {
            "name": name,
            "minutes": options.minutes,
            "crops": options.crops,
            "from": str(options.start_from.resolve()) if options.start_from else None,
            "folder": str(options.output.resolve()),
        }
        call["pictures"] = [str(p.resolve()) for p in options.pictures]
        program = (
            "import json, sys; from pathlib import Path; from bench import ablate; c = json.loads(sys.argv[1]);"
            "ablate.run(c['name'], [Path(p) for p in c['pictures']], c['minutes'], c['crops'],"
            " c['from'] and Path(c['from']), Path(c['folder']))"
        )
        subprocess.run(
            [sys.executable, "-c", program, json.dumps(call)],
            check=False,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    qualities = " | ".join(f"q {q}" for q in VALIDATION_QUALITIES)
    print(f"| variant | what | steps | minutes | {qualities} | cost |\n|{'---|' * (5 + len(VALIDATION_QUALITIES))}")
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, _ in zip(names, pool.map(start, names), strict=True):
            print(row(name, options.output), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
