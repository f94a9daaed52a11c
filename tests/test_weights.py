"""Weights files: what is saved is what runs, the id is of the bytes, and bad files are refused."""

import hashlib
import json
import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vqcodec import weights, weights_file
from vqcodec.errors import WeightsError
from vqcodec.models.counts import RowTables
from vqcodec.models.operations import macs_per_pixel


@pytest.fixture
def data() -> bytes:
    return models.tiny_weights().read_bytes()


def header_of(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header


def with_metadata(data: bytes, **changes: str | None) -> bytes:
    """The same tensors under other metadata."""
    (size,) = struct.unpack_from("<Q", data)
    header = header_of(data)
    header["__metadata__"] = {k: v for k, v in {**header["__metadata__"], **changes}.items() if v is not None}
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    return struct.pack("<Q", len(packed)) + packed + data[8 + size :]


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=match) as caught:
        weights.load(path)
    assert "\n" not in str(caught.value)


# There and back


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stages.0.decoder.0.expand.weight", math.nan),
        ("stages.0.decoder.0.expand.weight", 1e6),  # infinite in half precision
        ("slices.1.0.codebook.vectors", math.inf),
        ("levels.1.start.curve", math.nan),
    ],
)
def test_numbers_that_are_not_finite_are_not_saved(name: str, value: float, tmp_path: Path) -> None:
    model = models.tiny()
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"as before")
    part = model.prior if name.startswith("levels") else model.vqvae
    part.state_dict()[name].view(-1)[0] = value
    with pytest.raises(WeightsError, match=rf"mine\.safetensors: not all numbers of \w+\.{name} are finite"):
        weights.save_model(path, TINY, model.vqvae, model.prior, {})
    assert path.read_bytes() == b"as before"
    if part is model.vqvae and name.startswith("stages"):
        with pytest.raises(WeightsError, match="are finite"):
            weights.save_look(path, TINY, model.vqvae, "00000000", {})
        assert path.read_bytes() == b"as before"


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model = models.KINDS[kind]()
    path = tmp_path / "mine.safetensors"
    weights_id = weights.save_model(path, model.config, model.vqvae, model.prior, {"note": 7})
    loaded = weights.load(path)
    assert loaded.config == model.config
    assert loaded.id == weights_id == hashlib.sha256(path.read_bytes()).digest()[:4]
    assert not any(p.requires_grad for m in (loaded.vqvae, loaded.prior) for p in m.parameters())
    assert not loaded.vqvae.training

    prior = loaded.prior.state_dict()
    for name, expected in model.prior.state_dict().items():
        if not name.endswith("curve"):  # of which the file keeps the table
            assert torch.equal(prior[name], expected), name
            assert prior[name].dtype == expected.dtype
    for (name, found), expected in zip(
        loaded.vqvae.state_dict().items(), model.vqvae.state_dict().values(), strict=True
    ):
        if name.endswith(("usage", "sums", "steps")):
            continue  # only training needs them
        precise = name.endswith(("vectors", "log_steps", "spread", "codebook.bias", "family"))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0 if precise else 1e-3, atol=0 if precise else 1e-6)
    for level in range(2):
        for index, piece in enumerate(model.vqvae.level_slices(level)):
            tables = loaded.tables.slice(level, index)
            assert torch.equal(tables.inputs, piece.codebook.inputs())
            assert isinstance(tables, RowTables) == loaded.config.joint
            if isinstance(tables, RowTables):
                shares = (tables.counts.double() + 1) / 2**24
                torch.testing.assert_close(
                    shares, 2 ** piece.codebook.table().logp.detach().double(), rtol=0, atol=1e-4
                )
            else:
                expected = (piece.codebook.features()[:, 1:, :1].double() * 1024).round().transpose(1, 2)
                assert torch.equal(tables.values[:, :1], expected)


