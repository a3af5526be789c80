"""Step-Audio: speech chat, speech recognition and speech synthesis in one package.

Importing it is quick: the engines are loaded when they are asked for. It also teaches transformers' Auto classes
the model type of the release, at once or, if that library is not imported yet, as soon as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tokenizer  # noqa: F401  how threads wait is decided there, before torch is loaded
from stepaudio.auto import register_step1

if TYPE_CHECKING:
    from stepaudio.compat import StepAudio, StepAudioTTS

__all__ = ["StepAudio", "StepAudioTTS"]

register_step1()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from stepaudio import compat

        return getattr(compat, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
