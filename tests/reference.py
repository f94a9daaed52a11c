"""A second reader of .vqz files: segments -> indices -> pixels, written from FORMAT.md alone, with nothing of the
package.

Indices come from Python integers and numpy's int64 only: slow, and unable to round. Pixels come from float64.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Number = TypeVar("Number", bound=np.generic)
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))


def p(numerator: int, denominator: int) -> int:
    """floor(2^(numerator / denominator)): the largest v with v^denominator <= 2^numerator."""
    if numerator < 0:
        return 0
    low, high = 0, 1 << (numerator // denominator + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**denominator <= 1 << numerator else (low, middle)
    return low


def flag_counts(z: int) -> list[int]:
    odds = p(8 * 16 + z, 8)
    zero = (2**24 - 2) * odds // (odds + 2**16)
    return [zero, 2**24 - 2 - zero]


def value_counts(parameters: Sequence[int], dim: int, values: Ints, bias: Ints) -> list[int]:
    """Counts of k = 1..K-1.

    Args:
        parameters: the D + 3 integers of the symbol. dim: D. values: (D + 2, K - 1). bias: (K - 1,).
    """
    *means, s, l, _ = (int(x) for x in parameters)
    assert len(means) == dim
    factors = [m * p(12 * 32 + s, 32) for m in means] + [p(12 * 16 + s, 16), p(13 * 16 + l, 16)]
    columns = [[int(x) for x in row] for row in values]
    logits = [
        sum(factor * column[k] for factor, column in zip(factors, columns, strict=True)) + 2**19 * int(bias[k])
        for k in range(len(bias))
    ]
    assert max(map(abs, logits)) < 2**53
    t = [logit // 2**21 for logit in logits]
    below = [max(t) - x for x in t]
    weights = [p(20 * 64 - d, 64) for d in below]
    free, total = 2**24 - len(bias), sum(weights)
    counts = [weight * free // total for weight in weights]
    counts[below.index(0)] += free - sum(counts)
    return counts


class RangeDecoder:
    """The decoder that FORMAT.md lists, one symbol a call."""

    def __init__(self, segment: bytes) -> None:
        self.segment, self.position = segment, 0
        self.lower, self.range = 0, 2**64 - 1
        self.point = self.word() << 32 | self.word()

    def word(self) -> int:
        self.position += 4
        return int.from_bytes(self.segment[self.position - 4 : self.position], "little")

    def get(self, counts: Sequence[int]) -> int:
        scale = self.range >> 24
        quantile = (self.point - self.lower) % 2**64 // scale
        assert quantile < 2**24
        index, left = 0, 0
        while left + counts[index] + 1 <= quantile:
            left += counts[index] + 1
            index += 1
        self.lower = (self.lower + scale * left) % 2**64
        self.range = scale * (counts[index] + 1)
        if self.range < 2**32:
            self.lower, self.range = (self.lower << 32) % 2**64, self.range << 32
            self.point = (self.point << 32) % 2**64 | self.word()
        return index


class Weights:
    """A weights file: `config`, `tensors` of integers as int64, and `floats`, the other ones, as float64."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        header: dict[str, Any] = json.loads(data[8 : 8 + size])
        self.config: dict[str, Any] = json.loads(header.pop("__metadata__")["config"])
        self.levels = self.config["stages"][::-1]
        kinds = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
        self.tensors: dict[str, Ints] = {}
        self.floats: dict[str, Floats] = {}
        for name, entry in header.items():
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            tensor = np.frombuffer(data[start:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"].startswith("I"):
                self.tensors[name] = tensor.astype(np.int64)
            else:
                self.floats[name] = tensor.astype(np.float64)


def clamp(x: Ints) -> Ints:
    return np.clip(x, -127, 127)


def act(state: Ints) -> Ints:
    return clamp(state // 16)


def gate(x: Ints) -> Ints:
    u, v = np.split(x, 2)
    return np.asarray(clamp(u) * np.clip(v + 64, 0, 128) // 128)


def shuffle(x: NDArray[Number], r: int) -> NDArray[Number]:
    channels, height, width = x.shape
    y = x.reshape(channels // r**2, r, r, height, width)
    return y.transpose(0, 3, 1, 4, 2).reshape(channels // r**2, height * r, width * r)


def unshuffle(x: NDArray[Number], r: int) -> NDArray[Number]:
    channels, height, width = x.shape
    y = x.reshape(channels, height // r, r, width // r, r)
    return y.transpose(0, 2, 4, 1, 3).reshape(channels * r**2, height // r, width // r)


class Tile:
    """Decodes the codes of one tile."""

    def __init__(self, weights: Weights, quality: int) -> None:
        self.weights, self.quality = weights, quality

    def conv(self, name: str, x: Ints, b: int = 0) -> Ints:
        weight, bias, exponent = (self.weights.tensors[f"prior.{name}.{t}"] for t in ("weight", "bias", "exponent"))
        outputs, inputs, rows, columns = weight.shape
        assert inputs * rows * columns <= 1040 and abs(weight).max() <= 127 and abs(x).max() <= 127
        padded = np.pad(x, ((0, 0), *((side // 2, (side - 1) // 2) for side in (rows, columns))))
        total = np.zeros((outputs, *x.shape[1:]), np.int64)
        for row in range(rows):
            for column in range(columns):
                part = padded[:, row : row + x.shape[1], column : column + x.shape[2]]
                total += np.einsum("oi,ihw->ohw", weight[:, :, row, column], part)
        return (total << b >> exponent[:, None, None]) + bias[:, None, None]

    def q(self, name: str) -> Ints:
        return self.weights.tensors[f"prior.{name}.table"][self.quality - 1][:, None, None]

    def decode(self, segments: Sequence[bytes | None], height: int, width: int) -> Iterator[Ints]:
        """Indices of each level, (h, w, P), from the tile's segment of every layer, None where it is missing.

        Args:
            height, width: of the tile, padded to whole units.
        """
        coders = [None if segment is None else RangeDecoder(segment) for segment in segments]
        missing = False
        s = np.zeros(0, np.int64)
        for level, stage in enumerate(self.weights.levels):
            h, w = height // stage["stride"], width // stage["stride"]
            here = f"levels.{level}"
            if level == 0:
                s = np.zeros((self.weights.config["prior"]["channels"], h, w), np.int64)
            else:
                ratio = self.weights.levels[level - 1]["stride"] // stage["stride"]
                s = shuffle(self.conv(f"{here}.expand", act(s), b=4), ratio)
            s = s + 16 * self.q(f"{here}.start")
            found = []
            for index, piece in enumerate(stage["slices"]):
                name = f"{here}.slices.{index}"
                coder = coders[piece["layer"]]
                missing = missing or coder is None
                if missing or coder is None:
                    found.append(np.zeros((h, w, piece["planes"]), np.int64))
                    continue
                for block in range(self.weights.config["prior"]["blocks"]):
                    hidden = self.conv(f"{name}.blocks.{block}.spread", act(s)) + self.q(
                        f"{name}.blocks.{block}.quality"
                    )
                    s = s + self.conv(f"{name}.blocks.{block}.merge", gate(hidden), b=4)
                context = self.conv(f"{name}.context", act(s)) + self.q(f"{name}.quality")
                stored = ("inputs", "counts") if piece.get("rows") else ("inputs", "values", "bias")
                tables = {t: self.weights.tensors[f"tables.levels.{level}.{index}.{t}"] for t in stored}
                planes = piece["planes"]
                k = np.zeros((planes * 2 * piece["dim"], h, w), np.int64)
                indices = np.zeros((h, w, planes), np.int64)
                for number, places in enumerate(self.passes(h, w)):
                    hidden = self.see(name, number, context, k)
                    parameters = clamp(self.conv(f"{name}.head", gate(hidden))).reshape(planes, -1, h, w)
                    self.read(coder, parameters, places, tables, indices)
                    for y, x in places:
                        k[:, y, x] = np.concatenate([tables["inputs"][j, indices[y, x, j]] for j in range(planes)])
                if f"prior.{name}.absorb.weight" in self.weights.tensors:
                    s = s + self.conv(f"{name}.absorb", k, b=4)
                found.append(indices)
            yield np.concatenate(found, 2)

    def passes(self, h: int, w: int) -> list[list[tuple[int, int]]]:
        """Positions of each pass."""
        if self.weights.config["prior"].get("layers"):
            return [[(y, x)] for y in range(h) for x in range(w)]
        return [[(y, x) for y in range(top, h, 2) for x in range(left, w, 2)] for top, left in PHASES]

    def see(self, name: str, number: int, h: Ints, k: Ints) -> Ints:
        """What the head of a slice gets in a pass, at all positions."""
        layers = self.weights.config["prior"].get("layers")
        if layers:
            x = clamp(self.conv(f"{name}.near", k))
            a, b = (np.zeros_like(x) for _ in "ab")
            a[:, 1:], b[:, :, 1:] = x[:, :-1], 16 * x[:, :, :-1]
            for layer in range(layers):
                here = f"{name}.layers.{layer}"
                r = self.conv(f"{here}.vertical", a) + h
                t = self.conv(f"{here}.horizontal", act(b)) + self.conv(f"{here}.link", clamp(r)) + h
                a = gate(r)
                b = b + self.conv(f"{here}.merge", gate(t), b=4)
            return h + self.conv(f"{name}.out", act(b))
        if number:
            return h + self.conv(f"{name}.phases.{number - 1}", clamp(self.conv(f"{name}.near", k)))
        return h

    @staticmethod
    def read(
        coder: RangeDecoder, parameters: Ints, places: list[tuple[int, int]], tables: dict[str, Ints], indices: Ints
    ) -> None:
        """The symbols of one pass, into `indices`."""
        planes = len(parameters)
        if "counts" in tables:
            rows = len(tables["counts"])
            symbols = [
                ((int(parameters[j, 0, y, x]) + 127) * rows // 255, y, x, j) for y, x in places for j in range(planes)
            ]
            for row, y, x, plane in sorted(symbols, key=lambda symbol: symbol[0]):
                indices[y, x, plane] = coder.get(tables["counts"][row].tolist())
            return
        for y, x in places:
            for plane in range(planes):
                indices[y, x, plane] = coder.get(flag_counts(int(parameters[plane, -1, y, x])))
        for plane in range(planes):
            for y, x in places:
                if indices[y, x, plane]:
                    values, bias, dim = tables["values"][plane], tables["bias"][plane], tables["inputs"].shape[2] // 2
                    counts = value_counts(parameters[plane, :, y, x].tolist(), dim, values, bias)
                    indices[y, x, plane] = coder.get(counts) + 1


class Renderer:
    """Indices -> pixels."""

    def __init__(self, weights: Weights, quality: int) -> None:
        self.weights = weights
        self.t = (quality - 1) / 99
        low, high = weights.config["lambda_range"]
        usual = (10 / low) ** 0.5 / 64 * (low / high) ** (self.t / 2)
        self.bound = usual * 1.5

    def tensor(self, name: str) -> Floats:
        return self.weights.floats[f"vqvae.{name}"]

    def conv(self, name: str, x: Floats) -> Floats:
        """1x1 or 3x3, in groups or not, with biases or without, as the tensors are."""
        weight = self.tensor(f"{name}.weight")
        groups = len(x) // weight.shape[1]
        if groups > 1:
            whole = np.zeros((len(weight), len(x), *weight.shape[2:]))
            for channel, kernel in enumerate(weight):
                first = channel * groups // len(weight) * weight.shape[1]
                whole[channel, first : first + weight.shape[1]] = kernel
            weight = whole
        weight = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
        outputs, _, side, _ = weight.shape
        padded = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
        total = np.zeros((outputs, *x.shape[1:]))
        for row in range(side):
            for column in range(side):
                part = padded[:, row : row + x.shape[1], column : column + x.shape[2]]
                total += np.tensordot(weight[:, :, row, column], part, 1)
        if f"vqvae.{name}.bias" in self.weights.floats:
            total += self.tensor(f"{name}.bias")[:, None, None]
        return total

    def block(self, name: str, x: Floats) -> Floats:
        def f(y: Floats) -> Floats:
            return np.where(y < 0, y / 10, y)

        basis = np.cos(np.arange(6) * np.arccos(2 * self.t - 1))
        gain, shift = np.split(self.tensor(f"{name}.quality.weight") @ basis + self.tensor(f"{name}.quality.bias"), 2)
        size = np.maximum(self.tensor(f"{name}.deviation"), self.bound)
        y = self.conv(f"{name}.spatial", f(self.conv(f"{name}.reduce", x / size[:, None, None])))
        y = f(y * (1 + gain[:, None, None]) + shift[:, None, None])
        return x + self.bound * self.conv(f"{name}.expand", y)

    def unlap(self, x: Floats, r: int) -> Floats:
        weight, half = self.tensor("stages.0.unlap.weight"), r // 2
        for axis in (2, 1):
            length = x.shape[axis]
            whole = np.eye(length)
            for start in range(half, length - r, r):
                whole[start : start + r, start : start + r] = weight
            x = np.moveaxis(np.tensordot(whole, x, (1, axis)), 0, axis)
        return x

    def render(self, x: Floats, features: Floats) -> Floats:
        def f(y: Floats) -> Floats:
            return np.where(y < 0, y / 10, y)

        def sized(y: Floats, deviation: Floats) -> Floats:
            return y / np.maximum(deviation, self.bound)[:, None, None]

        name = "stages.0.renderer"
        ratio = x.shape[1] // features.shape[1] // 4
        basis = self.tensor(f"{name}.basis")
        n = sized(features, self.tensor(f"{name}.deviation"))
        c = sized(np.tensordot(basis, unshuffle(x, 4), 1), self.tensor(f"{name}.detail"))
        gain, shift = np.split(self.conv(f"{name}.modulation", f(n)).repeat(ratio, 1).repeat(ratio, 2), 2)
        own = shuffle(self.conv(f"{name}.features", n), ratio)
        y = f(self.conv(f"{name}.reduce", np.concatenate([c, own])))
        y = f(self.conv(f"{name}.mix", y) * (1 + gain) + shift)
        return x + shuffle(self.bound * np.tensordot(basis.T, self.conv(f"{name}.expand", y), 1), 4)

    def add_codes(self, name: str, piece: dict[str, Any], indices: Ints, channels: Floats) -> None:
        """Add what the indices of a slice stand for to its channels of the estimate, in place."""
        vectors, knots = self.tensor(f"{name}.codebook.vectors"), self.tensor(f"{name}.log_steps")
        for plane in range(piece["planes"]):
            step = np.exp(np.interp(self.t, np.linspace(0, 1, 9), knots[:, plane]))
            for d in range(piece["dim"]):
                channels[plane * piece["dim"] + d] += step * vectors[plane, indices[:, :, plane], d]

    def hand_down(self, level: int, x: Floats) -> Floats:
        """From a level's estimate to the start of the next finer one's, or to values of pixels."""
        stages = self.weights.config["stages"]
        number = len(stages) - 1 - level
        stage, name = stages[number], f"stages.{number}"
        r = stage["stride"] // (stages[number - 1]["stride"] if number else 1)
        for block in range(stage["decoder_blocks"]):
            x = self.block(f"{name}.decoder.{block}", x)
        features, x = x, shuffle(self.conv(f"{name}.synthesis", x), r)
        if stage["lapped"]:
            x = self.unlap(x, r)
        for block in range((stage.get("cells") or {"decoder_blocks": 0})["decoder_blocks"]):
            basis = self.tensor(f"{name}.cell_decoder.basis")
            cells = np.tensordot(basis, unshuffle(x, 4), 1)
            added = self.block(f"{name}.cell_decoder.blocks.{block}", cells) - cells
            x = x + shuffle(np.tensordot(basis.T, added, 1), 4)
        if stage["renderer"]:
            x = self.render(x, features)
        return x

    def pixels(self, indices: Sequence[Ints], height: int, width: int, grey: bool = False) -> NDArray[np.uint8]:
        """uint8 (height, width, 3), or (height, width) if grey.

        Args:
            indices: of each level, (h, w, P), of all tiles together.
        """
        x = np.zeros(0)
        for level, stage in enumerate(self.weights.levels):
            if level == 0:
                x = np.zeros((stage["channels"], *indices[0].shape[:2]))
            plane = channel = 0
            for index, piece in enumerate(stage["slices"]):
                name = f"slices.{level}.{index}"
                if (level, index) != (0, 0):
                    x = self.block(f"{name}.refine", x)
                self.add_codes(name, piece, indices[level][:, :, plane : plane + piece["planes"]], x[channel:])
                plane += piece["planes"]
                channel += piece["planes"] * piece["dim"]
            x = self.hand_down(level, x)
        found = np.clip(np.rint(x * 64 + 128), 0, 255).transpose(1, 2, 0)[:height, :width]
        return (np.rint(found.mean(2)) if grey else found).astype(np.uint8)
