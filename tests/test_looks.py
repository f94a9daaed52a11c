"""Another look of the same codes: trained for given weights, kept beside them, and nothing but pixels differ."""

import copy
import csv
import importlib.util
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from trainer import small_runs

import vqcodec
from vqcodec import decoder, packaged, synthesis, weights, weights_file
from vqcodec.errors import TrainingError, WeightsError
from vqcodec.train import perceptual
from vqcodec.train import run as training
from vqcodec.train.schedule import LOOK

PLAN = replace(LOOK, crop=64, batch=4, kernel_rate=1e-2, rate=1e-2, warm_up_steps=5)


def coarse(a: Tensor, b: Tensor) -> Tensor:
    """Stands for a perceptual distance: squared error of averages, so large that it decides."""
    return functional.avg_pool2d(a - b - 30, 8).square().mean((1, 2, 3))


@pytest.fixture
def small() -> Iterator[None]:
    with small_runs():
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(4):
        Image.fromarray(models.picture(96, 96, seed + 50)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Weights in a folder of their own."""
    return Path(shutil.copy(models.tiny_weights(), tmp_path / "own.safetensors"))


@pytest.fixture
def look(own: Path) -> Path:
    """A natural look of these weights: paler."""
    model = weights.load(own)
    vqvae = copy.deepcopy(model.vqvae)
    for part in vqvae.renderer().values():
        for name, parameter in part.named_parameters():
            if name == "weight":
                parameter.mul_(0.9)
    path = own.with_suffix(".natural.safetensors")
    weights.save_look(path, model.config, vqvae, model.id.hex(), {})
    return path


def psnr_of(a: object, b: object) -> float:
    mse = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def test_loading_a_look_draws_no_random_numbers(own: Path, look: Path) -> None:
    weights._load.cache_clear()
    before = torch.get_rng_state()
    weights.load(own, look=look)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_pixels_differ(own: Path, look: Path) -> None:
    source = models.picture(90, 70)
    data = vqcodec.compress(source, weights=own)
    faithful, natural = (vqcodec.decompress(data, weights=own, look=name) for name in packaged.LOOKS)
    assert natural.size == faithful.size
    assert 15 < psnr_of(faithful, natural) < 45
    assert psnr_of(source, faithful) > psnr_of(source, natural)
    model, other = weights.load(own), weights.load(own, look=look)
    assert other.id == model.id
    container = vqcodec.bitstream.read(data)
    for a, b in zip(decoder.decode_codes([container], model), decoder.decode_codes([container], other), strict=True):
        assert torch.equal(a, b)
    assert np.array_equal(faithful, vqcodec.decompress(data, weights=own)), "faithful unless told otherwise"


def test_a_look_has_all_that_renders_and_nothing_else(own: Path, look: Path) -> None:
    """Taken from the weights themselves, it changes no pixel."""
    model = weights.load(own)
    names = {name.split(".")[3] for name in load_file(look)}
    assert names == {"decoder", "synthesis", "unlap", "cell_decoder", "renderer"}
    assert all(name.startswith("vqvae.stages.0.") for name in load_file(look))
    same = own.with_suffix(".same.safetensors")
    weights.save_look(same, model.config, model.vqvae, model.id.hex(), {})
    data = vqcodec.compress(models.picture(40, 50), weights=own)
    codes = decoder.decode_codes([vqcodec.bitstream.read(data)], model)
    frame = vqcodec.bitstream.read_header(data).frame
    found, expected = (synthesis.reconstruct(loaded, frame, codes) for loaded in (weights.load(own, look=same), model))
    assert np.array_equal(found, expected)


def test_training(own: Path, pictures: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the renderer learns, towards what the distance wants; a run can be gone on with."""
    monkeypatch.setattr(perceptual, "distance", lambda features, device, expected: coarse)
    output = own.with_suffix(".natural.safetensors")

    def run(seconds: float, **options: Any) -> None:
        asked = {"start_from": own, "features": [Path("features")], "schedule": PLAN} | options
        training.train([pictures], output, minutes=seconds / 60, device="cpu", **asked)

    run(1)
    run(1.2, resume=True)
    run(1.3, resume=True, start_from=None)  # which its checkpoint knows
    with pytest.raises(TrainingError, match="is of a look of weights .*: give its features with --natural"):
        run(1.4, resume=True, features=[])
    assert not list(own.parent.glob("*.visual.json")), "a look is no matter of the encoder"
    other = models.save(models.tiny(seed=9), own.with_name("other.safetensors"))
    with pytest.raises(TrainingError, match="is of a look of weights .*, not of .*: leave out --from"):
        run(1.4, resume=True, start_from=other)
    output.with_suffix(".ckpt").rename(kept := own.with_name("kept.ckpt"))
    with safe_open(kept, framework="pt") as file:
        save_file(load_file(kept), output.with_suffix(".ckpt"), {**file.metadata(), "look_of": ""})
    with pytest.raises(TrainingError, match="is of a model of its own, not of a look: leave out --natural"):
        run(1.4, resume=True, start_from=None)
    kept.rename(output.with_suffix(".ckpt"))
    data = vqcodec.compress(models.picture(96, 96, 50), weights=own)
    faithful, natural = (
        np.asarray(vqcodec.decompress(data, weights=own, look=name)).astype(float) for name in packaged.LOOKS
    )
    assert natural.mean() > faithful.mean() + 0.2, "the distance asks for 30 more"
    checkpoint = load_file(output.with_suffix(".ckpt"))
    state = {f"model.vqvae.{name}": tensor for name, tensor in weights.load(own).vqvae.state_dict().items()}
    renderer = tuple(f"model.vqvae.{name}." for name in weights.load(own).vqvae.renderer())
    for name, tensor in state.items():
        if not name.startswith(renderer) and not name.endswith((".usage", ".sums", ".steps")):
            assert torch.equal(checkpoint[name], tensor), name

    def log() -> list[dict[str, str]]:
        with output.with_suffix(".csv").open(newline="") as file:
            return list(csv.DictReader(file))

    *_, last = log()
    run(0.1)  # not from its checkpoint: it goes on from the look that is there
    first, *_ = log()
    assert int(first["step"]) == 0
    assert float(first["lpips_30"]) == pytest.approx(float(last["lpips_30"]), rel=0.01)


def test_a_look_of_a_classic_model(
    tmp_path: Path, pictures: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the prior is learned after the rest, a look never comes to its turn."""
    monkeypatch.setattr(perceptual, "distance", lambda features, device, expected: coarse)
    own = models.save(models.raster(layers=2), tmp_path / "own.safetensors")
    output = own.with_suffix(".natural.safetensors")
    seen: list[training.Progress] = []
    training.train(
        [pictures],
        output,
        start_from=own,
        features=[Path("features")],
        minutes=0.3 / 60,
        device="cpu",
        schedule=replace(PLAN, crop=32),
        on_progress=seen.append,
    )
    assert seen[-1].step > 3
    data = vqcodec.compress(models.picture(24, 24), weights=own)
    assert vqcodec.decompress(data, weights=own, look="natural").size == (24, 24)


def test_refused(own: Path, look: Path, tmp_path: Path) -> None:
    data = vqcodec.compress(models.picture(20, 20), weights=own)
    with pytest.raises(ValueError, match="look must be one of faithful, natural, got 'pretty'"):
        vqcodec.decompress(data, weights=own, look="pretty")
    other = models.save(models.tiny(seed=9), tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"no natural look for the weights .*other\.safetensors"):
        vqcodec.decompress(data, weights=other, look="natural")
    shutil.copy(look, tmp_path / "other.natural.safetensors")
    with pytest.raises(WeightsError, match="is a look of weights"):
        vqcodec.decompress(data, weights=other, look="natural")
    with pytest.raises(WeightsError, match="not a vqcodec weights file"):
        weights.load(look)
    with pytest.raises(WeightsError, match="not a vqcodec look file"):
        weights.load(own, look=own)
    tensors = load_file(look)
    metadata = {"format": weights_file.LOOK_FORMAT, "weights": weights.load(own).id.hex()}
    metadata["config"] = weights.load(own).config.to_json()
    save_file(dict(list(tensors.items())[1:]), look, metadata)
    with pytest.raises(WeightsError, match=r"natural\.safetensors lack"):
        vqcodec.decompress(data, weights=own, look="natural")


def test_a_look_needs_weights(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs the weights that it is for"):
        training.train([pictures], tmp_path / "x.natural.safetensors", config=TINY, features=[Path("features")])


def made_features(path: Path, side: int, channels: int) -> Path:
    """A file that begins like the features of a network."""
    save_file({"features.0.weight": torch.zeros(channels, 3, side, side)}, path)
    return path


def test_features_of_the_wrong_network(tmp_path: Path) -> None:
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("needs the package lpips: pip install 'vqcodec[natural]'")
    from vqcodec.train.perceptual import lpips

    path = tmp_path / "features.safetensors"
    with pytest.raises(WeightsError, match="cannot read features"):
        lpips(path)
    for side in (3, 5, 11):  # the beginning of SqueezeNet, of none, and of AlexNet
        with pytest.raises(WeightsError, match="does not hold the features of a network of LPIPS"):
            lpips(made_features(path, side, 64))


@pytest.mark.filterwarnings("ignore")  # deprecated arguments of torchvision
def test_features_of_another_network(tmp_path: Path) -> None:
    """Where a network is asked for by name, as by what judges, the other one would be a wrong number without a word."""
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("needs the package lpips: pip install 'vqcodec[natural]'")
    from vqcodec.train.perceptual import import_torchvision, lpips

    import_torchvision()
    body = importlib.import_module("lpips").LPIPS(net="squeeze", pnet_rand=True, verbose=False).net.state_dict()
    path = tmp_path / "features.safetensors"
    save_file({"features." + name.partition(".")[2]: tensor.contiguous() for name, tensor in body.items()}, path)
    lpips(path)
    lpips(path, "squeeze")
    with pytest.raises(WeightsError, match="holds the features of LPIPS's network 'squeeze', not of 'alex'"):
        lpips(path, "alex")


@pytest.mark.parametrize("autocast", [False, True])
def test_the_distance_is_a_mean_over_networks(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, but in bfloat16 where gradients are wanted under autocast."""
    seen: list[torch.dtype] = []

    class Network(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return self.scale * (a - b).square().mean((1, 2, 3), keepdim=True)

    scales = {Path("one"): 1.0, Path("two"): 3.0}
    monkeypatch.setattr(perceptual, "lpips", lambda path, expected: Network(scales[path]))
    measure = perceptual.distance(list(scales), torch.device("cpu"))
    a, b = torch.rand(2, 3, 8, 8) * 255, torch.rand(2, 3, 8, 8) * 255
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = measure(a.requires_grad_(), b)
        with torch.no_grad():
            torch.testing.assert_close(measure(a, b), found.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, 2 * ((a - b) / 127.5).square().mean((1, 2, 3)))
    rough = torch.bfloat16 if autocast else torch.float32
    assert seen == [rough, rough, torch.float32, torch.float32]
