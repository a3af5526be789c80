"""Triton's compiler and language, or stand-ins without which no module here could be imported on other machines.

Knows nothing about kernels. `available.py` decides whether one may be launched; only then is `tl` looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda as tl_cuda

    jit: Callable[[Callable[..., None]], Any] = triton.jit
except ImportError:  # no such package for this system
    triton = tl = tl_cuda = None

    def jit(function: Callable[..., Any]) -> Any:
        """Leaves the function as it is: nothing will launch it."""
        return function


__all__ = ["jit", "tl", "tl_cuda", "triton"]
