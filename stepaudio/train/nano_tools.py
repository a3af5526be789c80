"""The three tools of nano's world: weather, timer, calculator. Answers come from tables, not from the network."""

from __future__ import annotations

from stepaudio.chat.tools import Tool

_WEATHER = {
    "en": ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy"),
    "zh": ("晴天", "下雨", "多云", "刮风", "下雪"),
}


def weather(place: str) -> str:
    """The weather of a place, always the same for one place."""
    words = _WEATHER["zh" if any("\u4e00" <= c <= "\u9fff" for c in place) else "en"]
    return words[sum(map(ord, place)) % len(words)]


def timer(minutes: int) -> str:
    """Pretends to set a timer."""
    return "ok"


def calculator(expression: str) -> str:
    """A product of two whole numbers, such as 6*7."""
    a, b = (int(part) for part in expression.split("*"))
    return str(a * b)


def nano_tools() -> list[Tool]:
    """The tools as nano was trained with them; the texts belong to its prompt and must not change."""

    def schema(name: str, kind: str) -> dict[str, object]:
        return {"type": "object", "properties": {name: {"type": kind}}, "required": [name]}

    return [
        Tool("weather", "weather of a place", schema("place", "string"), weather),
        Tool("timer", "set a timer", schema("minutes", "integer"), timer),
        Tool("calculator", "multiply", schema("expression", "string"), calculator),
    ]
