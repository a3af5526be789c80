import random
from pathlib import Path

import pytest

from stepaudio.train.domain import Domain, number, wording

CONFIG = Path(__file__).resolve().parents[2] / "configs/train/nano/domain.yaml"


@pytest.mark.parametrize(
    ("value", "english", "chinese"),
    [
        (0, "zero", "零"),
        (13, "thirteen", "十三"),
        (20, "twenty", "二十"),
        (42, "forty two", "四十二"),
        (100, "one hundred", "一百"),
    ],
)
def test_numbers_in_words(value, english, chinese):
    assert (number(value, "en"), number(value, "zh")) == (english, chinese)


def test_the_last_quarter_of_the_wordings_is_held_out():
    choices = [f"ask {i}" for i in range(8)]
    drawn = {split: {wording(random.Random(i), choices, split) for i in range(200)} for split in ("train", "test")}
    assert drawn["test"] == {"ask 6", "ask 7"}
    assert drawn["train"] == set(choices[:6])


def test_answers_hold_their_key_and_the_same_seed_gives_the_same_dialogues():
    domain = Domain.from_file(CONFIG)
    one, two = (random.Random(3), random.Random(3))
    drawn = [domain.draw(one, "train") for _ in range(300)]
    assert drawn == [domain.draw(two, "train") for _ in range(300)]
    for dialogue in drawn:
        assert dialogue.turns[-1].role == "assistant" and dialogue.question
        assert dialogue.key in dialogue.turns[-1].text, dialogue
    assert {dialogue.language for dialogue in drawn} == {"en", "zh"}
    calls = [turn.text for dialogue in drawn for turn in dialogue.turns if turn.call]
    assert calls and all('"arguments"' in call for call in calls)


def test_training_never_asks_what_the_test_asks():
    domain, rng = Domain.from_file(CONFIG), random.Random(0)
    for intent in ("unknown", "plus", "greeting", "weather"):
        train, test = (
            {domain.draw(rng, split, intent=intent).question for _ in range(1500)} for split in ("train", "test")
        )
        assert not train & test
        assert len(train) > 3
