"""Tools: declaration, parsing, the schema, running."""

import json
import threading
import time

import pytest

from stepaudio.chat.messages import CallPart, Message
from stepaudio.chat.schema import check_schema, find_fault
from stepaudio.chat.tools import CallError, Tool, Toolbox, ToolCall, ToolFormat, run_tool
from tests.chat.fakes import read_vocab
from tokenizer.errors import RequestError

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}


def weather(place):
    return {"place": place, "sky": "晴"}


WEATHER = Tool("weather", "The weather at a place", PLACE, weather)


def box(*tools):
    return Toolbox(tools or (WEATHER,), ToolFormat())


def test_declared_in_the_system_turn():
    [system, human] = box().declare([Message.of("user", "hi")])
    assert system.role == "system" and human.text == "hi"
    assert json.dumps({"name": "weather", "description": "The weather at a place", "parameters": PLACE}) in system.text
    assert [part for part in system.parts if isinstance(part, CallPart)] == [
        CallPart('{"name": "...", "arguments": {...}}')
    ]
    [appended] = box().declare([Message.of("system", "Be kind.")])
    assert appended.text.startswith("Be kind.\n\nYou can use these tools:\n{")
    messages = [Message.of("user", "hi")]
    assert Toolbox((), ToolFormat()).declare(messages) == messages


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[" * 5000, "JSON"),
        ("[]", '"name"'),
        ('{"name": 5}', '"name"'),
        ('{"name": "time"}', "no tool 'time', only weather"),
        ('{"name": "weather"}', "lack 'place'"),
        ('{"name": "weather", "arguments": "Paris"}', "must be object"),
        ('{"name": "weather", "arguments": {"place": 5}}', "arguments.place must be string, not 5"),
        ('{"name": "weather", "arguments": {"place": "x", "day": 1}}', "no 'day', only 'place'"),
    ],
)
def test_malformed_calls(body, words):
    with pytest.raises(CallError) as caught:
        box().parse(body)
    assert words in str(caught.value)


def test_a_good_call():
    tool, arguments = box().parse('{"name": "weather", "arguments": {"place": "Paris"}}')
    done = run_tool(tool, arguments)
    assert (done.name, done.arguments, done.error) == ("weather", {"place": "Paris"}, None)
    assert done.content == '{"place": "Paris", "sky": "晴"}'


@pytest.mark.parametrize(
    ("value", "schema", "fault"),
    [
        (1, {"type": "integer"}, None),
        (1.0, {"type": "integer"}, None),
        (1.5, {"type": "integer"}, "x must be integer, not 1.5"),
        (float("inf"), {"type": "integer"}, "x must be integer, not Infinity"),
        (True, {"type": "number"}, "x must be number, not true"),
        (None, {"type": ["string", "null"]}, None),
        (None, {"type": ["string", "number"]}, "x must be string or number, not null"),
        ("a", {"enum": ["b", "c"]}, 'x must be one of "b", "c", not "a"'),
        ([1, "a"], {"type": "array", "items": {"type": "number"}}, 'x[1] must be number, not "a"'),
        ({"a": {"b": 1}}, {"properties": {"a": {"required": ["c"]}}}, "x.a lack 'c'"),
        ({"z": 1}, {"type": "object"}, None),
        ({"z": 1}, {"properties": {}}, "x have no 'z', only none at all"),
        ({"z": 1}, {"properties": {}, "additionalProperties": True}, None),
        ({"z": 1}, {"type": "object", "additionalProperties": False}, "x have no 'z', only none at all"),
    ],
)
def test_schema(value, schema, fault):
    check_schema(schema, "x")
    assert find_fault(value, schema, "x") == fault


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "object, not list"),
        ({"type": "text"}, "unknown type 'text'"),
        ({"properties": []}, "'properties' must be an object"),
        ({"required": "a"}, "'required' must be a list"),
        ({"properties": {"a": {}}, "required": ["b"]}, "'b' is required"),
        ({"properties": {"a": {"type": "text"}}}, r"x.a: unknown type"),
        ({"items": {"type": "text"}}, r"x\[\]: unknown type"),
        ({"enum": [{1}]}, "as JSON"),
    ],
)
def test_schemas_that_are_refused(schema, words):
    with pytest.raises(RequestError, match=words):
        check_schema(schema, "x")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "two words"}, "two words"),
        ({"name": ""}, "letters"),
        ({"timeout": 0}, "timeout"),
        ({"max_result": 0}, "max_result"),
        ({"parameters": {}}, "object"),
    ],
)
def test_tools_that_are_refused(fields, words):
    with pytest.raises(RequestError, match=words):
        Tool(**{"name": "a", "description": "", "parameters": PLACE, "function": weather, **fields})


def test_two_tools_of_one_name():
    with pytest.raises(RequestError, match="weather, weather"):
        box(WEATHER, WEATHER)


def run(function, **options):
    return run_tool(Tool("t", "", {"type": "object"}, function, **options), {})


def test_a_tool_that_raises():
    def fail():
        raise KeyError("x" * 1000)

    done = run(fail)
    assert done.error.startswith("KeyError: 'xxx") and len(done.error) == 300
    assert json.loads(done.content) == {"error": done.error}


def test_a_tool_that_hangs_is_given_up():
    release = threading.Event()
    begin = time.perf_counter()
    done = run(release.wait, timeout=0.1)
    release.set()
    assert time.perf_counter() - begin < 2
    assert done.error == "no answer within 0.1 seconds"


def test_a_megabyte_is_cut_with_a_note():
    done = run(lambda: "é" * 1_000_000)
    assert done.content == "é" * 4000 + "\n[cut: the first 4,000 of 1,000,000 characters]"
    assert len(run(lambda: list(range(300_000)), max_result=10).content) < 70


def test_results_of_other_kinds():
    assert run(lambda: None).content == "null"
    assert run(lambda: "a\x00b\ud800").content == "ab"
    assert run(object).error.startswith("TypeError: ")
    loop = []
    loop.append(loop)
    assert run(lambda: loop).error.startswith("ValueError: ")


def test_content_of_a_call():
    assert ToolCall("a", {}, "fine").content == "fine"
    assert ToolCall("a", {}, "", "bad").content == '{"error": "bad"}'


def test_delimiters(golden):
    vocab = read_vocab(golden)
    assert ToolFormat().delimiters(vocab) == (vocab.call_start, vocab.call_end)
    assert ToolFormat("<s>", "</s>").delimiters(vocab) == (1, 2)
    with pytest.raises(RequestError, match="<tool>"):
        ToolFormat("<tool>", "</tool>").delimiters(vocab)
