"""Style tags: faster, slower, happy and sad speech beside plain speech of the same sentences, and the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepaudio.eval import judges
from stepaudio.eval.desk import Desk, both, seconds, sounds_at
from stepaudio.eval.rows import Row, figure, skipped
from stepaudio.eval.speech import OWN_WER, VOICE, outside_bound
from stepaudio.train.synth import Line
from stepaudio.tts.speech import TTSRequest
from tokenizer.audio import Audio

PLAIN, FAST, SLOW, HAPPY, SAD = "", "快速1", "慢速1", "高兴1", "悲伤1"
PACE = 0.2  # fast and slow change the duration by so much at least
LOSS = 1.5  # times the error rate that plain speech may have
_SENTENCES, _FEW = 40, 20

Tagged = dict[str, list[Audio]]  # tag -> sounds, of the same sentences in the same order


def tags(desk: Desk) -> list[Row]:
    """Pace by the voice that pocketsphinx understands, feelings by every English voice."""
    rows = _pace(desk, desk.exam.sentences(_SENTENCES, "en"))
    named = desk.exam.settings["named"]
    for voice in named:
        if named[voice] in desk.exam.settings["voices"]["en"]:
            rows += _feelings(desk, voice, desk.exam.sentences(_FEW, "en"))
    return rows


def _pace(desk: Desk, texts: Sequence[str]) -> list[Row]:
    """Duration over that of plain speech, and whether the words are still understood."""
    said, ours, teacher = spoken(desk, VOICE, texts, (PLAIN, FAST, SLOW))
    rows = []
    for tag, bounds in ((FAST, {"at_most": 1 - PACE}), (SLOW, {"at_least": 1 + PACE})):
        more = {"teacher": round(_duration(teacher, tag), 3)} if teacher else {}
        rows.append(figure(f"tag {tag} duration", _duration(ours, tag), len(said), **bounds, **more))
        rows.append(figure(f"tag {tag} own ASR WER", desk.own(ours[tag], said), len(said), at_most=LOSS * OWN_WER))
    if reason := judges.missing("pocketsphinx", desk.exam.settings["named"][VOICE]):
        return [*rows, skipped("tags pocketsphinx WER", reason)]
    bound = LOSS * outside_bound(desk.outside(teacher[PLAIN], said))
    for tag in (FAST, SLOW):
        baseline = desk.outside(teacher[tag], said)
        rows.append(figure(f"tag {tag} pocketsphinx WER, teacher", baseline, len(said)))
        rows.append(figure(f"tag {tag} pocketsphinx WER", desk.outside(ours[tag], said), len(said), at_most=bound))
    return rows


def _feelings(desk: Desk, voice: str, texts: Sequence[str]) -> list[Row]:
    """Medians over the sentences: F0 ratio and change of level to plain speech."""
    said, ours, teacher = spoken(desk, voice, texts, (PLAIN, HAPPY, SAD))
    rows = []
    for tag in (HAPPY, SAD):
        f0, level = _change(desk, ours, tag)
        more = {"level_db": round(level, 2), "duration": round(_duration(ours, tag), 3)}
        if teacher:
            f0_teacher, level_teacher = _change(desk, teacher, tag)
            more |= {"teacher": round(f0_teacher, 3), "teacher_level_db": round(level_teacher, 2)}
            more |= {"teacher_duration": round(_duration(teacher, tag), 3)}
        rows.append(figure(f"tag {tag} F0, {voice}", f0, len(said), **more))
    return rows


def spoken(desk: Desk, voice: str, texts: Sequence[str], kinds: Sequence[str]) -> tuple[list[str], Tagged, Tagged]:
    """Sentences that came out under every tag, our speech of them, and the teacher's: empty without its program."""
    ours = {tag: desk.speech(_requests(voice, tag, texts), f"speech {voice} {tag}") for tag in kinds}
    columns = list(ours.values())
    teachers = {}
    source = desk.exam.settings["named"][voice]
    if not judges.missing(source):
        styles = {PLAIN: {}, **desk.exam.settings["styles"]}
        teachers = {tag: desk.teacher([Line(text, source, **styles[tag]) for text in texts]) for tag in kinds}
    places = both(*columns, *teachers.values())
    said = [texts[i] for i in places]
    pick = [{tag: sounds_at(takes, places) for tag, takes in group.items()} for group in (ours, teachers)]
    return said, pick[0], pick[1]


def _requests(voice: str, tag: str, texts: Sequence[str]) -> list[TTSRequest]:
    front = f"（{tag}）" if tag else ""
    return [TTSRequest(front + text, voice, seed=i) for i, text in enumerate(texts)]


def _duration(sounds: Tagged, tag: str) -> float:
    return seconds(sounds[tag]) / seconds(sounds[PLAIN])


def _change(desk: Desk, sounds: Tagged, tag: str) -> tuple[float, float]:
    """F0 ratio and level in dB against plain speech; (0, 0) where nothing is voiced."""
    pairs = [(a, b) for a, b in zip(desk.manners(sounds[PLAIN]), desk.manners(sounds[tag])) if a.f0 and b.f0]
    if not pairs:
        return 0.0, 0.0
    return float(np.median([b.f0 / a.f0 for a, b in pairs])), float(np.median([b.level - a.level for a, b in pairs]))
