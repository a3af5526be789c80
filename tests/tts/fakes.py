"""Small stand-ins for the models: they obey the engine's contracts and are quick."""

from __future__ import annotations

import functools

import numpy as np
import torch

from cosyvoice.prompt import VoicePrompt
from stepaudio.lm.base import Completion, StopReason
from stepaudio.lm.vocab import Vocab
from stepaudio.tts.engine import StepAudioTTS
from stepaudio.tts.speakers import SpeakerPrompt, Speakers, VoiceStore
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes

RATE = 22_050
read_vocab = functools.cache(Vocab.from_file)


class FakeLM:
    """Answers with `groups` groups of codes drawn from each request's own seed; `spoil` may replace an answer."""

    def __init__(self, base, groups=25, max_context=8192, spoil=None):
        self.base, self.groups, self.max_context, self.spoil = base, groups, max_context, spoil
        self.batches = []

    def generate(self, prompts, params):
        self.batches.append([(list(prompt), wanted) for prompt, wanted in zip(prompts, params)])
        return [self._answer(wanted) for wanted in params]

    def _answer(self, params):
        rng = np.random.default_rng(params.seed)
        codes = AudioCodes.merge(rng.integers(0, 1024, 2 * self.groups), rng.integers(0, 4096, 3 * self.groups))
        spoiled = self.spoil(params.seed) if self.spoil else None
        return spoiled or Completion(tuple(codes.to_ids(self.base)), StopReason.STOP)


class FakeDecoder:
    """Sound as long as the codes, a tone whose level follows the seed."""

    sample_rate = RATE

    def __init__(self):
        self.decoded = []

    def decode(self, codes, prompt, seed):
        self.decoded += [(item, voice, one) for item, voice, one in zip(codes, prompt, seed)]
        return [Audio(self._tone(len(item) / 41.667, one), RATE) for item, one in zip(codes, seed)]

    @staticmethod
    def _tone(seconds, seed):
        level = 0.1 + (seed % 7) / 10
        return (level * np.sin(2 * np.pi * 200 * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def make_voice(audio):
    return VoicePrompt(AudioCodes([1, 2, 1030, 1031, 1032]), torch.zeros(4, 80), torch.full((192,), float(len(audio))))


def make_engine(golden, folder, lm=None, **options):
    """An engine over fakes with the golden text tokenizer and the voices Ann, AnnRAP."""
    vocab = read_vocab(golden / "prompts" / "tokenizer.model")
    wavs = golden / "wavs"
    speakers = Speakers(
        [
            SpeakerPrompt("Ann", "你好", wavs / "clip0_22k.wav"),
            SpeakerPrompt("AnnRAP", "（RAP）哟", wavs / "clip1_16k.wav"),
        ]
    )
    music = FakeDecoder()
    voices = VoiceStore(make_voice, "fake", folder)
    lm = lm or FakeLM(vocab.audio_base)
    return StepAudioTTS(lm, vocab, FakeDecoder(), lambda: music, voices, speakers, **options)
