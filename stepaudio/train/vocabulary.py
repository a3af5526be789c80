"""The small text vocabulary of a new checkpoint: single characters, and the standing prompts line by line.

Characters keep spelling and pronunciation learnable from little data; a line of a standing prompt is one
piece, so that a prompt of 400 characters costs a short context two dozen tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from sentencepiece import sentencepiece_model_pb2

from stepaudio.export.vocabulary import build_vocabulary

_CHARACTER, _LINE = -6.0, -1.0  # log-probabilities: a line is always cheaper than its characters


def nano_vocabulary(texts: Iterable[str], standing: Iterable[str]) -> sentencepiece_model_pb2.ModelProto:
    """Pieces for every character of `texts` and `standing`, and for every part of `standing` between line breaks."""
    characters: set[str] = set()
    lines: set[str] = set()
    for text in texts:
        characters |= set(text)
    for text in standing:
        characters |= set(text)
        lines |= {line.replace(" ", "▁") for line in text.split("\n") if len(line) > 1}
    pieces = {"▁": _CHARACTER}
    pieces |= dict.fromkeys(sorted(characters - {" ", "\n", "▁"}), _CHARACTER)
    pieces |= dict.fromkeys(sorted(lines), _LINE)
    return build_vocabulary(pieces)
