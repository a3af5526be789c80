"""The token ids a speech request is put to the language model with.

Pure: vocabulary, texts and codes in, ids out. Source: formats.md section 4.5.
The layout is the one the model was trained on and is not to be tidied (section 10, Q1 and Q2): every
role segment is encoded as a text of its own, so it starts with `<s>` where the tokenizer adds one, and
its role word carries the word mark; the spoken texts carry neither.
"""

from __future__ import annotations

from functools import lru_cache

import yaml

from stepaudio.lm.vocab import Vocab
from stepaudio.tts.style import HUMMING, RAP
from tokenizer.codes import AudioCodes
from tokenizer.files import config_file


def build_prompt(
    vocab: Vocab,
    text: str,
    prompt_text: str,
    prompt_codes: AudioCodes,
    *,
    speaker: str = "",
    music: str | None = None,
    allow_special: bool = False,
) -> list[int]:
    """Ids up to the point where the model goes on with audio ids.

    text           what to say, style tags in front
    prompt_text    what the voice says in its recording
    prompt_codes   the recording
    speaker        the name the model was trained with; empty for a cloned voice
    music          `RAP` or `哼唱`, None for speech
    allow_special  special pieces typed in the texts become their ids, as the release lets them
    """

    def spoken(words: str) -> list[int]:
        return vocab.encode("\n" + words, allow_special)[len(vocab.encode("\n")) :]

    bot, eot = [vocab.bot], [vocab.eot]
    human, assistant = vocab.encode("human\n"), vocab.encode("assistant\n")
    system = vocab.encode("system\n" + system_prompt(speaker, music), allow_special)
    return [
        *vocab.encode("", bos=True),
        *(bot + system + eot),
        *(bot + human + spoken(prompt_text) + eot),
        *(bot + assistant + prompt_codes.to_ids(vocab.audio_base) + eot),
        *(bot + human + spoken(text) + eot),
        *(bot + assistant),
    ]


def system_prompt(speaker: str = "", music: str | None = None) -> str:
    """The release's instruction for rap, humming, a trained speaker or a cloned voice (in this order)."""
    prompts = _prompts()
    if music:
        return prompts[{RAP: "rap", HUMMING: "vocal"}[music]]
    if speaker:
        return prompts["with_speaker"].replace("{}", speaker)
    return prompts["without_speaker"]


@lru_cache(maxsize=1)
def _prompts() -> dict[str, str]:
    """Texts of configs/system_prompts.yaml by name."""
    rows = yaml.safe_load(config_file("system_prompts.yaml").read_text(encoding="utf-8"))["prompts"]
    return {name: row["text"] for name, row in rows.items()}
