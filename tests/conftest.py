"""Fixtures shared by every room's tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models here are so small that more threads only wait for each other

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deselects nothing silently: gpu and weights tests say why they cannot run here."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "weights" in item.keywords and not os.environ.get("STEPAUDIO_RELEASED"):
            item.add_marker(pytest.mark.skip(reason="set STEPAUDIO_RELEASED to a folder with the released files"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the recorded data of every component."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint in the release's layout, made once per run."""
    from stepaudio.make_checkpoint import make_checkpoint

    root = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint(root, preset="tiny", seed=0)
    return root
