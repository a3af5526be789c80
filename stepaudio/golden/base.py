"""A row of a golden comparison, and the two ways to make one."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenizer.errors import RequestError


@dataclass(frozen=True)
class Row:
    """One compared group: the largest difference (or the count of unequal items) and its bound."""

    group: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # NaN fails


def close(group: str, actual: Any, expected: Any, tolerance: float, note: str = "") -> Row:
    """Largest absolute difference of two arrays or tensors; infinite when shapes differ."""
    actual, expected = _array(actual), _array(expected)
    if actual.shape != expected.shape:
        return Row(group, float("inf"), tolerance, f"shape {actual.shape}, expected {expected.shape}")
    difference = float(np.abs(actual - expected).max()) if actual.size else 0.0
    return Row(group, difference, tolerance, note)


def exact(
    group: str, actual: Sequence[Any], expected: Sequence[Any], ignore: Collection[int] = (), note: str = ""
) -> Row:
    """Number of unequal items outside the positions to ignore; tolerance 0."""
    if len(actual) != len(expected):
        return Row(group, float("inf"), 0.0, f"length {len(actual)}, expected {len(expected)}")
    unequal = [i for i, (a, b) in enumerate(zip(actual, expected)) if a != b and i not in ignore]
    if unequal:
        at = unequal[0]
        note = f"first at {at}: {actual[at]!r}, expected {expected[at]!r}"
    return Row(group, float(len(unequal)), 0.0, note)


def read_json(path: Path) -> dict[str, Any]:
    """The golden.json of a component."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path} is missing: give the folder that holds the golden components") from None
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from None


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)
