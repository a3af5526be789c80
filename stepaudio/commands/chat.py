"""`stepaudio chat` and scripts/offline_inference.py: answers texts, sounds, folders, JSONL, spoken and written.

Without an input it runs the release's two example turns: a text, then the sound of its own answer.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stepaudio.chat.engine import ASR_SAMPLING, CHAT_SAMPLING, ChatRequest
from stepaudio.chat.messages import SYSTEM, Message
from stepaudio.chat.offline import (
    Item,
    ItemResult,
    read_history,
    read_items,
    run_item,
    run_items,
    sound_item,
    text_item,
)
from stepaudio.chat.prompts import prompt
from stepaudio.chat.tools import Tool
from stepaudio.checkpoints import find_root
from stepaudio.commands.options import (
    add_engine,
    add_model,
    add_sampling,
    add_spread,
    engine_options,
    sampling_options,
    spread_options,
)
from stepaudio.compat import StepAudio
from tokenizer.errors import RequestError
from tokenizer.files import make_folder

EXAMPLE = "你好，我叫小明，很高兴认识你。你叫什么名字？"
EXAMPLE_TEXT, EXAMPLE_SOUND = "output_e2e_tqta", "output_e2e_aqta"  # the release's names of the two sound files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    add = parser.add_argument
    add("--text", help="what the user says, in words")
    add("--input", type=Path, help="what the user says: a sound file, a folder of them, .jsonl (run again to resume)")
    add("--history", type=Path, help='earlier turns: a JSON file [{"role", "content"}, ...]')
    add("--system", help="the system turn")
    add("--prompt", nargs="+", metavar=("NAME", "FIELD=VALUE"), help="the system turn, from configs/prompts.yaml")
    add("--task", choices=["chat", "asr"], default="chat", help="asr: write the sounds down")
    add("--tools", type=Path, help="Python file with TOOLS, a list of stepaudio.chat.tools.Tool")
    add("--text-only", action="store_true", help="do not speak the answers; the speech model is not loaded")
    add("--speaker", help="a registered voice (default: the first)")
    add("--speaker-json", type=Path, help="folder or JSON file of voices (default: the speech model's)")
    add("--prompt-wav", help="recording of a voice to answer with, with --prompt-text")
    add("--prompt-text", help="what is said in --prompt-wav")
    add("--speed", type=float, default=ChatRequest.speed, help="0.5 to 2; the pitch stays")
    add("--volume", type=float, default=ChatRequest.volume, help="0.1 to 10; never clips")
    add("--trim-history", action="store_true", help="leave out the oldest turns where the context is too small")
    add("--seed", type=int, default=ChatRequest.seed)
    add("--output-dir", type=Path, default=Path("output"), help="folder for sound files and results (default: output)")
    add("--batch-size", type=int, default=8, help="sounds that are written down together (default: 8)")
    add("--load-in-8bit", action="store_true", help="the chat model's weights as 8-bit integers (needs bitsandbytes)")
    add("--json", action="store_true", help="print one JSON object per item")
    add_sampling(parser)
    add_model(parser)
    add_engine(parser)
    add_spread(parser)
    add("--tensor-parallel", type=int, help="split every layer of the chat model over so many CUDA devices")


def run_command(args: argparse.Namespace) -> int:
    """Answers what the arguments ask for; 1 if items of a folder or JSONL failed, else 0."""
    root = find_root(args.model_path)
    request = _request(args)
    items = _items(args, request)
    make_folder(args.output_dir)
    engine = load_engine(args, root)
    report = reporter(args)
    if items is None:
        _run_examples(engine, args, request, report)
        return 0
    if args.input is None or _is_single(args.input):
        report(run_item(engine, items[0], args.output_dir))
        return 0
    results = run_items(engine, items, args.output_dir, args.batch_size, report)
    return int(any(result.error is not None for result in results))


def load_engine(args: argparse.Namespace, root: Path) -> StepAudio:
    """The engine that the arguments describe; what it needs is loaded when it is needed."""
    voices = {"speakers": args.speaker_json} if args.speaker_json else {}
    return StepAudio.from_dir(
        root,
        args.device,
        args.dtype,
        text_only=args.text_only or args.task == "asr",
        batch_size=args.batch_size,
        load_in_8bit=args.load_in_8bit,
        lm_options={**engine_options(args), **spread_options(args), "tensor_parallel": args.tensor_parallel},
        tts_options={**voices, "lm_options": engine_options(args)},
    )


def reporter(args: argparse.Namespace) -> Callable[[ItemResult], None]:
    """Prints a result, beside a progress bar if there is one."""

    def report(result: ItemResult) -> None:
        row = result.for_people(args.output_dir)
        tqdm.write(json.dumps(row, ensure_ascii=False) if args.json else _lines(row), file=sys.stdout)
        sys.stdout.flush()

    return report


def _request(args: argparse.Namespace) -> ChatRequest:
    """Everything but the user's turn."""
    if (args.prompt_wav is None) != (args.prompt_text is None):
        raise RequestError("--prompt-wav and --prompt-text belong together: give the recording and what is said in it")
    clone = None
    if args.prompt_wav is not None:
        clone = {"speaker": args.speaker or "", "prompt_text": args.prompt_text, "wav_path": args.prompt_wav}
    history = read_history(args.history) if args.history else []
    if (system := _system(args)) is not None:
        history = [system, *(message for message in history if message.role != SYSTEM)]
    return ChatRequest(
        messages=tuple(history),
        speaker=None if clone else args.speaker,
        clone=clone,
        seed=args.seed,
        speed=args.speed,
        volume=args.volume,
        text_only=args.text_only,
        sampling=replace(ASR_SAMPLING if args.task == "asr" else CHAT_SAMPLING, **sampling_options(args)),
        tools=_tools(args.tools) if args.tools else (),
        trim_history=args.trim_history,
    )


