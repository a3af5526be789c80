import pytest

from stepaudio.tts.style import parse, render_table, table
from tokenizer.errors import RequestError


@pytest.mark.parametrize(
    ("text", "tags", "prefix", "rest"),
    [
        ("（高兴1）你好", ("高兴1",), "（高兴1）", "你好"),
        ("(RAP)abc", ("RAP",), "(RAP)", "abc"),
        ("（RAP)混合", ("RAP",), "（RAP)", "混合"),
        ("（四川话）（快速1）两个", ("四川话", "快速1"), "（四川话）（快速1）", "两个"),
        ("(very happy) (Fast) hi", ("高兴2", "快速1"), "(高兴2) (快速1) ", "hi"),
        ("  （RAP）前面有空格", ("RAP",), "（RAP）", "前面有空格"),
        ("（ rap ）\n第二行", ("RAP",), "（RAP）\n", "第二行"),
        ("（RAP）你好（笑）", ("RAP",), "（RAP）", "你好（笑）"),  # Q22: the first group only
        ("(Humming (哼唱))la", ("哼唱",), "(哼唱)", "la"),
        ("（（RAP））双层", ("RAP",), "（RAP）", "双层"),
    ],
)
def test_leading_tags(text, tags, prefix, rest):
    styled = parse(text)
    assert (styled.tags, styled.prefix, styled.text) == (tags, prefix, rest)


@pytest.mark.parametrize(
    "text",
    [
        "没有",
        "中间（RAP）有",
        "（）空的",
        "（RAP",
        "RAP）",
        "（\n）行",
        "(a long remark in brackets) and then text",
        " x ",
    ],
)
def test_text_without_tags_is_untouched(text):
    assert parse(text) == parse(text, allow_any=True)
    assert (parse(text).tags, parse(text).text) == ((), text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("（高兴3）x", "高兴"), ("(happpy) x", "happy"), ("（RAPP）x", "RAP"), ("(qqq) x", "stepaudio tags")],
)
def test_unknown_tag_names_the_nearest(text, hint):
    with pytest.raises(RequestError, match=hint):
        parse(text)
    styled = parse(text, allow_any=True)
    assert styled.prefix.strip() + styled.text == text.replace(" ", "")


@pytest.mark.parametrize("text", ["（RAP）", "(happy)(fast) ", "（哼唱）\n"])
def test_only_tags_is_refused(text):
    with pytest.raises(RequestError, match="only style tags"):
        parse(text)


def test_music_is_any_of_the_tags():
    assert parse("（四川话）（RAP）x").music == "RAP"
    assert parse("（哼唱）x").music == "哼唱"
    assert parse("（RAP）我不会哼唱").music == "RAP"  # Q23
    assert parse("（高兴1）哼唱").music is None


def test_table_has_no_spelling_twice_and_renders_every_tag():
    spellings = [name.casefold() for tag in table() for name in {tag.name.casefold(), *tag.aliases}]
    assert len(spellings) == len(set(spellings))
    assert {tag.kind for tag in table()} == {"emotion", "language", "music", "speed"}
    lines = render_table().splitlines()
    assert len(lines) == len(table()) + 1
    assert all(tag.name in line and tag.gloss in line for tag, line in zip(table(), lines[1:]))
