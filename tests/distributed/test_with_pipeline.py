"""Layouts with pipeline stages against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.matrix import LAYOUTS, Layout
from tests.distributed.oracle import cases, check

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("layout", cases(layout for layout in LAYOUTS if layout.pipeline > 1))
def test_equals_one_process(layout: Layout, tmp_path: Path) -> None:
    check(layout, tmp_path / "log")
