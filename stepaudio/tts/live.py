"""Speed and volume for speech that still comes: what `effects` does to a whole one, a stretch at a time.

`push(samples)` gives what is final, `close()` the rest; joined they are what `change_speed` and `change_volume`
make of the whole, however it is cut. Legend: float32 samples [n].
"""

from __future__ import annotations

import numpy as np

from stepaudio.tts.effects import FRAME_SECONDS, LIMITER_SECONDS, SEARCH_SECONDS, best_lag, check_effects, limit

_NOTHING = np.zeros(0, np.float32)


class LiveEffects:
    """Speed, then volume."""

    def __init__(self, speed: float, volume: float, sample_rate: int) -> None:
        """Raises RequestError for a ratio outside 0.5 to 2 (speed) or 0.1 to 10 (volume)."""
        check_effects(speed, volume)
        self._speed = LiveSpeed(speed, sample_rate) if speed != 1 else None
        self._volume = LiveVolume(volume, sample_rate) if volume != 1 else None

    def push(self, samples: np.ndarray) -> np.ndarray:
        """More sound; returns what is final of it."""
        if self._speed:
            samples = self._speed.push(samples)
        return self._volume.push(samples) if self._volume else samples

    def close(self) -> np.ndarray:
        """What was held back."""
        samples = self._speed.close() if self._speed else _NOTHING
        if self._volume is None:
            return samples
        return np.concatenate([self._volume.push(samples), self._volume.close()])


class LiveSpeed:
    """`change_speed` of a stream: a frame is laid down as soon as all it may be taken from is there."""

    def __init__(self, ratio: float, sample_rate: int) -> None:
        self.ratio = ratio
        self.hop = int(FRAME_SECONDS * sample_rate) // 2
        self.search = int(SEARCH_SECONDS * sample_rate)
        self._window = np.hanning(2 * self.hop + 1)[:-1].astype(np.float32)
        self._sound = np.zeros(self.search + self.hop, np.float32)  # silence, then what came; old samples are dropped
        self._dropped = self._came = 0
        self._frame = 0  # frames laid down
        self._position = 0  # where the last of them was taken from
        self._half = np.zeros(self.hop, np.float32)  # the second half of it, to which the next frame is added

    def push(self, samples: np.ndarray) -> np.ndarray:
        """More sound; returns what is final."""
        self._sound = np.concatenate([self._sound, samples])
        self._came += len(samples)
        return self._lay_down(None)

    def close(self) -> np.ndarray:
        """The rest; all that was returned is round(n / ratio) samples."""
        length = round(self._came / self.ratio)
        given = max(0, self._frame - 1) * self.hop
        silence = np.zeros(self.search + 4 * self.hop + int(self.hop * self.ratio), np.float32)
        self._sound = np.concatenate([self._sound, silence])
        rest = self._lay_down(length // self.hop + 1)
        return np.concatenate([rest, self._half])[: length - given]

    def _lay_down(self, last: int | None) -> np.ndarray:
        """Frames up to `last`, or all that are ready; returns the samples that became final."""
        done, end = [], self._dropped + len(self._sound)
        while last is None or self._frame <= last:
            nominal = self.search + int(self._frame * self.hop * self.ratio)
            if last is not None:
                nominal = min(nominal, end - 2 * self.hop - self.search)
            elif max(nominal + self.search + 2 * self.hop, self._position + 3 * self.hop) > end:
                break
            frame = self._taken(nominal)
            if self._frame:  # frame 0 begins a hop before the sound: its first half is not heard
                done.append(self._half + frame[: self.hop])
            self._half, self._frame = frame[self.hop :], self._frame + 1
        keep = max(0, self._position - self._dropped)  # no later frame begins before this one, less the search
        keep = max(0, keep - 2 * self.search)
        self._sound, self._dropped = self._sound[keep:], self._dropped + keep
        return np.concatenate([_NOTHING, *done])

    def _taken(self, nominal: int) -> np.ndarray:
        """The frame near `nominal` that goes on most like the one before it, windowed."""
        if self._frame == 0:
            self._position = self.search
        else:
            begin = nominal - self.search
            natural = self._part(self._position + self.hop, 2 * self.hop)
            self._position = begin + best_lag(self._part(begin, 2 * (self.search + self.hop)), natural)
        return self._part(self._position, 2 * self.hop) * self._window

    def _part(self, begin: int, size: int) -> np.ndarray:
        begin -= self._dropped
        return self._sound[begin : begin + size]


class LiveVolume:
    """`change_volume` of a stream: the limiter sees as far to either side as it can reach."""

    def __init__(self, ratio: float, sample_rate: int) -> None:
        self.ratio = np.float32(ratio)
        self._width = int(LIMITER_SECONDS * sample_rate) | 1
        self._sound = _NOTHING  # scaled: some samples that were returned, then those that wait
        self._past = 0  # how many of them were returned

    def push(self, samples: np.ndarray) -> np.ndarray:
        """More sound; returns what is final."""
        self._sound = np.concatenate([self._sound, samples * self.ratio])
        return self._advance(max(self._past, len(self._sound) - self._width))

    def close(self) -> np.ndarray:
        """The rest."""
        return self._advance(len(self._sound))

    def _advance(self, until: int) -> np.ndarray:
        ready = limit(self._sound, self._width)[self._past : until] if until > self._past else _NOTHING
        drop = max(0, until - self._width)
        self._sound, self._past = self._sound[drop:], until - drop
        return ready
