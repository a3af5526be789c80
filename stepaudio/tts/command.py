"""The text-to-speech command: its arguments and what it does with them.

`scripts/tts_inference.py` and `stepaudio tts` are both this.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stepaudio.checkpoints import SPEAKERS_DIR, TTS_DIR, find_root
from stepaudio.device import resolve_device, resolve_dtype
from stepaudio.lm.base import AUTO, ENGINES
from stepaudio.lm.kernels.quantise import PRECISIONS
from stepaudio.tts.batch import read_jobs, run_jobs
from stepaudio.tts.engine import StepAudioTTS, examine
from stepaudio.tts.speakers import Speakers
from stepaudio.tts.speech import TTS_SAMPLING, Speech, TTSRequest
from stepaudio.tts.style import HUMMING, RAP
from stepaudio.tts.text import language
from tokenizer.audio import write_audio
from tokenizer.errors import RequestError
from tokenizer.files import make_folder

# What is said when no text is given.
EXAMPLES = {
    "zh": "你好，今天的风很轻，我们一起去河边走走吧。",
    "en": "Hello, the wind is gentle today, let us walk along the river.",
    RAP: "（RAP）一步两步跟着节拍走，三更半夜灯火照街头，话不多说把梦握在手，明天太阳照常会等候。",
    HUMMING: "（哼唱）小船轻轻摇，月亮挂树梢，晚风吹过来，带走一天的烦恼。",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    add = parser.add_argument
    add("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")
    add("--output-path", type=Path, default=Path("output"), help="folder for the sound files (default: output)")
    add("--synthesis-type", choices=["tts", "clone"], help="clone: know the voice by its recording alone")
    add("--text", help="what to say, style tags in front (`stepaudio tags` lists them)")
    add("--text-file", type=Path, help="file with the text, up to 20,000 characters")
    add("--input-jsonl", type=Path, help='rows {"id", "text"} with "speaker" or "clone"; run again to resume')
    add("--speaker", help="a registered voice (default: the first)")
    add("--speaker-json", type=Path, help="folder or JSON file of voices (default: the speech model's)")
    add("--prompt-wav", help="recording of a voice to clone, with --prompt-text")
    add("--prompt-text", help="what is said in --prompt-wav")
    add("--list-speakers", action="store_true", help="print the registered voices and stop")
    add("--seed", type=int, default=TTSRequest.seed)
    add("--temperature", type=float, default=TTS_SAMPLING.temperature)
    add("--top-k", type=int, default=TTS_SAMPLING.top_k)
    add("--top-p", type=float, default=TTS_SAMPLING.top_p)
    add("--speed", type=float, default=TTSRequest.speed, help="0.5 to 2; the pitch stays")
    add("--volume", type=float, default=TTSRequest.volume, help="0.1 to 10; never clips")
    add("--allow-any-tag", action="store_true", help="pass unknown style tags on to the model")
    add("--normalize", action="store_true", help="numbers, dates and units as words (needs wetext)")
    add("--max-attempts", type=int, default=3, help="how often a doubtful piece is drawn (default: 3)")
    add("--batch-size", type=int, default=8)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--engine", default=AUTO, choices=ENGINES, help="of the language model (default: fast where it can run)")
    add("--precision", default=AUTO, choices=(AUTO, *PRECISIONS), help="of its weights, with the fast engine")
    add("--json", action="store_true", help="print one JSON object per item")


def run_command(args: argparse.Namespace) -> int:
    """Speaks what the arguments ask for; 1 if items of a batch failed, else 0."""
    root = find_root(args.model_path)
    speakers = _speakers(root, args.speaker_json)
    if args.list_speakers:
        for name in speakers.names:
            print(name, *map("({})".format, speakers.music_of(name)))
        return 0
    request = _request(args, speakers)
    if args.input_jsonl:
        jobs = read_jobs(args.input_jsonl, request)
        engine = _engine(args, root, speakers)
        results = run_jobs(jobs, engine, args.output_path, args.batch_size)
        for result in results:
            path = result.path and str(args.output_path / result.path)
            _report({**asdict(result), "path": path}, args.json)
        return int(any(result.error is not None for result in results))
    texts = list(_texts(args, request, speakers))
    for _, item in texts:
        examine(item, speakers)  # what is wrong with a request is said before a model is loaded
    engine = _engine(args, root, speakers)
    for name, item in texts:
        _report(_speak(engine, name, item, args.output_path), args.json)
    return 0


def _speakers(root: Path, given: Path | None) -> Speakers:
    folder = given or root / TTS_DIR / SPEAKERS_DIR
    return Speakers.from_path(folder) if given or folder.is_dir() else Speakers()


def _request(args: argparse.Namespace, speakers: Speakers) -> TTSRequest:
    """Everything but the text."""
    if (args.prompt_wav is None) != (args.prompt_text is None):
        raise RequestError("--prompt-wav and --prompt-text belong together: give the recording and what is said in it")
    clone = None
    if args.prompt_wav is not None:
        clone = {"speaker": args.speaker or "", "prompt_text": args.prompt_text, "wav_path": args.prompt_wav}
    elif args.synthesis_type == "clone":
        clone = speakers.find(args.speaker)
    return TTSRequest(
        text="",
        speaker=None if clone else args.speaker,
        clone=clone,
        seed=args.seed,
        speed=args.speed,
        volume=args.volume,
        sampling=replace(TTS_SAMPLING, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
        allow_any_tag=args.allow_any_tag,
        normalize=args.normalize,
    )


def _texts(args: argparse.Namespace, request: TTSRequest, speakers: Speakers) -> Iterator[tuple[str, TTSRequest]]:
    """File names and requests: the text that was given, or the examples that the voices allow."""
    if args.text is not None and args.text_file is not None:
        raise RequestError("give either --text or --text-file, not both")
    text = _read_text(args.text_file) if args.text_file is not None else args.text
    if text is not None:
        yield "output_clone" if request.clone else "output_tts", replace(request, text=text)
        return
    clone = request.clone or speakers.find(args.speaker)
    line = EXAMPLES["en" if language(_prompt_text(clone)) == "en" else "zh"]
    if not request.clone:
        yield "output_tts", replace(request, text=line)
        for name, tag in (("output_rap", RAP), ("output_humming", HUMMING)):
            if tag in speakers.music_of(clone.speaker):
                yield name, replace(request, text=EXAMPLES[tag])
    if args.synthesis_type != "tts":
        yield "output_clone", replace(request, text=line, speaker=None, clone=clone)


def _prompt_text(clone: Any) -> str:
    return clone["prompt_text"] if isinstance(clone, dict) else clone.prompt_text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None


def _engine(args: argparse.Namespace, root: Path, speakers: Speakers) -> StepAudioTTS:
    make_folder(args.output_path)
    device = resolve_device(args.device)
    return StepAudioTTS.from_dir(
        root,
        device,
        resolve_dtype(args.dtype, device),
        speakers=speakers,
        max_attempts=args.max_attempts,
        batch_size=args.batch_size,
        lm_options={"engine": args.engine, "precision": args.precision},
    )


def _speak(engine: StepAudioTTS, name: str, request: TTSRequest, folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    [speech] = engine.synthesize_batch([request])
    if not isinstance(speech, Speech):
        raise speech
    taken = time.perf_counter() - begin
    path = write_audio(folder / f"{name}.wav", speech.audio)
    return {
        "id": name,
        "path": str(path),
        "seconds": round(speech.seconds, 3),
        "seed": request.seed,
        "rtf": round(taken / speech.seconds, 4),
        "problems": speech.problems,
        "error": None,
    }


def _report(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row, ensure_ascii=False), flush=True)
    elif row["error"] is not None:
        print(f"{row['id']}: error: {row['error']}")
    else:
        doubts = f", check it: {'; '.join(row['problems'])}" if row["problems"] else ""
        print(f"{row['path']}: {row['seconds']:.2f} s, RTF {row['rtf']:.3f}{doubts}", flush=True)
