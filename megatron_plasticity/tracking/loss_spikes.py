"""When a training loss stands out from those before it."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 32
LEAST = 8
"""Losses that must be known before one can stand out."""
LEAST_EXCESS = 0.1
"""Nats. Below this nothing is a spike, however quiet the losses were."""
_SIGMA = 1.4826  # median absolute deviation of a normal distribution → its standard deviation


class LossSpikes:
    """Compares each loss with the median of the last 32: what lies more than `deviations` standard deviations
    above, estimated by the median absolute deviation, and at least 0.1 nats, is a spike. A loss that stays high becomes the
    rule: it is no spike any more when it fills half of them."""

    def __init__(self, deviations: float) -> None:
        """`deviations` of 0: nothing is a spike."""
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def excess(self, loss: float) -> float | None:
        """How many nats `loss` lies above what was expected, if it is a spike; it counts among the losses from now on."""
        expected = median(self._losses) if len(self._losses) >= LEAST else None
        found = None
        if expected is not None and self._deviations:
            spread = _SIGMA * median(abs(known - expected) for known in self._losses)
            if loss - expected > max(LEAST_EXCESS, self._deviations * spread):
                found = loss - expected
        self._losses.append(loss)
        return found
