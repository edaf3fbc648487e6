"""From a template of this folder to one self-contained HTML text, in which everything but our own SVG is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Characters that HTML forbids, which a model may well write."""


def render_template(name: str, context: Mapping[str, Any]) -> str:
    """The template `name` filled in; a name that `context` lacks is an error."""
    environment = Environment(
        loader=PackageLoader("megatron_plasticity.study.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", environment.get_template(name).render(context))
