"""Texts as phones, by espeak-ng: what the tokenizers learn to recognise.

A code is read without its neighbours, so its training target should be a sound and not a letter whose sound depends
on the word around it; for Mandarin a code cannot tell thousands of characters apart at all, but it can a few dozen
vowels with their tones.
"""

from __future__ import annotations

import re
import shutil
import subprocess

from tokenizer.errors import RequestError

VOICES = {"en": "en-us", "zh": "cmn-latn-pinyin"}  # the voice "cmn" of espeak-ng 1.51 spells pinyin out in English
_MARKS = re.compile(r"\([a-z-]+\)|[',%=|!-]+$|^[',%=|!]+|[|]")
_TONES = {"55": "1", "35": "2", "21": "3", "214": "3", "51": "4", "11": "5", "22": "5", "33": "5", "44": "5"}
_TONE = re.compile("|".join(sorted(_TONES, key=len, reverse=True)) + "$")


def available() -> bool:
    """Whether espeak-ng is on the PATH."""
    return shutil.which("espeak-ng") is not None


def phones(text: str, language: str) -> tuple[str, ...]:
    """The phones of a plain text; Mandarin vowels carry their tone. Raises RequestError if espeak-ng finds none."""
    call = ["espeak-ng", "-q", "-x", "--sep=_", "-v", VOICES[language], text]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode != 0:
        raise RequestError(f"espeak-ng found no phones for {text!r}: {done.stderr.strip()[:200]}")
    return parse(done.stdout)


def parse(spelled: str) -> tuple[str, ...]:
    """What `espeak-ng -x --sep=_` prints, without stress, pauses and marks of language; tones become 1 to 5."""
    found = [_MARKS.sub("", part) for part in re.split(r"[\s_]+", spelled)]
    return tuple(_TONE.sub(lambda tone: _TONES[tone[0]], part) for part in found if part.strip(":;'"))
