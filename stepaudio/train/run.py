"""The stages of a new checkpoint by name, each on its own: settings file, data folder and output folder in, files out.

Folders below `out`: `corpus` (data, features, codes, embeddings), one per stage with its state, log, curve,
samples and exported files, and `checkpoint`, the finished root in the release's layout.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import yaml

from cosyvoice.config import read_config as read_decoder
from stepaudio.chat.prompts import prompts
from stepaudio.chat.tools import Toolbox, ToolFormat
from stepaudio.checkpoints import CHAT_DIR, FLOW_DIR, SPEAKERS_DIR, SPEAKERS_FILE, TOKENIZER_DIR, TTS_DIR
from stepaudio.export.vocabulary import write_vocabulary
from stepaudio.lm.vocab import Vocab
from stepaudio.train.codes import Codes, write_codes
from stepaudio.train.data import Corpus
from stepaudio.train.domain import Domain
from stepaudio.train.features import write_features
from stepaudio.train.flow import FlowStage, FlowStageConfig
from stepaudio.train.listen import LinguisticStage, ListenConfig, SemanticStage
from stepaudio.train.lm import LmConfig, LmStage
from stepaudio.train.loop import Stage, fit
from stepaudio.train.nano_data import NanoData, build, read_dialogues
from stepaudio.train.nano_tools import nano_tools
from stepaudio.train.sequences import Sequences, Voices
from stepaudio.train.speaker import SpeakerConfig, SpeakerStage
from stepaudio.train.synth import Line, speak
from stepaudio.train.text import plain
from stepaudio.train.vocabulary import nano_vocabulary
from stepaudio.train.vocoder import VocoderStage, VocoderStageConfig
from stepaudio.tts.prompt import system_prompt
from stepaudio.tts.style import table
from tokenizer.audio import TOKENIZER_RATE, Audio, write_audio
from tokenizer.errors import RequestError
from tokenizer.files import make_folder

C = TypeVar("C")


@dataclass(frozen=True)
class Job:
    """One stage to run."""

    stage: str
    configs: Path  # folder with <stage>.yaml, data.yaml and domain.yaml
    out: Path
    device: torch.device
    speech: Path | None = None  # folders of recorded speech; for the data stage
    workers: int = 2
    minutes: float | None = None

    @property
    def corpus(self) -> Path:
        return self.out / "corpus"

    @property
    def folder(self) -> Path:
        return self.out / self.stage

    def settings(self) -> dict[str, Any]:
        return yaml.safe_load((self.configs / "data.yaml").read_text(encoding="utf-8"))

    def config(self, kind: type[C]) -> C:
        return read_config(self.configs / f"{self.stage}.yaml", kind)


def read_config(path: Path, kind: type[C]) -> C:
    """A YAML file as a frozen dataclass; RequestError for a key it does not have."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path} is missing: --configs must hold one file per stage") from None
    return _fill(content or {}, kind, path)


def _fill(content: dict[str, Any], kind: type[C], path: Path) -> C:
    known = {field.name for field in fields(kind)}
    unknown = sorted(content.keys() - known)
    if unknown:
        raise RequestError(f"{path}: unknown setting {unknown[0]!r}: known are {', '.join(sorted(known))}")
    hints = get_type_hints(kind)
    values = {
        name: _fill(value, hints[name], path) if is_dataclass(hints[name]) else value for name, value in content.items()
    }
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def data(job: Job) -> None:
    """Speaks the lines, decodes the recordings."""
    if job.speech is None:
        raise RequestError("--speech is needed for the data stage: the folder with the recorded sets")
    corpus = build(
        NanoData.from_files(job.configs / "data.yaml", job.configs / "domain.yaml"), job.speech, job.corpus, job.workers
    )
    print(f"{len(corpus)} clips, {corpus.hours:.2f} h")


def features(job: Job) -> None:
    """What decoder and speaker encoder read; each stage makes what it finds missing."""
    for kind in ("mel", "f0", "wave22", "fbank80"):
        write_features(job.corpus, kind, job.workers)


def _train(job: Job, make: Callable[[], Stage], kinds: tuple[str, ...] = ()) -> None:
    """Makes the features of `kinds` that are not there yet, then trains."""
    for kind in kinds:
        write_features(job.corpus, kind, job.workers)
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass gives NaN beside an additive bias
    torch.manual_seed(0)  # of the first weights
    stage = make()
    steps = fit(stage, stage.config.loop, job.folder, job.device, job.minutes)  # type: ignore[attr-defined]
    print(f"{job.stage}: {steps} steps")


def linguistic(job: Job) -> None:
    """Encoder and codebook of the linguistic tokenizer."""
    _train(job, lambda: LinguisticStage(job.config(ListenConfig), job.corpus, job.device), ("rows",))


