"""What a run tells of itself while it goes on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: "start", "train", "validate" or "export". step: optimisation steps done.
        elapsed, remaining: seconds of the run; inf before the first step of a run whose length is in crops.
        bpp, psnr: exponential moving averages over training crops of all qualities (bits per pixel, dB); nan before the
            first step. loss: of the last step.
        perplexity: codes in effective use per plane, averaged over planes.
    """

    stage: str
    step: int
    elapsed: float
    remaining: float
    bpp: float
    psnr: float
    loss: float
    perplexity: float
