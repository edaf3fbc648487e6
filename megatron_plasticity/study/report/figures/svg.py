"""matplotlib figures as small inline SVGs: text stays text, colours follow the page's scheme, ids never clash.

Figures are drawn in fixed marker colours (`INK`, `MUTED`, … and one colour per λ), which are replaced here by CSS variables; so
the same SVG reads well on a light page, on a dark one and on paper. One unit of a figure is one CSS pixel.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, SURFACE = "#101112", "#606162", "#d0d1d2", "#b0301f", "#fdfdfe"
_SCHEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", ACCENT: "var(--accent)", SURFACE: "var(--surface)"}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a token or a name is a dollar sign
    "axes.unicode_minus": True,
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 12,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "image.interpolation": "none",
}


class Palette:
    """One colour per λ, from a sequential map that is light enough on dark pages and dark enough on light ones."""

    def __init__(self, weight_decays: Sequence[float]) -> None:
        ordered = sorted(set(weight_decays))
        shares = [index / max(1, len(ordered) - 1) for index in range(len(ordered))]
        colours = matplotlib.colormaps["plasma"]
        self.light = [to_hex(colours(0.02 + 0.80 * share)) for share in shares]
        self.dark = [to_hex(colours(0.36 + 0.62 * share)) for share in shares]
        self._index = {decay: index for index, decay in enumerate(ordered)}

    def __getitem__(self, weight_decay: float) -> str:
        """Hex colour to draw with."""
        return self.light[self._index[weight_decay]]

    def variable(self, weight_decay: float) -> str:
        """CSS expression of the same colour."""
        return f"var(--lambda-{self._index[weight_decay]})"

    @property
    def variables(self) -> dict[str, str]:
        return {colour: f"var(--lambda-{index})" for index, colour in enumerate(self.light)}


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all figures of the report; build figures and call `render` inside it."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # the browser has the glyph
        yield


def panel(width: int, height: int, *, left: int = 60, right: int = 12, top: int = 26, bottom: int = 42) -> tuple[Figure, Axes]:
    """An empty figure of `width` by `height` CSS pixels with one set of axes inside the given margins.

    The margins are fixed, since laying figures out by measuring their text would double the time of the report.
    """
    figure = Figure(figsize=(width / 72, height / 72))
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure, figure.add_subplot()


def render(figure: Figure, name: str, description: str, palette: Palette) -> str:
    """The figure as an `<svg>` element. `name` is unique on the page; `description` is its text for screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata":
            root.remove(child)
    _rename_ids(root, f"f{sha256(name.encode()).hexdigest()[:8]}-")
    _recolour(root, {**_SCHEME, **palette.variables})
    width, height = root.get("width", "").removesuffix("pt"), root.get("height", "").removesuffix("pt")
    root.attrib.update({"width": width, "height": height, "role": "img", "aria-label": printable(description)})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return re.sub(r"\n\s*", "\n", ElementTree.tostring(root, encoding="unicode"))


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Give every id that is referred to the figure's own prefix, and drop the others.

    matplotlib numbers them alike in each figure.
    """
    texts = [value for element in root.iter() for value in element.attrib.values()]
    referred = {found for text in texts for found in re.findall(r"url\(#([^)]+)\)", text)}
    referred |= {element.get(f"{{{_XLINK}}}href", "").removeprefix("#") for element in root.iter()}
    for element in root.iter():
        if (identity := element.attrib.pop("id", None)) in referred:
            element.set("id", prefix + str(identity))
        for key, value in list(element.attrib.items()):
            if key == f"{{{_XLINK}}}href":
                del element.attrib[key]
                element.set("href", f"#{prefix}{value[1:]}" if value.startswith("#") else value)
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}"))


def _recolour(root: ElementTree.Element, variables: Mapping[str, str]) -> None:
    pattern = re.compile("|".join(map(re.escape, variables)))
    for element in root.iter():
        if style := element.get("style"):
            # The page's own font is narrower than the one that matplotlib measured with, so text still fits.
            style = re.sub(r"font: (?:[a-z]+ )*([\d.]+px) [^;]*", r"font-size: \1", style)
            element.set("style", pattern.sub(lambda match: variables[match.group()], style))


def printable(text: str) -> str:
    """`text` for a label: line breaks and tabs shown as signs, characters that XML forbids or that cannot be seen as `�`."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(sign, sign if sign.isprintable() else "�") for sign in text)
