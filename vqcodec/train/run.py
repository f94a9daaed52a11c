"""Training as one function: pictures in, weights file out.

    start     the KLT start from training crops, or trained weights (begin.py)
    phases    of optimisation steps, as the clock says (schedule.py, phases.py, step.py):
        rounding    the tokenizer on the rate-distortion loss, rounding in the place of codebooks and prior
        prior       codebooks take over; the prior learns their codes, under fake quantisation
        joint       all together
        polish      prior and decoder for codes that stand still
    export    the averaged weights, the prior as integers, validated as they will run; the visual tuning of the encoder

Another look of given weights is trained the same way, except that only what turns codes into pixels learns. A
checkpoint beside the output survives any interruption; `resume` goes on from it. Under torchrun the same function
trains data-parallel, one process a device.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vqcodec.errors import TrainingError
from vqcodec.models.config import Config
from vqcodec.models.model import Model
from vqcodec.train import begin, checkpoint, crops, data, phases, process, step, validation
from vqcodec.train.export import export
from vqcodec.train.job import Job, choose_schedule, configuration
from vqcodec.train.progress import Progress
from vqcodec.train.schedule import Schedule
from vqcodec.train.state import Run, new_run

__all__ = ["Progress", "train"]

CHECKPOINT_SECONDS = 180
REPORT_SECONDS = 2.0
VALIDATIONS = 9  # a run or sitting, evenly spaced in time, but more where that would be less often than every
VALIDATION_SECONDS = 1800.0
MOST_LOST = 50  # steps in a row whose loss is not finite


def train(
    pictures: Sequence[Path],
    output: Path,
    *,
    config: str | Path | Config | None = None,
    minutes: float = 180,
    crops: int | None = None,
    resume: bool = False,
    device: str = "auto",
    seed: int = 0,
    start_from: Path | None = None,
    features: Sequence[Path] = (),
    distortion: str | None = None,
    judge: Path | None = None,
    schedule: Schedule | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> bool:
    """Train a model on pictures and write a weights file.

    Beside `output` lie the checkpoint (.ckpt, removed by nobody), the log (.csv: one line a validation) and a sheet
    of validation pictures before and after (.png).

    Args:
        pictures: files and folders. output: the weights file, .safetensors.
        config: a configuration, the name of one, or a JSON file; None for that of the checkpoint where a run is
            resumed, else that of `start_from`, else "photo". From a checkpoint and from `start_from` only the
            commitment may differ, and from the latter numbers of residual blocks: new ones add nothing at first, those
            that are too many are left out.
        minutes: budget of the whole run, earlier parts included.
        crops: length of the run in crops instead, over any number of sittings on any machines. Then `minutes` is that
            of this sitting, after which the run waits in its checkpoint to be resumed; inf lets it go on to the end.
        resume: go on from the checkpoint, which knows what the run began with: `config`, `start_from` and `distortion`
            need not be given again. device: "auto", "cpu" or "cuda". seed: of crops and initial weights.
        start_from: a weights file to train on from, instead of from scratch. Where training begins with rounding,
            codebooks begin again as integers; what stood in for the prior when these weights were trained goes on if
            their checkpoint still lies beside them.
        features: of the networks of LPIPS that say how alike pictures look, AlexNet, SqueezeNet 1.1 or both, as
            safetensors: train the natural look of the weights `start_from`, in a file of its own. Where `output` is a
            look of these weights already, it goes on from that. Needs the packages lpips and torchvision.
        distortion: "mse", or "visual" for half squared error and half SSIMULACRA2 (distortion.py); None for that of the
            checkpoint where a run is resumed, which must not change, and else for what the schedule says, "visual" for
            the photo model.
        judge: features of AlexNet as safetensors: the log has LPIPS as well. Needs the same packages.
        schedule: learning rates, batches and crops; None for the usual one of the configuration.
        on_progress, on_warning: called now and then with a `Progress`, and with one line for each picture skipped.

    Returns:
        Whether the run is over and the weights are written; else it has to be resumed.

    Raises:
        TrainingError: no pictures, no such device, no checkpoint to resume from, or one of another configuration, look
            or distortion; weights of another configuration; features without weights to start from, or without the
            packages; a loss that is not finite any more; a file that cannot be written.
        Interrupted: SIGINT or SIGTERM came, for which the program has no handler of its own. The checkpoint is saved.
        SystemExit: another process has failed, and says why.
        ValueError: no such distortion.
        WeightsError: unknown configuration; unreadable weights or features.
    """
    with contextlib.ExitStack() as around:
        rank, world = around.enter_context(process.joined())
        saved = checkpoint.read(output) if resume else None
        given = begin.open_weights(start_from, output, look=bool(features))
        settings, look_of = _what(saved, config, given, start_from, look=bool(features))
        here = process.device(device, rank)
        around.enter_context(process.tuned(here, world, seed))
        plan = choose_schedule(schedule, settings, here, world, bool(features), distortion)
        if saved:
            plan = saved.distorted(plan, distortion)
        paths = data.find_pictures(pictures)
        onward = saved.facts.onward if saved else given is not None and plan.prior_at > 0 and not schedule
        job = Job(
            config=settings,
            schedule=plan.onward() if onward else plan,
            output=output,
            seconds=minutes * 60,
            crops=crops,
            seed=seed,
            device=here,
            rank=rank,
            world=world,
            onward=onward,
            look_of=look_of,
            on_progress=on_progress if rank == 0 else None,
            on_warning=on_warning if rank == 0 else None,
        )
        run = new_run(job, paths, features, judge)
        if saved:
            checkpoint.restore(run, saved)
        elif given and start_from:
            begin.with_weights(run, given, start_from)
        else:
            begin.afresh(run)
        _learn(run)
        if rank == 0:
            with process.raised_signals():
                validation.validate(run)
                if not run.interrupted:
                    export(run)
    return not run.interrupted


def _what(
    saved: checkpoint.Saved | None,
    config: str | Path | Config | None,
    given: Model | None,
    source: Path | None,
    look: bool,
) -> tuple[Config, str]:
    """The configuration and `look_of` of the job: what a checkpoint knows need not be asked for, but must agree.

    Args:
        saved: the checkpoint of a run that is resumed. config, given, source, look: as of `configuration`.
    """
    look_of = given.id.hex() if given and look else ""
    if saved is None:
        return configuration(config, given, source, look), look_of
    saved.check_look(look, look_of)
    if config is None and given is None:
        return saved.config, saved.look_of
    asked = configuration(config, given, source, look)
    options = [option for option, value in (("--config", config), ("--from", given)) if value is not None]
    saved.check_config(asked, " and ".join(options))
    return saved.config if config is None else asked, saved.look_of


def _learn(run: Run) -> None:
    """Take steps until the run or the sitting is over, phase after phase; report, save and validate now and then.

    In the end the checkpoint is saved.
    """
    job, schedule = run.job, run.job.schedule
    torch.manual_seed(job.seed + 1000 * job.rank + run.step)  # every process and every sitting draws its own
    begun = time.monotonic() - run.spent
    reported = saved = validated = time.monotonic()
    stream: Iterator[Tensor] = iter(())
    side = 0
    with contextlib.ExitStack() as streams, phases.shared(run), process.held_signals() as signals:
        while True:
            # All processes must take the same number of steps: the first one's clock and signals count.
            now = process.first_one(-1.0 if signals else time.monotonic() - begun, job.world, job.device)
            if now < 0:
                if job.rank == 0:
                    checkpoint.save(run)
                raise process.Interrupted(signals[0] if signals else signal.SIGTERM)
            run.spent = now
            if run.share >= 1 or run.interrupted:
                break
            share = max(run.share, schedule.begins(run.phase))  # what was given more time goes on where it was
            if schedule.phase(share) > run.phase:
                phases.enter(run, schedule.phase(share))
            if side != schedule.crop_side(share, job.config.multiple):
                side = schedule.crop_side(share, job.config.multiple)
                streams.close()
                stream = streams.enter_context(contextlib.closing(crops.stream(job, run.pictures, side, run.step)))
                phases.enter(run, run.phase)  # what is recorded or compiled is so for one size of crops
            step.take(run, next(stream), share)
            if job.rank:
                continue  # the first process reports, saves and validates
            now = time.monotonic()
            if now - reported > REPORT_SECONDS:
                reported = now
                run.report("train")
                if int(run.lost) >= MOST_LOST:
                    raise TrainingError(
                        f"the loss has not been finite for {int(run.lost)} steps, at step {run.step};"
                        f" {checkpoint.path_of(job.output)} is of an earlier one"
                    )
            if now - saved > CHECKPOINT_SECONDS:
                checkpoint.save(run)
                saved = time.monotonic()
            if now - validated > min(job.seconds / VALIDATIONS, VALIDATION_SECONDS):
                validation.validate(run)
                validated = time.monotonic()
        if job.rank == 0:
            checkpoint.save(run)
            if signals:
                raise process.Interrupted(signals[0])
