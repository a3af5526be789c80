"""Voices cloned from a clip of somebody that training never heard."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepaudio.eval import judges, work
from stepaudio.eval.desk import Desk, both, sounds_at
from stepaudio.eval.exam import Stranger
from stepaudio.eval.rows import Row, figure, skipped
from stepaudio.eval.speech import VOICE
from stepaudio.train.synth import Line
from stepaudio.train.text import error_rate
from stepaudio.tts.speakers import SpeakerPrompt
from stepaudio.tts.speech import TTSRequest
from tokenizer.audio import Audio, write_audio

NEARER, OTHERS = 0.9, 9
F0_WITHIN = 0.15
_PROMPTS = 50


def clone(desk: Desk) -> list[Row]:
    """Whether a clone is nearer to its prompt than to nine prompts of others, and how near its pitch is.

    The others are of the same recorded set where it has enough speakers, so that the microphone says nothing. The
    baselines are another recording of the same person in the clone's place, and a teacher's codes in the voice of
    the prompt, which needs the flow alone.
    """
    if desk.exam.speech is None:
        return [skipped("clone nearer to its prompt", "give --speech, the folder of the recorded sets")]
    people = desk.exam.strangers(_PROMPTS)
    speakers = {one.speaker for one in people}
    if len(speakers) <= OTHERS:
        return [skipped("clone nearer to its prompt", f"only {len(speakers)} speakers are unseen, {OTHERS + 1} needed")]
    people = _written_down(desk, people)
    texts = desk.exam.sentences(len(people), "en")
    texts = [texts[i % len(texts)] for i in range(len(people))]
    takes = desk.speech(_requests(desk, people, texts), "clones")
    made = [i for i, take in enumerate(takes) if take is not None]
    clones = [takes[i].audio for i in made]  # type: ignore[union-attr]
    others = choose_others(people, desk.exam.seed)
    rows = [figure("clone refused or empty", 1 - len(made) / len(people), len(people), at_most=0.0)]
    rows += _likeness(desk, people, made, clones, _from_codes(desk, people, texts), others)
    rows += _pitch(desk, [people[i] for i in made], clones)
    heard = desk.crew.map(work.hear, clones, "own recognition", 16)
    rows.append(figure("clone own ASR WER", error_rate(zip(heard, [texts[i] for i in made])), len(made)))
    return rows


def _from_codes(desk: Desk, people: Sequence[Stranger], texts: Sequence[str]) -> list[Audio]:
    """The sentences from a teacher's codes in the voices of the prompts: the clone without the language model."""
    voice = desk.exam.settings["named"][VOICE]
    if judges.missing(voice):
        return []
    takes = desk.teacher([Line(text, voice) for text in texts])
    if len(both(takes)) < len(texts):
        return []
    items = [work.Recoding(sound, one.audio) for sound, one in zip(sounds_at(takes, range(len(texts))), people)]
    keys = [f"{text} as {one.speaker} {len(one.audio)}" for text, one in zip(texts, people)]
    return sounds_at(desk.recoded(items, keys, "clones of codes"), range(len(texts)))


def _written_down(desk: Desk, people: Sequence[Stranger]) -> list[Stranger]:
    """Prompts without a text get what our own recognition hears."""
    silent = [one for one in people if one.text is None]
    heard = iter(desk.crew.map(work.hear, [one.audio for one in silent], "texts of prompts", 8))
    return [one if one.text else Stranger(one.speaker, one.audio, next(heard) or "hello", one.again) for one in people]


def _requests(desk: Desk, people: Sequence[Stranger], texts: Sequence[str]) -> list[TTSRequest]:
    requests = []
    for i, (one, text) in enumerate(zip(people, texts)):
        name = Path(f"prompt-{desk.exam.seed}-{i:02}-{one.speaker.replace('/', '-')}-{len(one.audio)}.flac")
        path = desk.store.folder / name
        if not path.exists():
            write_audio(path, one.audio)
        requests.append(TTSRequest(text, clone=SpeakerPrompt("", str(one.text), path), seed=i))
    return requests


def choose_others(people: Sequence[Stranger], seed: int) -> list[list[int]]:
    """For each person nine prompts of nine other speakers, of the same set where that has enough."""
    rng = random.Random(seed)
    chosen = []
    for one in people:
        first: dict[str, int] = {}
        for i in rng.sample(range(len(people)), len(people)):
            if people[i].speaker != one.speaker:
                first.setdefault(people[i].speaker, i)
        near = [i for i in first.values() if people[i].part == one.part]
        far = [i for i in first.values() if people[i].part != one.part]
        chosen.append((near + far)[:OTHERS])
    return chosen


def _likeness(
    desk: Desk,
    people: Sequence[Stranger],
    made: list[int],
    clones: list[Audio],
    from_codes: list[Audio],
    others: list[list[int]],
) -> list[Row]:
    prompts = [one.audio for one in people]
    with_more = [i for i, one in enumerate(people) if one.again is not None]
    again = [people[i].again for i in with_more]
    speakers = len({one.speaker for one in people})
    rows = []

    def embeddings(sounds: list[Audio]) -> list[np.ndarray]:
        return desk.crew.map(work.embed, sounds, "voices", 4)

    def cepstra(sounds: list[Audio]) -> list[np.ndarray]:
        return [one.cepstrum for one in desk.manners(sounds)]

    for judge, measure, likeness, bound in (
        ("the checkpoint's speaker encoder", embeddings, judges.cosine, NEARER),
        ("mean cepstrum", cepstra, judges.closeness, None),
    ):
        there, ours, coded, same = measure(prompts), measure(clones), measure(from_codes), measure(again)
        if likeness is judges.closeness:
            there, ours, coded, same = _standard(there, ours, coded, same)
        for name, rows_of, measured, limit in (
            ("clone nearer to its prompt", made, ours, bound),
            ("clone of a teacher's codes nearer to its prompt", list(range(len(coded))), coded, None),
            ("same person nearer to the prompt", with_more, same, None),
        ):
            if not rows_of:
                continue
            share, own, rest = judges.nearest_share(
                measured, [there[i] for i in rows_of], [[there[j] for j in others[i]] for i in rows_of], likeness
            )
            label = f"{name}, by {judge}"
            more = {"to_own": round(own, 3), "to_others": round(rest, 3), "speakers": speakers}
            rows.append(figure(label, share, len(rows_of), at_least=limit, **more))
    return rows


def _standard(there: list[np.ndarray], *groups: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Every coefficient in units of its spread over the prompts."""
    mean, spread = np.mean(there, axis=0), np.std(there, axis=0) + 1e-9
    return [[(one - mean) / spread for one in group] for group in (there, *groups)]


def _pitch(desk: Desk, people: Sequence[Stranger], clones: list[Audio]) -> list[Row]:
    wanted = [one.f0 for one in desk.manners([one.audio for one in people])]
    found = [one.f0 for one in desk.manners(clones)]
    ratios = np.array([b / a for a, b in zip(wanted, found) if a and b])
    if not len(ratios):
        return [skipped("clone F0 within 15 %", "no voiced frames were found")]
    spread = {f"p{share}": round(float(np.percentile(ratios, share)), 3) for share in (10, 25, 50, 75, 90)}
    near = float((np.abs(ratios - 1) <= F0_WITHIN).sum() / len(people))
    off = float(np.median(np.abs(ratios - 1)))
    return [
        figure("clone F0 within 15 %", near, len(people), at_least=NEARER, ratio=spread),
        figure("clone F0, median deviation", off, len(ratios), at_most=F0_WITHIN),
    ]
