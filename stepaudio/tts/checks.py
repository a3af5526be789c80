"""What can be wrong with a generated piece of speech, seen without listening.

Knows codes, sound and the text's estimated duration. Decides nothing: the engine draws again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stepaudio.lm.base import StopReason
from stepaudio.tts.text import speech_seconds
from tokenizer.audio import Audio
from tokenizer.codes import LAYOUT, AudioCodes

LOOP_SECONDS = 2.4  # the same run of codes for so long is a loop; a pause in speech is shorter
_LOOP_REPEATS = 3
_LONGEST_RUN = 8  # groups of 2 + 3 codes, about a second
SILENT_PEAK = 0.01
SILENCE_SECONDS = 3.0
_FRAME_SECONDS = 0.02
_SLOWEST, _FASTEST = 3.0, 0.3  # times the estimate
_SLACK_SECONDS = 3.0  # breath, hesitation, very short texts
_MUSIC_STRETCH = 3.0  # sung words are held


class Problem(NamedTuple):
    """One finding: `empty`, `length`, `loop`, `pattern`, `short`, `long` or `silence`, and a sentence."""

    kind: str
    detail: str


def duration_bounds(text: str, music: bool = False) -> tuple[float, float]:
    """Seconds below and above which speech of this text is absurd; singing may be held three times as long."""
    seconds = speech_seconds(text)
    longest = seconds * _SLOWEST * (_MUSIC_STRETCH if music else 1.0) + _SLACK_SECONDS
    return max(0.0, seconds * _FASTEST - 0.5), longest


def check_codes(codes: AudioCodes, stop: StopReason, text: str, music: bool = False) -> list[Problem]:
    """Problems that the codes alone show."""
    if len(codes) == 0:
        return [Problem("empty", "no audio codes came out")]
    problems = []
    if stop is StopReason.LENGTH:
        problems.append(Problem("length", f"not finished after {codes.seconds:.1f} s"))
    if stop is StopReason.LOOP or loop_seconds(codes) >= LOOP_SECONDS:
        problems.append(Problem("loop", f"the same codes again and again, for {loop_seconds(codes):.1f} s"))
    if (broken := codes.first_break()) is not None:
        problems.append(Problem("pattern", f"code {broken} breaks the order of 2 linguistic and 3 semantic codes"))
    low, high = duration_bounds(text, music)
    if codes.seconds < low:
        problems.append(Problem("short", f"{codes.seconds:.1f} s, at least {low:.1f} s expected"))
    if codes.seconds > high:
        problems.append(Problem("long", f"{codes.seconds:.1f} s, at most {high:.1f} s expected"))
    return problems


def check_sound(audio: Audio) -> list[Problem]:
    """Problems that show in the decoded sound: silent throughout, or silent for over 3 s at a stretch."""
    size = int(_FRAME_SECONDS * audio.sample_rate)
    frames = np.abs(audio.samples[: len(audio) // size * size]).reshape(-1, size)
    loud = frames.max(axis=1) >= SILENT_PEAK if len(frames) else np.zeros(0, bool)
    if not loud.any():
        return [Problem("silence", "nothing is to be heard")]
    edges = np.flatnonzero(np.concatenate([[True], loud, [True]]))
    longest = (int(np.diff(edges).max()) - 1) * _FRAME_SECONDS
    return [Problem("silence", f"silent for {longest:.1f} s")] if longest > SILENCE_SECONDS else []


def loop_seconds(codes: AudioCodes) -> float:
    """Longest stretch made of one run (1 to 8 groups) repeated three times or more; 0 without any."""
    sequence = codes.interleaved
    longest = 0
    for groups in range(1, _LONGEST_RUN + 1):
        period = groups * LAYOUT.group
        equal = sequence[period:] == sequence[:-period]
        edges = np.flatnonzero(np.concatenate([[True], ~equal, [True]]))
        stretch = int(np.diff(edges).max()) - 1 + period
        if stretch >= _LOOP_REPEATS * period:
            longest = max(longest, stretch)
    return longest / LAYOUT.rate
