"""Teacher speech with exact text from the synthesisers of the system: flite, festival and espeak-ng.

A voice is written `program:name`, for example `flite:rms`, `festival:cmu_us_slt_arctic_hts`,
`espeak:cmn-latn-pinyin+f2`. The programs come from Debian packages of the same names and must be on the PATH.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenizer.audio import TOKENIZER_RATE, read_audio, resample, trim_silence
from tokenizer.errors import RequestError

PROGRAMS = {"flite": "flite", "festival": "text2wave", "espeak": "espeak-ng"}
_FLITE_PITCH = {"rms": 100.0, "slt": 170.0, "awb": 125.0, "kal16": 105.0, "kal": 105.0}  # natural mean F0, Hz


@dataclass(frozen=True)
class Line:
    """A sentence to be spoken. `rate` 1.25 is a quarter faster, `pitch` 1.1 a tenth higher."""

    text: str
    voice: str
    rate: float = 1.0
    pitch: float = 1.0


def command(line: Line, target: Path) -> tuple[list[str], str]:
    """The command that speaks a line into `target`, and the text for its standard input."""
    program, _, name = line.voice.partition(":")
    if program == "flite":
        stretch, pitch = f"duration_stretch={1 / line.rate:.3f}", _FLITE_PITCH[name] * line.pitch
        options = ["--setf", stretch, "--setf", f"int_f0_target_mean={pitch:.1f}"]
        return ["flite", "-voice", name, *options, "-t", line.text, "-o", str(target)], ""
    if program == "espeak":
        options = ["-s", f"{round(165 * line.rate)}", "-p", f"{round(min(99, 50 * line.pitch))}"]
        return ["espeak-ng", "-v", name, *options, "-w", str(target), line.text], ""
    if program == "festival":
        setup = f"(begin (voice_{name}) (Parameter.set 'Duration_Stretch {1 / line.rate:.3f}))"
        return ["text2wave", "-eval", setup, "-o", str(target)], line.text
    raise RequestError(f"voice {line.voice!r}: the program must be one of {', '.join(PROGRAMS)}")


def speak(line: Line) -> np.ndarray:
    """Speaks one line: float32 at 16 kHz, silence trimmed. Raises RequestError when the program fails."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "line.wav"
        arguments, text = command(line, target)
        if shutil.which(arguments[0]) is None:
            raise RequestError(f"{arguments[0]} is not installed: it speaks the voice {line.voice}")
        done = subprocess.run(arguments, input=text, capture_output=True, text=True)
        if done.returncode != 0 or not target.exists() or target.stat().st_size < 1000:
            raise RequestError(f"{line.voice} could not speak {line.text!r}: {done.stderr.strip()[:200]}")
        return trim_silence(resample(read_audio(target), TOKENIZER_RATE).samples)
