"""The shapes that a configuration asks for: weights are compared with them before memory is allocated.

Each module of the networks has a tensor here that is as large as any of its others, but for a factor of about ten. So
networks that pass the comparison take a small multiple of the memory that their file does.
"""

from collections.abc import Iterator

from vqcodec.models.config import CELL, FEATURES, CellConfig, Config

NamedShapes = Iterator[tuple[str, tuple[int, ...]]]


def large_tensors(config: Config) -> NamedShapes:
    """Name and shape of the largest tensors of every module, as they are called in a weights file."""
    channels, stride = 3, 1
    for number, stage in enumerate(config.stages):
        name, ratio = f"vqvae.stages.{number}", stage.stride // stride
        yield f"{name}.analysis.weight", (stage.channels, channels * ratio**2)
        if stage.lapped:
            yield f"{name}.lap.weight", (ratio, ratio)
        if stage.renderer:
            yield f"{name}.renderer.features.weight", (FEATURES * (stage.stride // CELL) ** 2, stage.channels, 1, 1)
            yield f"{name}.renderer.modulation.weight", (2 * stage.renderer, stage.channels, 1, 1)
            yield f"{name}.renderer.mix.weight", (stage.renderer, stage.renderer, 1, 1)
        for part, count in (("encoder", stage.encoder_blocks), ("decoder", stage.decoder_blocks)):
            for block in range(count):
                yield from _block(f"{name}.{part}.{block}", stage.channels, stage.hidden, stage.groups)
        yield from _cells(name, stage.cells)
        channels, stride = stage.channels, stage.stride
    for level in range(len(config.levels)):
        yield from _level(config, level)


def _block(name: str, channels: int, hidden: int, groups: int) -> NamedShapes:
    """Of a residual block."""
    yield f"{name}.reduce.weight", (hidden, channels, 1, 1)
    yield f"{name}.spatial.weight", (hidden, hidden // groups, 3, 3)


def _cells(name: str, cells: CellConfig | None) -> NamedShapes:
    """Of the residual blocks on cells of a stage."""
    if cells is not None:
        for side, count, groups in (
            ("encoder", cells.encoder_blocks, cells.encoder_groups),
            ("decoder", cells.decoder_blocks, cells.decoder_groups),
        ):
            for block in range(count):
                yield from _block(f"{name}.cell_{side}.blocks.{block}", 3 * CELL**2, cells.hidden, groups)


def _level(config: Config, level: int) -> NamedShapes:
    """Of a level's slices: quantisers, prior and tables."""
    width, stage = config.prior.channels, config.levels[level]
    for index, piece in enumerate(stage.slices):
        if level or index:
            yield from _block(f"vqvae.slices.{level}.{index}.refine", stage.channels, stage.hidden, stage.groups)
        yield f"vqvae.slices.{level}.{index}.codebook.vectors", (piece.planes, piece.codes, piece.dim)
        tables, prior = f"tables.levels.{level}.{index}", f"prior.levels.{level}.slices.{index}"
        if piece.rows:
            yield f"{tables}.counts", (piece.rows, piece.codes)
        else:
            yield f"{tables}.values", (piece.planes, piece.parameters - 1, piece.codes - 1)
        yield f"{prior}.head.weight", (piece.planes * piece.parameters, width, 1, 1)
        for block in range(config.prior.blocks):
            yield f"{prior}.blocks.{block}.spread.weight", (2 * width, width, 3, 3)
        for layer in range(config.prior.layers):
            yield f"{prior}.layers.{layer}.vertical.weight", (2 * width, width, 2, 3)
        if not config.prior.layers:
            yield f"{prior}.phases.0.weight", (2 * width, config.prior.embedding, 3, 3)
