"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from megatron_plasticity.config.training import ScheduleConfig


def learning_rate_at(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) in a run of `total_steps`.

    Warm-up is linear and reaches the peak in its last step: step s of w warm-up steps runs at peak·(s+1)/w. What follows falls
    from the peak to `final_fraction`·peak, which the last step of the run reaches.
    """
    warmup = round(schedule.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    final = peak * schedule.final_fraction
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        decay_steps = round(schedule.decay_fraction * total_steps)
        into_decay = step - (total_steps - decay_steps)
        return peak if into_decay < 0 else final + (peak - final) * (1 - (into_decay + 1) / decay_steps)
    progress = (step + 1 - warmup) / max(1, total_steps - warmup)
    if schedule.kind == "linear":
        return final + (peak - final) * (1 - progress)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