def _system(args: argparse.Namespace) -> Message | None:
    if args.system is not None and args.prompt is not None:
        raise RequestError("give either --system or --prompt, not both")
    if args.prompt is not None:
        name, *values = args.prompt
        if not all("=" in value for value in values):
            raise RequestError(f"--prompt {' '.join(args.prompt)}: after the name come FIELD=VALUE pairs")
        return prompt(name, **dict(value.split("=", 1) for value in values))
    return None if args.system is None else Message.of(SYSTEM, args.system)


def _items(args: argparse.Namespace, request: ChatRequest) -> list[Item] | None:
    """What is to be done; None for the example turns."""
    if args.text is not None and args.input is not None:
        raise RequestError("give either --text or --input, not both")
    if args.task == "asr" and args.input is None:
        raise RequestError("--task asr needs --input: a sound file, a folder of them or a .jsonl file")
    if args.input is not None:
        if _is_single(args.input):
            return [sound_item(args.input.stem, str(args.input), request, args.task)]
        return read_items(args.input, request, args.task)
    return None if args.text is None else [text_item("output_chat", args.text, request)]


def _is_single(path: Path) -> bool:
    """Whether an input is one sound file."""
    return not path.is_dir() and path.suffix.lower() != ".jsonl"


def _run_examples(
    engine: StepAudio, args: argparse.Namespace, request: ChatRequest, report: Callable[[ItemResult], None]
) -> None:
    first = run_item(engine, text_item(EXAMPLE_TEXT, EXAMPLE, request), args.output_dir)
    report(first)
    if args.text_only:
        return
    if first.path is None:
        raise RequestError("the answer to the first example holds nothing to say, so the second has no sound to answer")
    sound = str(args.output_dir / first.path)
    report(run_item(engine, sound_item(EXAMPLE_SOUND, sound, request), args.output_dir))


def _tools(path: Path) -> list[Tool]:
    """TOOLS of a Python file, which is run for it."""
    if not path.is_file():
        raise RequestError(f"--tools {path} does not exist")
    tools = runpy.run_path(str(path)).get("TOOLS")
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Tool) for tool in tools):
        raise RequestError(f"--tools {path} must define TOOLS, a list of stepaudio.chat.tools.Tool")
    return list(tools)


def _lines(row: dict[str, Any]) -> str:
    if row["error"] is not None:
        return f"{row['id']}: error: {row['error']}"
    lines = [f"{row['id']}: {row['text']}"]
    lines += [f"  tool {call['name']}({call['arguments']}): {call['error'] or call['result']}" for call in row["calls"]]
    if row["audio"]:
        lines.append(f"  {row['audio']}: {row['seconds']:.2f} s, made in {row['times']['total']:.2f} s")
    return "\n".join([*lines, *(f"  check it: {problem}" for problem in row["problems"])])
