"""configs/prompts.yaml: every entry loads and says what it is."""

import re

import pytest

from stepaudio.chat.messages import ROLES, Message
from stepaudio.chat.prompts import prompt, prompts
from tokenizer.errors import RequestError


@pytest.mark.parametrize("name", list(prompts()))
def test_entries(name):
    entry = prompts()[name]
    assert entry.role in ROLES
    assert entry.language == ("zh" if re.search(r"[\u4e00-\u9fff]", entry.text) else "en")
    assert len(entry.gloss) > 20 and entry.text.strip() == entry.text
    assert tuple(re.findall(r"\{(\w+)\}", entry.text)) == entry.fields


def test_published_texts():
    assert prompt("asr") == Message.of("system", "请记录下你所听到的语音内容。")
    assert prompt("demo") == Message.of("system", "适配用户的语言，用简短口语化的文字回答")


def test_fields():
    assert prompt("translate", language="英文").text == "请仔细听这段语音，然后把它的内容翻译成英文，只给出译文。"
    with pytest.raises(RequestError, match="takes the fields language, found none"):
        prompt("translate")
    with pytest.raises(RequestError, match="found language"):
        prompt("asr", language="x")
    with pytest.raises(RequestError, match=r"unknown prompt 'sing'.*asr"):
        prompt("sing")
