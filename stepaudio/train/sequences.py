"""Training sequences for the Step-1 language model, in the very templates that inference uses.

Tasks: `asr` (speech to its text), `tts` (a voice prompt and a text to speech), `spoken` and `text`
(dialogues asked by voice or in writing, tool calls among them). A sequence is ids and a mask of the ids
that the model has to predict.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepaudio.chat.messages import AudioPart, CallPart, Message, TextPart
from stepaudio.chat.prompts import prompt
from stepaudio.chat.template import encode_messages
from stepaudio.chat.tools import Toolbox, ToolFormat
from stepaudio.lm.vocab import Vocab
from stepaudio.train.codes import Codes
from stepaudio.train.data import Clip
from stepaudio.train.domain import Dialogue, Domain
from stepaudio.train.nano_tools import nano_tools
from stepaudio.train.text import is_chinese, plain
from stepaudio.tts.prompt import build_prompt
from tokenizer.codes import LAYOUT, AudioCodes


@dataclass(frozen=True)
class Example:
    """ids [n] and, for each, whether it is to be predicted."""

    ids: np.ndarray
    wanted: np.ndarray


@dataclass(frozen=True)
class Voices:
    """How clips speak: the id a named voice is asked for by, and the style tag of each (rate, pitch)."""

    named: dict[str, str]  # synthesiser voice -> speaker id
    styles: dict[tuple[float, float], str]  # (rate, pitch) -> tag

    def describe(self, speaker: str) -> tuple[str, str]:
        """Speaker name of a clip -> (speaker id or "", style tag or "")."""
        voice, _, variant = speaker.split("/", 1)[-1].partition("@")
        if voice not in self.named:
            return "", ""
        rate, pitch = (float(value) for value in variant.split("x"))
        return self.named[voice], self.styles.get((rate, pitch), "")


class Sequences:
    """Draws examples of one corpus."""

    def __init__(
        self,
        vocab: Vocab,
        clips: Sequence[Clip],
        codes: Codes,
        dialogues: Sequence[Dialogue],
        voices: Voices,
        noise: dict[str, float],
        recorded_share: float = 0.0,
        domain: Domain | None = None,
    ) -> None:
        """`noise` is the share of codes replaced per task, `recorded_share` that of recordings among `asr` examples.

        With a `domain` the `text` dialogues are drawn anew each time, else they are the `dialogues` as well.
        """
        self.domain = domain
        self.vocab, self.clips, self.codes, self.voices = vocab, clips, codes, voices
        self.dialogues = list(dialogues)
        self.noise, self.recorded_share = noise, recorded_share
        self.spoken = [i for i, clip in enumerate(clips) if self._usable(clip, codes[i])]
        self.by_text: dict[str, list[int]] = {}
        self.by_speaker: dict[str, list[int]] = {}
        for i in self.spoken:
            self.by_text.setdefault(clips[i].text, []).append(i)
            if clips[i].split == "train":
                self.by_speaker.setdefault(self._prompt_speaker(i), []).append(i)
        self.recorded = [i for i in self.spoken if "@" not in clips[i].speaker]
        self.tts_clips = [i for i in self.spoken if clips[i].seconds <= 9 and clips[i].split == "train"]

    def draw(self, rng: np.random.Generator, task: str) -> Example:
        """One example of `asr`, `tts`, `spoken` or `text`."""
        if task == "asr":
            pool = self.recorded if self.recorded and rng.random() < self.recorded_share else self.spoken
            return self.asr(rng, pool[rng.integers(len(pool))])
        if task == "tts":
            return self.tts(rng, self.tts_clips[rng.integers(len(self.tts_clips))])
        if task == "text" and self.domain is not None:
            return self.dialogue(rng, self.domain.draw(random.Random(int(rng.integers(2**31))), "train"), spoken=False)
        return self.dialogue(rng, self.dialogues[rng.integers(len(self.dialogues))], spoken=task == "spoken")

    @staticmethod
    def _usable(clip: Clip, codes: AudioCodes) -> bool:
        """Whether a clip may be heard in training."""
        told = clip.text and clip.seconds <= 14 and len(codes) >= LAYOUT.group
        return bool(told) and clip.split in ("train", "noisy")

    def asr(self, rng: np.random.Generator, index: int) -> Example:
        """System prompt, speech, its text."""
        answer = Message("assistant", (TextPart(plain(self.clips[index].text)),))
        return self._chat([prompt("asr"), self._speech(rng, index), answer])

    def tts(self, rng: np.random.Generator, index: int) -> Example:
        """Another clip of the voice as prompt, the text with its style tag, the speech."""
        clip = self.clips[index]
        name, tag = self.voices.describe(clip.speaker)
        same = self.by_speaker[self._prompt_speaker(index)]
        for _ in range(8):
            other = same[rng.integers(len(same))]
            if other != index and 1.0 <= self.clips[other].seconds <= 8:
                break
        text = written(rng, clip.text)
        start = build_prompt(
            self.vocab,
            f"（{tag}）{text}" if tag else text,
            written(rng, self.clips[other].text),
            self._noisy(rng, self.codes[other], "tts"),
            speaker=name if rng.random() < 0.7 else "",
        )
        target = self.codes[index].to_ids(self.vocab.audio_base)
        ids = np.asarray([*start, *target, self.vocab.eot])
        return Example(ids, np.arange(len(ids)) >= len(start))

    def dialogue(self, rng: np.random.Generator, dialogue: Dialogue, spoken: bool) -> Example:
        """A dialogue of the domain; human turns by voice where there is a clip that says them."""
        messages: list[Message] = []
        last_human = max(i for i, turn in enumerate(dialogue.turns) if turn.role == "human")
        for i, turn in enumerate(dialogue.turns):
            by_voice = spoken and turn.role == "human" and (i == last_human or rng.random() < 0.5)
            clips = self.by_text.get(turn.text) if by_voice else None
            if clips:
                messages.append(self._speech(rng, clips[rng.integers(len(clips))]))
            else:
                text = written(rng, turn.text) if turn.role == "human" else turn.text
                messages.append(Message(turn.role, (CallPart(text) if turn.call else TextPart(text),)))
        if any(turn.call for turn in dialogue.turns) or rng.random() < 0.3:
            messages = Toolbox(nano_tools(), ToolFormat()).declare(messages)
        return self._chat(messages)

    def _chat(self, messages: Sequence[Message]) -> Example:
        """The chat template; what an assistant turn says, and its end, are predicted."""
        first = int(self.vocab.add_bos)
        ids, wanted = [self.vocab.bos][:first], [False][:first]
        for message in messages:
            turn = encode_messages(self.vocab, [message])[first:]
            head = len(encode_messages(self.vocab, [Message(message.role, open=True)])) - first
            ids += turn
            wanted += [message.role == "assistant" and place >= head for place in range(len(turn))]
        return Example(np.asarray(ids), np.asarray(wanted))

    def _speech(self, rng: np.random.Generator, index: int) -> Message:
        return Message("human", (AudioPart(self._noisy(rng, self.codes[index], "asr")),))

    def _noisy(self, rng: np.random.Generator, codes: AudioCodes, task: str) -> AudioCodes:
        """Some codes replaced by random ones that the corpus uses, each within its own codebook."""
        values = codes.interleaved.copy()
        hit = rng.random(len(values)) < self.noise.get(task, 0.0)
        pool = self.codes.flat
        drawn = pool[rng.integers(len(pool), size=len(values))].astype(np.int64)
        same_book = (drawn < LAYOUT.linguistic_size) == (values < LAYOUT.linguistic_size)
        return AudioCodes(np.where(hit & same_book, drawn, values))

    def _prompt_speaker(self, index: int) -> str:
        """Clips that may prompt each other: a styled clip of a named voice is prompted by its neutral ones."""
        speaker = self.clips[index].speaker
        name, tag = self.voices.describe(speaker)
        return f"{speaker.split('@')[0]}@1x1" if name and tag else speaker


def written(rng: np.random.Generator, text: str) -> str:
    """A text as people write it: at times with a capital and a full stop or question mark, else plain."""
    text = plain(text)
    if rng.random() < 0.5:
        return text
    mark = str(rng.choice(list("。？" if is_chinese(text) else ".?")))
    return text[:1].upper() + text[1:] + mark
