"""Recognition, and what it loses when the sound goes through the codec first."""

from __future__ import annotations

from collections.abc import Sequence

from stepaudio.eval import judges
from stepaudio.eval.desk import Desk, both, sounds_at
from stepaudio.eval.rows import Row, figure, skipped
from stepaudio.eval.work import Recoding
from stepaudio.train.data import Source
from stepaudio.train.synth import Line
from tokenizer.audio import read_audio

AN4_WER = 0.07
DOMAIN = {"en": ("WER", 0.03), "zh": ("CER", 0.05)}
UNKNOWN_VOICE = 3.0  # times the bound of the known voices
CODEC_RISE = 0.06
_SENTENCES, _FEW = 300, 60
_NO_SPEECH = "give --speech, the folder of the recorded sets"


def asr(desk: Desk) -> list[Row]:
    """Error rates on held-out recordings and on held-out wordings, by voices of training and by one never heard."""
    return [*_recorded(desk), *(row for language in DOMAIN for row in _domain(desk, language))]


def _recorded(desk: Desk) -> list[Row]:
    if desk.exam.speech is None:
        return [skipped("asr an4 WER", _NO_SPEECH)]
    rows = []
    for name, clips in desk.exam.held_out_clips().items():
        sounds, texts = [read_audio(one.file) for one in clips], [one.text for one in clips]
        kind = "CER" if name.startswith("aishell") else "WER"
        bound = AN4_WER if name == "an4" else None
        rows.append(figure(f"asr {name} {kind}", desk.own(sounds, texts), len(clips), at_most=bound))
        if name == "an4" and not judges.missing("pocketsphinx"):
            rows.append(figure("asr an4 WER of pocketsphinx", desk.outside(sounds, texts), len(clips)))
    return rows


def _domain(desk: Desk, language: str) -> list[Row]:
    kind, bound = DOMAIN[language]
    settings = desk.exam.settings
    texts = desk.exam.sentences(_SENTENCES, language)
    rows = []
    for who, voices, limit in (
        ("known voices", settings["voices"][language], bound),
        ("unknown voice", [settings["held_out"][language]], UNKNOWN_VOICE * bound),
    ):
        name = f"asr domain {language} {who} {kind}"
        if reason := judges.missing(*voices):
            rows.append(skipped(name, reason))
            continue
        takes = desk.teacher([Line(text, voices[i % len(voices)]) for i, text in enumerate(texts)])
        places = both(takes)
        value = desk.own(sounds_at(takes, places), [texts[i] for i in places])
        rows.append(figure(name, value, len(places), at_most=limit, voices=voices))
    return rows


def codec(desk: Desk) -> list[Row]:
    """AN4 test through codes and back, with the clip itself as voice prompt as the round trip does, and with another
    clip of the speaker; the vocoder on the true mel says how much of it is the vocoder's.
    """
    if desk.exam.speech is None:
        return [skipped("codec an4 WER rise", _NO_SPEECH)]
    clips = desk.exam.held_out_clips()["an4"]
    sounds, texts = [read_audio(one.file) for one in clips], [one.text for one in clips]
    names = [one.id for one in clips]
    others = [f"{name} other" for name in names]
    itself = [Recoding(sound, sound) for sound in sounds]
    few = desk.exam.count(_FEW)
    other = [Recoding(sound, sounds[next_of_speaker(clips, i)]) for i, sound in enumerate(sounds[:few])]
    before = desk.own(sounds, texts)
    rows = [figure("codec an4 WER before", before, len(sounds))]
    for name, takes in (
        ("after", desk.recoded(itself, names, "codec")),
        (
            "after, another clip as prompt",
            desk.recoded(other, others[:few], "codec, other"),
        ),
        ("after the vocoder alone", desk.vocoded(sounds, names, "vocoder")),
    ):
        value = desk.own(sounds_at(takes, range(len(takes))), texts[: len(takes)])
        bound = before + CODEC_RISE if name == "after" else None
        rows.append(figure(f"codec an4 WER {name}", value, len(takes), at_most=bound))
    return rows


def next_of_speaker(clips: Sequence[Source], at: int) -> int:
    """Place of the speaker's next clip, in a circle."""
    places = [i for i, one in enumerate(clips) if one.speaker == clips[at].speaker]
    return places[(places.index(at) + 1) % len(places)]
