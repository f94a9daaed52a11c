"""What a run leaves behind: the weights file with its visual tuning, or a look; and the sheet of pictures."""

from vqcodec import tuning, weights
from vqcodec.train import crops, sensitivity, validation
from vqcodec.train.loss import RateDistortion
from vqcodec.train.state import Run

TUNING_CROPS = 16  # on which the visual tuning is measured


def export(run: Run) -> None:
    """Write the averaged weights, and validate them as they will run: in half precision, the prior as integers."""
    run.report("export")
    validation.write_sheet(run)
    config, path, average = run.job.config, run.job.output, run.average
    notes = {
        "minutes": round(run.spent / 60, 1),
        "steps": run.step,
        "processes": run.job.world,
        "pictures": len(run.pictures),
        "visual_share": run.job.schedule.visual_share,
        "trained": validation.measure(run, average),
    }
    if run.job.look_of:
        weights.save_look(path, config, average.vqvae, run.job.look_of, notes)
        return
    beside = tuning.path_of(path)
    beside.unlink(missing_ok=True)  # of older weights of this name
    weights.save_model(path, config, average.vqvae, average.prior, notes)
    model = weights.load(path)
    exported = RateDistortion(config, model.vqvae, model.prior).eval()
    notes["exported"] = validation.measure(run, exported.to(run.job.device), autocast=False)
    weights_id = weights.save_model(path, config, average.vqvae, average.prior, notes)
    if config.joint:
        pictures = [pixels.numpy() for pixels in crops.first(run.job, run.pictures, TUNING_CROPS)]
        sensitivity.measure(weights.load(path, run.job.device.type), pictures).save(beside, weights_id)
