"""Sound to dual codes: the linguistic (16.7 Hz) and semantic (25 Hz) tokenizers of Step-Audio."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Threads that wait for each other sleep instead of spinning: where another process shares the cores, spinning made
# small models 50 times slower. Read when torch is loaded, so it stands before that; a value of the user's own wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from tokenizer.compat import StepAudioTokenizer

__all__ = ["StepAudioTokenizer"]


def __getattr__(name: str) -> Any:
    """Loads the class when it is asked for: importing a small module of this package must not load torch."""
    if name == "StepAudioTokenizer":
        from tokenizer.compat import StepAudioTokenizer

        return StepAudioTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
