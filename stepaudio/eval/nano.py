"""Figures of the nano checkpoint: recognition, speech, codec, tags and chat, through the public engines alone.

Questions and sentences are held-out wordings of the domain, spoken on the spot by the synthesisers; recordings
are a folder with a transcripts.tsv. Every figure is a row with `n`, how many items it rests on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stepaudio.bench.report import Row
from stepaudio.chat.engine import StepAudio
from stepaudio.train.data import recorded
from stepaudio.train.domain import Dialogue, Domain
from stepaudio.train.nano_tools import nano_tools
from stepaudio.train.synth import Line, speak
from stepaudio.train.text import error_rate, plain
from stepaudio.tts.speech import Speech, TTSRequest
from tokenizer.audio import TOKENIZER_RATE, Audio, read_audio, resample


@dataclass(frozen=True)
class Exam:
    """What is judged, and with how many items a figure."""

    engine: StepAudio
    configs: Path
    speech: Path | None
    count: int
    seed: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        return yaml.safe_load((self.configs / "data.yaml").read_text(encoding="utf-8"))

    def dialogues(self, keep: Callable[[Dialogue], bool] = lambda one: True) -> list[Dialogue]:
        """Held-out wordings, all different."""
        domain, rng = Domain.from_file(self.configs / "domain.yaml"), random.Random(self.seed)
        found: dict[tuple[str, ...], Dialogue] = {}
        for _ in range(100 * self.count):
            one = domain.draw(rng, "test")
            if keep(one) and len(found) < self.count:
                found.setdefault(tuple(turn.text for turn in one.turns), one)
        return list(found.values())

    def recordings(self) -> list[tuple[Audio, str]]:
        """Official AN4 test clips with their texts."""
        assert self.speech is not None
        clips = [one for one in recorded(self.speech / "an4", "an4") if one.split == "test"]
        return [(read_audio(one.file), one.text) for one in clips]


def said(text: str, voice: str) -> Audio:
    """A text in a synthesiser's voice."""
    return Audio(speak(Line(text, voice)), TOKENIZER_RATE)


def figure(name: str, value: float, n: int, **more: Any) -> Row:
    """A row of one number that rests on `n` items."""
    return {"name": name, "value": round(value, 4), "n": n, **more}


def asr(exam: Exam) -> list[Row]:
    """Error rates on AN4 and on held-out wordings by a training voice and by a voice never heard."""
    rows = []
    if exam.speech is not None:
        sounds, texts = zip(*exam.recordings())
        rows.append(
            figure("asr an4 test WER", error_rate(zip(exam.engine.transcribe(list(sounds)), texts)), len(texts))
        )
    settings = exam.settings
    for language, name in (("en", "WER"), ("zh", "CER")):
        texts = [one.question for one in exam.dialogues(lambda one, language=language: one.language == language)]
        for kind, voice in (("known", settings["voices"][language][0]), ("held-out", settings["held_out"][language])):
            heard = exam.engine.transcribe([said(text, voice) for text in texts])
            rows.append(
                figure(f"asr domain {kind} voice {name}", error_rate(zip(heard, texts)), len(texts), voice=voice)
            )
    return rows


def codec(exam: Exam) -> list[Row]:
    """AN4 test through codes and back: error rate of our own recognition before and after."""
    chosen = exam.recordings()[: exam.count]
    texts = [text for _, text in chosen]
    tokenizer, decoder = exam.engine.tokenizer, exam.engine.tts.decoder
    again = [
        decoder.decode(codes, decoder.voice_prompt(sound, tokenizer))
        for (sound, _), codes in zip(chosen, tokenizer.encode([sound for sound, _ in chosen]))
    ]
    before, after = (exam.engine.transcribe(sounds) for sounds in ([sound for sound, _ in chosen], again))
    return [
        figure("codec an4 WER before", error_rate(zip(before, texts)), len(texts)),
        figure("codec an4 WER after", error_rate(zip(after, texts)), len(texts)),
    ]


