"""How far a run that is under way has come, from its state."""

from __future__ import annotations

from typing import Any

from megatron_plasticity.tracking.progress import format_duration
from megatron_plasticity.tracking.run_state import RunState


def extrapolated(state: RunState) -> tuple[float, float] | None:
    """(whole duration, time left) of a run under way, in seconds; None before it has shown progress in this attempt."""
    progress: dict[str, Any] = state.progress or {}
    if state.heartbeat is None or "first_time" not in progress:
        return None
    advanced, elapsed = progress["done"] - progress["first_done"], state.heartbeat - progress["first_time"]
    if advanced <= 0 or elapsed <= 0:
        return None
    seconds_each = elapsed / advanced
    return seconds_each * progress["total"], seconds_each * (progress["total"] - progress["done"])


def progress_text(state: RunState) -> str:
    """How far a run is, how fast, and how long it will take."""
    progress: dict[str, Any] = state.progress or {}
    if not progress:
        return "starting"
    text = f"{float(progress['done']):,.0f}/{float(progress['total']):,.0f} {progress['unit']}"
    if "tokens_per_second" in progress:
        text += f", {float(progress['tokens_per_second']):,.0f} tokens/s"
    estimate = extrapolated(state)
    return text + (f", {format_duration(estimate[1])} left" if estimate else "")