def semantic(job: Job) -> None:
    """Encoder and codebook of the semantic tokenizer."""
    _train(job, lambda: SemanticStage(job.config(ListenConfig), job.corpus, job.device), ("log_mel",))


def speaker(job: Job) -> None:
    """Speaker encoder, and the embedding of every clip."""
    _train(job, lambda: SpeakerStage(job.config(SpeakerConfig), job.corpus, job.device), ("fbank80",))


def vocoder(job: Job) -> None:
    """Mel -> wave."""
    _train(
        job,
        lambda: VocoderStage(job.config(VocoderStageConfig), read_decoder(job.configs), job.corpus, job.device),
        ("mel", "f0", "wave22"),
    )


def flow(job: Job) -> None:
    """Codes -> mel; after `codes` and `speaker`."""
    _train(
        job,
        lambda: FlowStage(job.config(FlowStageConfig), read_decoder(job.configs), job.corpus, job.device),
        ("mel",),
    )


def codes(job: Job) -> None:
    """Puts both tokenizers into the checkpoint and encodes the corpus with them."""
    for kind in ("rows", "log_mel"):
        write_features(job.corpus, kind, job.workers)
    target = make_folder(job.out / "checkpoint" / TOKENIZER_DIR)
    for name in ("linguistic", "semantic"):
        shutil.copytree(job.out / name / TOKENIZER_DIR, target, dirs_exist_ok=True)
    write_codes(job.corpus, target, job.device)


def vocabulary(job: Job) -> Vocab:
    """Writes tokenizer.model into both language-model folders."""
    dialogues = [d for split in ("train", "test") for d in read_dialogues(job.corpus, split)]
    texts = [plain(clip.text) for clip in Corpus.open(job.corpus).clips] + [t.text for d in dialogues for t in d.turns]
    declared = Toolbox(nano_tools(), ToolFormat()).declare([])[0].text
    standing = [system_prompt(), *(system_prompt(name) for name in job.settings()["named"]), declared]
    standing += [one.text for one in prompts().values()]
    characters = [f"（{style.name}）" for style in table()] + [chr(code) for code in range(32, 127)] + list("。？，！")
    model = nano_vocabulary([*texts, *characters], standing)
    for folder, chat in ((TTS_DIR, False), (CHAT_DIR, True)):
        write_vocabulary(make_folder(job.out / "checkpoint" / folder), model, chat)
    return Vocab.from_file(job.out / "checkpoint" / TTS_DIR)


def lm(job: Job) -> None:
    """The language model, for both roles."""
    config, settings = job.config(LmConfig), job.settings()
    voices = Voices(
        {voice: name for name, voice in settings["named"].items()},
        {(style["rate"], style["pitch"]): tag for tag, style in settings["styles"].items()},
    )
    sequences = Sequences(
        vocabulary(job),
        Corpus.open(job.corpus).clips,
        Codes.open(job.corpus),
        read_dialogues(job.corpus, "train"),
        voices,
        config.noise,
        config.recorded_share,
        Domain.from_file(job.configs / "domain.yaml"),
    )

    def export(stage: LmStage, _: Path) -> None:
        tts, chat = (job.out / "checkpoint" / name for name in (TTS_DIR, CHAT_DIR))
        stage.write(tts)
        for file in tts.glob("model*"):
            link = chat / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(file, chat))
        shutil.copy(tts / "config.json", chat)

    _train(job, lambda: LmStage(config, sequences, job.device, export))


def assemble(job: Job) -> None:
    """Puts the decoder and the voices beside the language model: `checkpoint` is whole then."""
    tts = make_folder(job.out / "checkpoint" / TTS_DIR)
    for name in ("speaker", "flow", "vocoder"):
        shutil.copytree(job.out / name / FLOW_DIR, tts / FLOW_DIR, dirs_exist_ok=True)
    settings = job.settings()
    folder = make_folder(tts / SPEAKERS_DIR)
    for name, voice in settings["named"].items():
        sound = Audio(speak(Line(settings["prompts"][name], voice)), TOKENIZER_RATE)
        write_audio(folder / f"{name}_prompt.wav", sound)
    (folder / SPEAKERS_FILE).write_text(json.dumps(settings["prompts"], ensure_ascii=False, indent=1) + "\n", "utf-8")


STAGES: dict[str, Callable[[Job], None]] = {
    "data": data,
    "features": features,
    "linguistic": linguistic,
    "semantic": semantic,
    "speaker": speaker,
    "vocoder": vocoder,
    "codes": codes,
    "lm": lm,
    "flow": flow,
    "assemble": assemble,
}


def run_stage(job: Job) -> None:
    """Runs one stage by its name. Raises RequestError for an unknown one."""
    if job.stage not in STAGES:
        raise RequestError(f"unknown stage {job.stage!r}: choose from {', '.join(STAGES)}")
    STAGES[job.stage](job)
