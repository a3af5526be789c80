"""Speech in the named voices: understood as well as the teacher's, without runaways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepaudio.eval import judges
from stepaudio.eval.desk import Desk, both, seconds, sounds_at
from stepaudio.eval.rows import Row, figure, skipped
from stepaudio.eval.store import Take
from stepaudio.eval.work import Recoding
from stepaudio.train.synth import Line
from stepaudio.tts.speech import TTSRequest
from tokenizer.audio import Audio

VOICE = "rms"  # the teacher that pocketsphinx understands best
OWN_WER = 0.06
_SENTENCES, _FEW = 200, 40
_CUT = 0.5  # of the teacher's length: words must be missing


def outside_bound(teacher: float) -> float:
    """What pocketsphinx may get wrong in our speech."""
    return 1.3 * teacher + 0.03


def speech(desk: Desk) -> list[Row]:
    """Unseen sentences: pocketsphinx, our own recognition and DNSMOS, each on the teacher and on us."""
    texts = desk.exam.sentences(_SENTENCES, "en")
    ours = desk.speech([TTSRequest(text, VOICE, seed=i) for i, text in enumerate(texts)], "speech")
    teacher_voice = desk.exam.settings["named"][VOICE]
    rows = _faults(ours)
    if reason := judges.missing(teacher_voice):
        return [*rows, skipped("speech beside its teacher", reason)]
    teacher = desk.teacher([Line(text, teacher_voice) for text in texts])
    places = both(ours, teacher)
    said = [texts[i] for i in places]
    a, b = sounds_at(teacher, places), sounds_at(ours, places)
    ratios = np.array([x.seconds for x in b]) / np.array([x.seconds for x in a])
    rows += [
        figure("speech under half the teacher's length", np.mean(ratios < _CUT), len(places), at_most=0.0),
        figure("speech length / teacher", seconds(b) / seconds(a), len(places), least=round(float(ratios.min()), 3)),
        *_understood(desk, a, b, said),
        *_stages(desk, a, said, desk.exam.count(_FEW)),
    ]
    for name, language in (("slt", "en"), ("mei", "zh")):
        rows += _other_voice(desk, name, language)
    return rows


def _faults(takes: Sequence[Take | None]) -> list[Row]:
    """Loops and cuts that remain after all attempts, and how many sentences needed another attempt."""
    notes = [take.notes if take is not None else {"problems": ["empty"], "attempts": 0} for take in takes]
    kinds = {"with a sample loop": ("loop",), "cut": ("length", "short", "empty")}
    rows = []
    for name, bad in kinds.items():
        found = [any(kind in one["problems"] for kind in bad) for one in notes]
        rows.append(figure(f"speech {name}", np.mean(found), len(notes), at_most=0.0))
    again = [one["attempts"] > 1 for one in notes]
    return [*rows, figure("speech drawn more than once", np.mean(again), len(notes))]


def _understood(desk: Desk, teacher: list[Audio], ours: list[Audio], texts: list[str]) -> list[Row]:
    n = len(texts)
    rows = [
        figure("speech own ASR WER, teacher", desk.own(teacher, texts), n),
        figure("speech own ASR WER", desk.own(ours, texts), n, at_most=OWN_WER),
    ]
    if reason := judges.missing("pocketsphinx"):
        rows.append(skipped("speech pocketsphinx WER", reason))
    else:
        baseline = desk.outside(teacher, texts)
        rows.append(figure("speech pocketsphinx WER, teacher", baseline, n))
        value = desk.outside(ours, texts)
        rows.append(figure("speech pocketsphinx WER", value, n, at_most=outside_bound(baseline)))
    if reason := judges.missing("speechmos"):
        return [*rows, skipped("speech DNSMOS", reason)]
    for name, sounds in (("DNSMOS, teacher", teacher), ("DNSMOS", ours)):
        scores = desk.mos(sounds)
        rows.append(figure(f"speech {name}", scores["overall"], n, **scores))
    return rows


def _stages(desk: Desk, teacher: list[Audio], texts: list[str], count: int) -> list[Row]:
    """The same sentences from the teacher's own sound: through the vocoder alone, and through codes, flow, vocoder."""
    teacher, texts = teacher[:count], texts[:count]
    keys = [f"{VOICE} {text}" for text in texts]
    items = [Recoding(sound, VOICE) for sound in teacher]
    rows = []
    for name, takes in (
        ("teacher's mel, our vocoder", desk.vocoded(teacher, keys, "vocoder")),
        ("teacher's codes, our flow and vocoder", desk.recoded(items, keys, "codes to speech")),
    ):
        sounds = sounds_at(takes, range(len(texts)))
        rows.append(figure(f"speech own ASR WER: {name}", desk.own(sounds, texts), len(texts)))
        if not judges.missing("pocketsphinx"):
            rows.append(figure(f"speech pocketsphinx WER: {name}", desk.outside(sounds, texts), len(texts)))
    return rows


def _other_voice(desk: Desk, name: str, language: str) -> list[Row]:
    """Our own recognition of another named voice and of its teacher."""
    kind = {"en": "WER", "zh": "CER"}[language]
    teacher_voice = desk.exam.settings["named"][name]
    if reason := judges.missing(teacher_voice):
        return [skipped(f"speech {name} own ASR {kind}", reason)]
    texts = desk.exam.sentences(_FEW, language)
    teacher = desk.teacher([Line(text, teacher_voice) for text in texts])
    ours = desk.speech([TTSRequest(text, name, seed=i) for i, text in enumerate(texts)], f"speech {name}")
    places = both(ours, teacher)
    said = [texts[i] for i in places]
    return [
        figure(f"speech {name} own ASR {kind}, teacher", desk.own(sounds_at(teacher, places), said), len(said)),
        figure(f"speech {name} own ASR {kind}", desk.own(sounds_at(ours, places), said), len(said)),
    ]