def test_same_model_same_bytes(tmp_path: Path) -> None:
    first, second = (models.save(models.tiny(seed=3), tmp_path / f"{n}.safetensors") for n in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert models.save(models.tiny(seed=4), tmp_path / "c.safetensors").read_bytes() != first.read_bytes()


def test_tensors_are_small_integers_and_halves(data: bytes) -> None:
    kinds = {name: entry["dtype"] for name, entry in header_of(data).items() if name != "__metadata__"}
    assert {kind for name, kind in kinds.items() if name.startswith(("prior", "tables"))} <= {"I8", "I16", "I32"}
    assert {kind for name, kind in kinds.items() if name.endswith("weight") and name.startswith("prior")} == {"I8"}
    assert {kind for name, kind in kinds.items() if name.startswith("vqvae")} == {"F16", "F32"}
    assert not any(name.endswith(("usage", "sums", "curve")) for name in kinds)


@pytest.mark.parametrize("largest", [127, 128, 32767, 32768, 2**31 - 1, 2**31, 2**40])
def test_integers_survive_narrowing(largest: int) -> None:
    values = torch.tensor([-largest, 0, largest], dtype=torch.float64)
    narrow = weights._narrow_integers(values)
    assert narrow.tolist() == [-largest, 0, largest]
    assert narrow.element_size() == {127: 1, 128: 2, 32767: 2, 32768: 4, 2**31 - 1: 4}.get(largest, 8)


def test_a_file_replaced_while_it_is_read_is_not_mixed_up(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, later = tmp_path / "tiny.safetensors", models.save(models.tiny(seed=1), tmp_path / "later.safetensors")
    path.write_bytes(data)
    expected = weights.load(path).vqvae.state_dict()
    weights._load.cache_clear()
    read = Path.read_bytes

    def replacing(self: Path) -> bytes:
        content = read(self)
        if self == path:
            os.replace(later, path)
        return content

    monkeypatch.setattr(Path, "read_bytes", replacing)
    model = weights.load(path)
    assert model.id == hashlib.sha256(data).digest()[:4]
    for name, tensor in model.vqvae.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_loading_draws_no_random_numbers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(data)
    before = torch.get_rng_state()
    weights.load(path)
    weights_file.describe(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_keeps_models_until_the_file_changes(tmp_path: Path) -> None:
    path = models.save(models.tiny(seed=3), tmp_path / "mine.safetensors")
    first = weights.load(path)
    assert weights.load(path) is first
    models.save(models.tiny(seed=4), path)
    os.utime(path, ns=(1, 1))
    assert weights.load(path).id != first.id


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save(models.tiny(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Loading


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert weights.load(models.tiny_weights(), "auto").device.type == "cpu"
    with pytest.raises(WeightsError, match="no CUDA device"):
        weights.load(models.tiny_weights(), "cuda")
    for device in ("mps", "xpu:0", "meta", "gpu", ""):
        with pytest.raises(WeightsError, match="device must be auto, cpu or cuda, got"):
            weights.load(models.tiny_weights(), device)


# Bad files


def test_unreadable_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    with pytest.raises(WeightsError, match="cannot read weights"):
        weights.load(path)
    with pytest.raises(WeightsError, match="cannot read weights"):
        weights.load(tmp_path)
    for bad in (b"", b"text", bytes(100), b"\xff" * 100, b"PK\x03\x04" + bytes(100)):
        refused(path, bad, "cannot read weights")
    for length in (*range(0, 8000, 400), len(data) // 2, len(data) - 1):
        refused(path, data[:length], "cannot read weights")
    refused(path, data + b"\0", "cannot read weights")


def test_no_pickle(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save(load_file(models.tiny_weights()), path)
    refused(path, path.read_bytes(), "cannot read weights")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("unpickling runs code")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, fail)
    path.write_bytes(data)
    weights.load(path)


def test_other_safetensors_files(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="not a vqcodec weights file: its metadata say format None"):
        weights.load(path)
    save_file({"x": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(WeightsError, match="not a vqcodec weights file: its metadata say format 'pt'"):
        weights.load(path)


def test_metadata_that_does_not_fit(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(with_metadata(data))
    weights.load(path)
    for version in (1, 2, 4):
        expected = f"a vqcodec weights file of format {version}, and this version reads format 3"
        refused(path, with_metadata(data, format=f"vqcodec weights {version}"), expected)
    refused(path, with_metadata(data, format="vqcodec weights x"), "not a vqcodec weights file")
    refused(path, with_metadata(data, config=None), "not a model configuration")
    refused(path, with_metadata(data, config="{"), "not a model configuration")
    wider = json.loads(TINY.to_json())
    wider["prior"]["channels"] = 24
    refused(path, with_metadata(data, config=json.dumps(wider)), "do not fit their configuration")
    wider["prior"]["channels"] = 200
    refused(path, with_metadata(data, config=json.dumps(wider)), "not a model configuration")
    deeper = json.loads(TINY.to_json())
    deeper["prior"]["blocks"] = 2
    refused(path, with_metadata(data, config=json.dumps(deeper)), "lack .*blocks.1")
    deeper["prior"]["blocks"] = 0
    refused(path, with_metadata(data, config=json.dumps(deeper)), "unknown .*blocks.0")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prior.levels.1.slices.0.head.exponent", 15, "exponent of the prior is out of range"),
        ("prior.levels.1.slices.0.head.exponent", -1, "exponent of the prior is out of range"),
        ("prior.levels.1.slices.0.head.weight", -128, "weight or exponent of the prior is out of range"),
        ("prior.levels.1.slices.0.head.bias", 2**30, "too large for exact sums"),
        ("prior.levels.0.start.table", -(2**21), "too large for exact sums"),
        ("tables.levels.1.0.inputs", 200, "outside -127..127"),
        ("tables.levels.1.0.counts", 2**24, "the counts of a table are not those of distributions"),
    ],
)
def test_integers_that_would_not_be_exact(name: str, value: int, message: str, tmp_path: Path) -> None:
    refused_if_changed(models.tiny_weights(), tmp_path / "bad.safetensors", name, value, message)


def test_sums_of_several_layers_that_would_not_be_exact(tmp_path: Path) -> None:
    """Each is small enough by itself."""
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    save_changed(once, "prior.levels.1.slices.0.head.bias", torch.int64, 9_000_000)
    weights.load(once)
    refused_if_changed(once, twice, "prior.levels.1.slices.0.context.bias", 9_000_000, "too large for exact sums")


def test_tables_that_would_not_be_exact(tmp_path: Path) -> None:
    """Of a prior in raster order, whose counts are sums over them."""
    good = models.save(models.raster(layers=1), tmp_path / "good.safetensors")
    for name, value, message in (
        ("tables.levels.1.0.values", 2**31 - 1, "too large for exact sums"),
        ("tables.levels.1.0.bias", -(2**35), "too large for exact sums"),
        ("tables.levels.0.0.inputs", -128, "outside -127..127"),
    ):
        refused_if_changed(good, tmp_path / "bad.safetensors", name, value, message)


def refused_if_changed(good: Path, path: Path, name: str, value: int, message: str) -> None:
    """A tensor of integers may have a wider type, but not this first number."""
    save_changed(path, name, torch.int64, source=good)
    weights.load(path)
    save_changed(path, name, torch.int64, value, good)
    with pytest.raises(WeightsError, match=message):
        weights.load(path)


def save_changed(
    path: Path, name: str, kind: torch.dtype, value: float | None = None, source: Path | None = None
) -> None:
    """Save weights, the tiny ones by default, with a tensor in another type and with another first number in it."""
    source = source or models.tiny_weights()
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    tensors[name] = tensors[name].to(kind)
    if value is not None:
        tensors[name].flatten()[0] = value
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prior.levels.1.slices.0.head.bias", 0.0, "head.bias must hold integers, not torch.float32"),
        ("tables.levels.1.0.counts", math.nan, "counts must hold integers, not torch.float32"),
        ("vqvae.stages.0.analysis.weight", math.nan, "not all numbers of vqvae.stages.0.analysis.weight are finite"),
        ("vqvae.slices.0.0.codebook.vectors", math.inf, "not all numbers of .*vectors are finite"),
    ],
)
def test_numbers_that_are_none(name: str, value: float, message: str, tmp_path: Path) -> None:
    """Fractions in the exact part would void its exactness without a word, and NaN all pictures."""
    path = tmp_path / "bad.safetensors"
    save_changed(path, name, torch.float32, value)
    with pytest.raises(WeightsError, match=message):
        weights.load(path)


def test_a_flipped_byte_is_another_id(tmp_path: Path, data: bytes) -> None:
    """A weights file has no check of its own: but no .vqz file can be decoded with a damaged one."""
    path = tmp_path / "flipped.safetensors"
    original = weights.load(models.tiny_weights()).id
    rng = np.random.default_rng(0)
    (size,) = struct.unpack_from("<Q", data)
    loaded = 0
    for place in [*rng.integers(0, 8 + size, 15), *rng.integers(8 + size, len(data), 5)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        try:
            assert weights.load(path).id != original
            loaded += 1
        except WeightsError:
            pass
    assert loaded >= 5


# Describing


def test_describe(data: bytes) -> None:
    found = weights_file.describe(models.tiny_weights())
    assert json.loads(json.dumps(found)) == found
    assert found["id"] == weights.load(models.tiny_weights()).id.hex()
    assert found["bytes"] == len(data)
    assert found["name"] == "tiny"
    assert found["config"] == json.loads(TINY.to_json())
    assert found["notes"] == {"made by": "tests/models.py"}
    model = models.tiny()
    macs = macs_per_pixel(TINY, models.shapes(model.vqvae, model.prior))
    for part in ("encoder", "refinement", "decoder", "prior"):
        assert found[f"{part}_kmac_per_pixel"] == round(macs[part] / 1000, 2) > 0
    decoding = macs["refinement"] + macs["decoder"] + macs["prior"]
    assert found["decoding_kmac_per_pixel"] == round(decoding / 1000, 2)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    with pytest.raises(WeightsError, match="cannot read weights"):
        weights_file.describe(Path(__file__))


@pytest.mark.parametrize("name", ["odd", "vqvae.stages.9.decoder.0.reduce.weight", "prior.levels.x.expand.weight"])
def test_describe_refuses_names_of_another_model(tmp_path: Path, name: str) -> None:
    metadata = {"format": weights_file.FORMAT, "config": TINY.to_json()}
    save_file({name: torch.zeros(1)}, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(WeightsError, match="their configuration"):
        weights_file.describe(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("size", [10**9, -1])
def test_describe_refuses_files_that_are_cut_or_lie(tmp_path: Path, data: bytes, size: int) -> None:
    (tmp_path / "cut.safetensors").write_bytes(data[:-1])
    with pytest.raises(WeightsError, match="cannot read weights|not a weights file"):
        weights_file.describe(tmp_path / "cut.safetensors")
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["vqvae.stages.0.bias"] = {"dtype": "F16", "shape": [size, 0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    (tmp_path / "lie.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(WeightsError, match="cannot read weights|not a weights file"):
        weights_file.describe(tmp_path / "lie.safetensors")


@pytest.mark.parametrize("tensor", [1, {}, {"shape": 3}, {"shape": ["3"]}])
def test_shapes_are_checked(tmp_path: Path, tensor: object) -> None:
    header = json.dumps({"__metadata__": {"format": weights_file.FORMAT, "config": TINY.to_json()}, "a": tensor})
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(WeightsError, match="not a safetensors file"):
        weights_file.describe(tmp_path / "odd.safetensors")
