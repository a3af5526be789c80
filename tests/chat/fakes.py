"""Stand-ins for the models of a chat: a scripted language model, a tokenizer and a voice that remember."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np

from stepaudio.chat.engine import StepAudio
from stepaudio.lm.vocab import Vocab, read_model
from stepaudio.tts.speakers import SpeakerPrompt, Speakers
from stepaudio.tts.text import validate
from tests.lm.fake import FakeLM
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes

RATE = 22_050


@functools.cache
def read_vocab(golden):
    """The recorded pieces under the release's rules: `<s>` in front, no word mark behind special pieces."""
    return Vocab(read_model(golden / "prompts" / "tokenizer.model"))


class FakeTokenizer:
    """One group of codes per 0.12 s, the first code tells the length."""

    def __init__(self):
        self.heard = []

    def encode(self, clips, dither, seed):
        self.heard.append((list(clips), dither, seed))
        return [self._codes(int(clip.seconds / 0.12)) for clip in clips]

    @staticmethod
    def _codes(groups):
        return AudioCodes.merge([groups % 1024] * 2 * groups, [7] * 3 * groups)


class FakeTTS:
    """A tenth of a second of sound per character; remembers what it was told to say and to decode."""

    def __init__(self, wavs):
        self.speakers = Speakers([SpeakerPrompt("Ann", "你好", wavs / "clip0_22k.wav")])
        self.voices = SimpleNamespace(get=lambda path: f"voice of {path.name}")
        self.decoder = self
        self.said, self.decoded = [], []

    def synthesize(self, text, speaker, clone, *, seed, speed, volume, allow_any_tag):
        validate(text)
        self.said.append((text, speaker, seed))
        return SimpleNamespace(audio=tone(0.1 * len(text)), problems=[])

    def decode(self, codes, prompt, seed):
        self.decoded.append((codes, prompt, seed))
        return tone(codes.seconds)


def tone(seconds):
    return Audio(0.1 * np.ones(round(seconds * RATE), np.float32), RATE)


class Chat:
    """An engine over fakes. `answers`: what the model says in its rounds, in order, as strings with special pieces."""

    def __init__(self, golden, *answers, max_context=4096, **options):
        self.vocab = read_vocab(golden)
        scripts = iter([self.vocab.encode(answer, allow_special=True, bos=False, prefix=False) for answer in answers])
        self.lm = FakeLM(lambda prompt: next(scripts), max_context)
        self.tokenizer = FakeTokenizer()
        self.tts = FakeTTS(golden / "wavs")
        self.loaded = []
        self.engine = StepAudio(self._part("lm"), self.vocab, self._part("tokenizer"), self._part("tts"), **options)

    def _part(self, name):
        def load():
            self.loaded.append(name)
            return getattr(self, name)

        return load

    def prompt(self, call=-1):
        """What the model was asked, with its special pieces written out."""
        return self.vocab.decode(self.lm.calls[call][0], skip_special=False)
