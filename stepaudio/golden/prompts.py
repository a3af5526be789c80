"""Replays `prompts`: token ids of speech prompts and the style tags of texts.

The release's own rules are replayed where this code departs from them on purpose: special pieces typed
in a text become ids, the word 哼唱 anywhere turns rap into humming (formats.md section 10, Q23), and the
tag is taken up to the last full-width bracket (Q22). Chat messages: `chat_prompts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stepaudio.golden.base import Row, exact, read_json
from stepaudio.lm.vocab import Vocab
from stepaudio.tts.prompt import build_prompt, system_prompt
from stepaudio.tts.style import HUMMING, RAP, parse, table
from tokenizer.codes import AudioCodes

_BRACKETS = re.compile(r"[（）()]")


def replay(root: Path) -> Iterator[Row]:
    """Ids of every recorded prompt, the system prompts, and the tag of every recorded text."""
    folder = root / "prompts"
    golden = read_json(folder / "golden.json")
    vocab = Vocab.from_file(folder / "tokenizer.model")
    codes = AudioCodes.from_ids(golden["prompt_code"], vocab.audio_base)
    yield _system_prompts(golden["system_prompts"])
    for case in golden["tokenize_cases"]:
        ids = build_prompt(
            vocab,
            case["text"],
            case["prompt_text"],
            codes,
            speaker=case["prompt_speaker"],
            music=release_music(case["text"], case["instruction"]),
            allow_special=True,
        )
        yield exact(f"prompts/{case['name']}", ids, case["ids"])
    yield from _tags(golden["detect_instruction_name"])


def release_music(text: str, instruction: str) -> str | None:
    """The music mode as the release chooses it from a text and its leading tag."""
    if instruction not in (RAP, HUMMING):
        return None
    return HUMMING if HUMMING in text else RAP


def _system_prompts(expected: dict[str, str]) -> Row:
    names = {
        "sys_prompt_for_rap": system_prompt(music=RAP),
        "sys_prompt_for_vocal": system_prompt(music=HUMMING),
        "sys_prompt_wo_spk": system_prompt(),
        "sys_prompt_with_spk": system_prompt("{}"),
    }
    return exact("prompts/system", [names.get(name) for name in expected], list(expected.values()))


def _tags(cases: list[list[str]]) -> Iterator[Row]:
    """Plain texts must agree, and so must music wherever the release finds it; the rest is ours on purpose."""
    plain = [(text, tag) for text, tag in cases if _is_plain(text, tag)]
    yield exact("prompts/tags", [_first_tag(text) for text, _ in plain], [tag for _, tag in plain])
    music = [(text, tag) for text, tag in cases if tag in (RAP, HUMMING)]
    note = f"{len(cases) - len(plain)} texts with other brackets are read by our rule"
    yield exact("prompts/music", [parse(text + ".").music for text, _ in music], [tag for _, tag in music], note=note)


def _is_plain(text: str, tag: str) -> bool:
    """One pair of brackets at most, and a canonical tag or none: where both rules must find the same."""
    known = tag == "" or tag in {row.name for row in table()}
    return known and len(_BRACKETS.findall(text)) <= 2 and text == text.lstrip()


def _first_tag(text: str) -> str:
    return next(iter(parse(text + ".", allow_any=True).tags), "")
