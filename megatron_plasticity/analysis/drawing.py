"""The style of the figures that an analysis writes into its run folder, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_plasticity.config.files import write_text_atomic

INK, MUTED, GRID = "#101112", "#606162", "#d0d1d2"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-plasticity",
    "figure.facecolor": "white",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "image.interpolation": "none",
}


@contextmanager
def drawing() -> Iterator[None]:
    """The style; build figures and save them inside it."""
    with matplotlib.rc_context(_STYLE):
        yield


def save_svg(figure: Figure, path: Path) -> None:
    """Write the figure; equal figures are equal files."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_text_atomic(path, buffer.getvalue())
