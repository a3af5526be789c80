"""Every recorded value of the public release, replayed through this code."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepaudio.golden.base import close, exact
from stepaudio.golden.replay import COMPONENTS, replay


@pytest.mark.parametrize("component", COMPONENTS)
def test_component(component: str, golden: Path) -> None:
    rows = replay(component, golden)
    assert rows
    failed = [row for row in rows if not row.ok]
    assert not failed, "\n".join(f"{row.group}: {row.difference:g} > {row.tolerance:g} {row.note}" for row in failed)


def test_a_difference_fails_a_row() -> None:
    assert not close("x", [1.0, 2.0], [1.0, 2.1], 0.05).ok
    assert not close("x", [1.0, float("nan")], [1.0, 2.0], 0.05).ok
    assert not close("x", [1.0], [1.0, 2.0], 0.05).ok
    assert not exact("x", [1, 2, 3], [1, 5, 3]).ok
    assert exact("x", [1, 2, 3], [1, 5, 3], ignore={1}).ok