def tts(exam: Exam) -> list[Row]:
    """Unseen domain sentences in the teacher's voice: pocketsphinx on teacher and ours, and our own recognition."""
    texts = [one.question for one in exam.dialogues(lambda one: one.language == "en")]
    voice = exam.settings["named"]["rms"]
    teacher, ours = [said(text, voice) for text in texts], spoken(exam, [TTSRequest(text, "rms") for text in texts])
    sounds = [speech.audio for speech in ours]
    problems = sum(bool(piece.problems) for speech in ours for piece in speech.pieces)
    judge = "pocketsphinx"
    return [
        figure("tts teacher WER", error_rate(zip(map(outside, teacher), texts)), len(texts), judge=judge, voice=voice),
        figure("tts ours WER", error_rate(zip(map(outside, sounds), texts)), len(texts), judge=judge),
        figure("tts ours WER, own ASR", error_rate(zip(exam.engine.transcribe(sounds), texts)), len(texts)),
        figure("tts pieces with problems", problems / len(texts), len(texts)),
        figure("tts length / teacher", _seconds(sounds) / _seconds(teacher), len(texts)),
    ]


def tags(exam: Exam) -> list[Row]:
    """Duration of fast and slow speech over that of plain speech."""
    texts = [one.question for one in exam.dialogues(lambda one: one.language == "en")]
    lengths = {
        tag: _seconds([one.audio for one in spoken(exam, [TTSRequest(f"{tag}{text}", "rms") for text in texts])])
        for tag in ("", "（快速1）", "（慢速1）")
    }
    return [
        figure(f"tag {tag} duration ratio", seconds / lengths[""], len(texts))
        for tag, seconds in lengths.items()
        if tag
    ]


def chat(exam: Exam) -> list[Row]:
    """Right answers (the key occurs in it) to held-out questions, written and spoken, by kind of question."""
    rows = []
    kinds: dict[str, Callable[[Dialogue], bool]] = {
        "domain": lambda one: one.intent not in ("memory", "unknown", *_tools()),
        "tools": lambda one: one.intent in _tools(),
        "memory": lambda one: one.intent == "memory",
        "unknown": lambda one: one.intent == "unknown",
    }
    for name, keep in kinds.items():
        dialogues = exam.dialogues(keep)
        for asked in ("text", "voice"):
            right = [answered(exam, one, asked == "voice") for one in dialogues]
            rows.append(figure(f"chat {name} {asked} right", float(np.mean(right)), len(right)))
    return rows


def answered(exam: Exam, dialogue: Dialogue, by_voice: bool) -> bool:
    """Whether the key is in the last answer; for tools, whether the right one was called."""
    turns = [turn for turn in dialogue.turns if turn.role == "human"]
    voice = exam.settings["voices"][dialogue.language][0]
    messages: list[Any] = []
    for turn in turns:
        content: Any = {"type": "audio", "audio": said(turn.text, voice)} if by_voice else turn.text
        messages.append({"role": "human", "content": content})
        reply = exam.engine.reply(messages, text_only=True, tools=nano_tools() if dialogue.intent in _tools() else ())
        messages = list(reply.messages)
    if dialogue.intent in _tools():
        return any(call.name == dialogue.intent for call in reply.calls)
    return plain(dialogue.key) in plain(reply.text)


def _tools() -> list[str]:
    return [tool.name for tool in nano_tools()]


def spoken(exam: Exam, requests: Sequence[TTSRequest]) -> list[Speech]:
    """The speeches; an error of one is raised."""
    speeches = exam.engine.tts.synthesize_batch(requests)
    for speech in speeches:
        if not isinstance(speech, Speech):
            raise speech
    return speeches


def outside(sound: Audio) -> str:
    """What pocketsphinx, which never saw these models, hears."""
    import pocketsphinx

    decoder = pocketsphinx.Decoder(samprate=TOKENIZER_RATE, loglevel="FATAL")
    samples = np.clip(resample(sound, TOKENIZER_RATE).samples, -1, 1) * 32767
    decoder.start_utt()
    decoder.process_raw(samples.astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


def _seconds(sounds: Iterable[Audio]) -> float:
    return sum(sound.seconds for sound in sounds)


TASKS: dict[str, Callable[[Exam], list[Row]]] = {"asr": asr, "codec": codec, "tts": tts, "tags": tags, "chat": chat}
