"""Sound to dual codes: the linguistic (16.7 Hz) and semantic (25 Hz) tokenizers of Step-Audio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.compat import StepAudioTokenizer

__all__ = ["StepAudioTokenizer"]


def __getattr__(name: str) -> Any:
    """Loads the class when it is asked for: importing a small module of this package must not load torch."""
    if name == "StepAudioTokenizer":
        from tokenizer.compat import StepAudioTokenizer

        return StepAudioTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
