"""The dual-codebook stream: its numbers, its 2:3 interleave and its spellings.

This is the only place that knows the codebook sizes, the interleave and the id base.
`AudioCodes.interleaved` (0..5119) is the truth; the two codebooks are views of it, because a
language model may break the 2:3 pattern and the flow model embeds codes in emitted order.
Source: formats.md sections 0 and 9.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenizer.errors import RequestError


@dataclass(frozen=True)
class CodeLayout:
    """Sizes and order of the interleaved stream."""

    linguistic_size: int = 1024  # codes 0..1023, 16.67 per second
    semantic_size: int = 4096  # codes 1024..5119, 25 per second
    linguistic_group: int = 2  # so many linguistic codes,
    semantic_group: int = 3  # then so many semantic ones, and again
    group_seconds: float = 0.12  # sound that one group of 2 + 3 stands for
    id_base: int = 65536  # token id of <audio_0> in the release's text tokenizer

    @property
    def size(self) -> int:
        """Number of interleaved codes (5120)."""
        return self.linguistic_size + self.semantic_size

    @property
    def group(self) -> int:
        """Codes in one group (5)."""
        return self.linguistic_group + self.semantic_group

    @property
    def rate(self) -> float:
        """Interleaved codes per second (41.667)."""
        return self.group / self.group_seconds

    @property
    def pattern(self) -> tuple[tuple[int, int], ...]:
        """Half-open code range of each position in a group."""
        linguistic = (0, self.linguistic_size)
        semantic = (self.linguistic_size, self.size)
        return (linguistic,) * self.linguistic_group + (semantic,) * self.semantic_group


LAYOUT = CodeLayout()
_AUDIO_TEXT = re.compile(r"<audio_(\d+)>")


def _whole_numbers(values: Sequence[int] | np.ndarray) -> np.ndarray:
    """A copy as int64 [n]; RequestError for anything but a flat list of whole numbers."""
    try:
        numbers = np.asarray(values)
    except ValueError:
        raise RequestError("audio codes must be a flat list of whole numbers, not lists of several lengths") from None
    if numbers.size == 0:
        return np.zeros(0, np.int64)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise RequestError(f"audio codes must be a flat list of whole numbers, not {numbers.dtype} {numbers.shape}")
    return numbers.astype(np.int64)


@dataclass(frozen=True, eq=False)
class AudioCodes:
    """One utterance as interleaved codes, int64 [n], each 0..5119.

    Raises RequestError for a code outside the range or a shape other than [n].
    """

    interleaved: np.ndarray

    def __post_init__(self) -> None:
        codes = _whole_numbers(self.interleaved)
        outside = np.flatnonzero((codes < 0) | (codes >= LAYOUT.size))
        if outside.size:
            at = int(outside[0])
            raise RequestError(
                f"audio code {int(codes[at])} at position {at} is outside 0..{LAYOUT.size - 1} "
                "(token ids become codes with from_ids)"
            )
        codes.setflags(write=False)
        object.__setattr__(self, "interleaved", codes)

    @classmethod
    def merge(cls, linguistic: Sequence[int] | np.ndarray, semantic: Sequence[int] | np.ndarray) -> AudioCodes:
        """Interleaves two code streams 2:3; what does not fill a whole group is dropped."""
        linguistic, semantic = _whole_numbers(linguistic), _whole_numbers(semantic)
        for name, codes, size in (
            ("linguistic", linguistic, LAYOUT.linguistic_size),
            ("semantic", semantic, LAYOUT.semantic_size),
        ):
            if codes.size and (codes.min() < 0 or codes.max() >= size):
                raise RequestError(f"{name} codes must lie in 0..{size - 1}, found {codes.min()}..{codes.max()}")
        groups = min(len(linguistic) // LAYOUT.linguistic_group, len(semantic) // LAYOUT.semantic_group)
        rows = np.concatenate(
            [
                linguistic[: groups * LAYOUT.linguistic_group].reshape(groups, LAYOUT.linguistic_group),
                semantic[: groups * LAYOUT.semantic_group].reshape(groups, LAYOUT.semantic_group)
                + LAYOUT.linguistic_size,
            ],
            axis=1,
        )
        return cls(rows.reshape(-1))

    @classmethod
    def from_ids(cls, ids: Iterable[int], base: int = LAYOUT.id_base) -> AudioCodes:
        """From token ids; `base` is the id of `<audio_0>` (65536 in the release)."""
        return cls(_whole_numbers(list(ids)) - base)

    @classmethod
    def from_text(cls, text: str) -> AudioCodes:
        """From `<audio_3><audio_1027>...`; raises RequestError for anything between the pieces."""
        codes = _AUDIO_TEXT.findall(text)
        rest = _AUDIO_TEXT.sub("", text).strip()
        if rest:
            raise RequestError(f"audio text must be <audio_N> pieces only, found {rest[:40]!r}")
        return cls(_whole_numbers([int(code) for code in codes]))

    def to_ids(self, base: int = LAYOUT.id_base) -> list[int]:
        return (self.interleaved + base).tolist()

    def to_text(self) -> str:
        return "".join(f"<audio_{code}>" for code in self.interleaved)

    @property
    def linguistic(self) -> np.ndarray:
        """Linguistic codes 0..1023 in emitted order, int64."""
        return self.interleaved[self.interleaved < LAYOUT.linguistic_size]

    @property
    def semantic(self) -> np.ndarray:
        """Semantic codes 0..4095 in emitted order, int64."""
        return self.interleaved[self.interleaved >= LAYOUT.linguistic_size] - LAYOUT.linguistic_size

    @property
    def seconds(self) -> float:
        """Sound the codes stand for."""
        return len(self) / LAYOUT.rate

    def first_break(self) -> int | None:
        """Position of the first code that breaks the 2:3 pattern, or None. A cut-off last group is no break."""
        expected = np.resize(np.repeat([True, False], [LAYOUT.linguistic_group, LAYOUT.semantic_group]), len(self))
        broken = np.flatnonzero((self.interleaved < LAYOUT.linguistic_size) != expected)
        return int(broken[0]) if broken.size else None

    def __len__(self) -> int:
        return len(self.interleaved)

    def __add__(self, other: AudioCodes) -> AudioCodes:
        return AudioCodes(np.concatenate([self.interleaved, other.interleaved]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AudioCodes) and np.array_equal(self.interleaved, other.interleaved)

    def __hash__(self) -> int:
        return hash(self.interleaved.tobytes())
