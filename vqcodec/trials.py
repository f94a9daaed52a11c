"""Encodes one picture at the settings that a search for a size or a likeness tries, with no more work than that takes.

Files are kept, because they are small and any of them may be the one that is found. Of codes, those of one setting are
kept: the one whose likeness comes closest to the goal so far.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import coding, encoder, search, synthesis, tuning
from vqcodec.frame import Frame
from vqcodec.models.model import Model
from vqcodec.target import Setting
from vqcodec.tuning import Importance, Tuning

Pixels = NDArray[np.uint8]
KEPT = 2  # qualities whose latents are kept


class Trials:
    """Encodings of a picture by setting.

    Args:
        model: the weights. pixels: uint8 (H, W, 3). tuned: the visual tuning to choose codes with; None for squared
            error.
        frame_of: the frame of a file of some quality. write: makes a file of a frame and its segments.
        rounds: search steps in each window. on_progress: see `codec.compress`.
    """

    def __init__(
        self,
        model: Model,
        pixels: Pixels,
        tuned: Tuning | None,
        frame_of: Callable[[int], Frame],
        write: Callable[[Frame, list[bytes]], bytes],
        rounds: int,
        on_progress: Callable[[float], None] | None,
    ) -> None:
        self.model, self.pixels, self.tuned = model, pixels, tuned
        self.frame_of, self.write, self.rounds, self.on_progress = frame_of, write, rounds, on_progress
        self._files: dict[Setting, tuple[bytes, bytes]] = {}
        self._likenesses: dict[Setting, float] = {}
        self._closest: tuple[Setting, list[Tensor]] | None = None
        # Of the last qualities, the latest one last: the emphasis is searched for at one of them. Latents are as large
        # as the picture, so they must go with this object: a cache around its own method would keep it alive.
        self._latents: dict[int, list[Tensor]] = {}

    def file(self, setting: Setting) -> tuple[bytes, bytes]:
        """The file, and `digest` of the codes in it."""
        if setting not in self._files:
            frame = self.frame_of(setting.quality)
            if self._closest is not None and self._closest[0] == setting:
                codes = self._closest[1]
                with coding.exact(self.model):
                    (segments,) = coding.encode(self.model, frame, codes)
            else:
                coders = coding.new_coders(self.model, frame, 1)
                codes = self._choose(setting, coders)
                (segments,) = coding.in_file_order(coders)
            self._files[setting] = self.write(frame, segments), digest(codes)
        return self._files[setting]

    def size(self, setting: Setting) -> int:
        """Bytes of the file."""
        return len(self.file(setting)[0])

    def likeness(self, setting: Setting, metric: Callable[[Pixels, Pixels], float], goal: float) -> float:
        """What a metric says of the decoded picture; no file is made.

        Args:
            metric: the same in all calls. goal: the value that is searched for.
        """
        if setting not in self._likenesses:
            codes = self._choose(setting)
            with coding.exact(self.model):
                (restored,) = synthesis.reconstruct(self.model, self.frame_of(setting.quality), codes)
            value = metric(self.pixels, restored)
            if all(abs(value - goal) < abs(other - goal) for other in self._likenesses.values()):
                self._closest = setting, codes
            self._likenesses[setting] = value
        return self._likenesses[setting]

    def _choose(self, setting: Setting, coders: coding.Coders | None = None) -> list[Tensor]:
        """The codes, which also go to coders if there are any."""
        frame, importance = self.frame_of(setting.quality), self._importance(setting)
        with coding.exact(self.model):
            latents = self._latents_at(setting.quality)
        if self.rounds:
            latents = search.improve(self.model, frame, self.pixels, latents, self.rounds, importance, self.on_progress)
        with coding.exact(self.model):
            return encoder.choose(self.model, frame, latents, importance, coders)

    def _latents_at(self, quality: int) -> list[Tensor]:
        """The latents at a quality; those of the last KEPT qualities are kept."""
        latents = self._latents.pop(quality, None)
        if latents is None:
            if len(self._latents) == KEPT:
                del self._latents[next(iter(self._latents))]
            latents = synthesis.analyse(
                self.model, self.pixels[None], torch.tensor([quality], device=self.model.device)
            )
        self._latents[quality] = latents
        return latents

    def _importance(self, setting: Setting) -> Importance:
        if self.tuned is None:
            return tuning.flat(self.model.config, *setting)
        return self.tuned.importance(self.model.config, self.pixels[None], *setting)


def digest(codes: Sequence[Tensor]) -> bytes:
    """SHA-256 of codes as of coding.py."""
    found = hashlib.sha256()
    for level in codes:
        found.update(repr(tuple(level.shape)).encode())
        found.update(level.numpy().tobytes())
    return found.digest()
