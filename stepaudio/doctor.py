"""What a machine and a checkpoint folder look like from inside: files, packages, device, versions.

`doctor` prints the report and returns the exit code; `diagnose` is the same as data.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime

from stepaudio.check import Finding, Status, check
from stepaudio.checkpoints import ASR_DIR, CHECKPOINTS, check_names, find_root
from stepaudio.device import resolve_device, resolve_dtype

_PROJECT = Path(__file__).resolve().parent.parent
_OURS = ("tokenizer", "cosyvoice", "stepaudio")  # other distributions use the first two names as well
_LIBRARIES = (
    *("torch", "torchaudio", "transformers", "accelerate", "safetensors", "sentencepiece"),
    *("onnx", "librosa", "soundfile", "numpy"),
)


@dataclass(frozen=True)
class Diagnosis:
    """Everything the report says."""

    root: str
    findings: list[Finding]
    packages: dict[str, str]  # name -> "ok" or what hides it
    device: str  # what --device auto would take
    dtype: str  # of the language models and the flow
    onnx_provider: str  # speaker encoder, always; semantic tokenizer with the onnx backend
    versions: dict[str, str]
    tokenizers: dict[str, str]  # checkpoint -> whether other tools get the same text ids

    @property
    def broken(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.broken]

    @property
    def healthy(self) -> bool:
        return not self.broken and all(state == "ok" for state in self.packages.values())


def doctor(
    model_path: str | os.PathLike[str] | None = None,
    only: Collection[str] = tuple(CHECKPOINTS),
    device: str = "auto",
    dtype: str = "auto",
    as_json: bool = False,
) -> int:
    """Prints the report; 0 if all that is needed is there, 1 if something is broken.

    `only` names the checkpoints that are needed ("tokenizer", "tts", "chat").
    Raises CheckpointError / RequestError for a root or an option that cannot be used at all.
    """
    diagnosis = diagnose(model_path, only, device, dtype)
    print(_as_json(diagnosis) if as_json else _as_text(diagnosis))
    return 0 if diagnosis.healthy else 1


def diagnose(
    model_path: str | os.PathLike[str] | None = None,
    only: Collection[str] = tuple(CHECKPOINTS),
    device: str = "auto",
    dtype: str = "auto",
) -> Diagnosis:
    """The report as data; see `doctor`."""
    check_names(only)
    root = find_root(model_path).resolve()
    target = resolve_device(device)
    findings = check(root, only)
    return Diagnosis(
        root=str(root),
        findings=findings,
        packages={name: _package(name) for name in _OURS},
        device=str(target),
        dtype=str(resolve_dtype(dtype, target)).removeprefix("torch."),
        onnx_provider=_provider(target.type),
        versions=_versions(),
        tokenizers=_tokenizers(root, findings),
    )


def _package(name: str) -> str:
    """Whether `import name` finds this project's package."""
    found = importlib.import_module(name).__file__
    if found and Path(found).resolve() == _PROJECT / name / "__init__.py":
        return "ok"
    return f"{found or 'a namespace package'} hides this project's {name}: uninstall it or use a fresh environment"


def _provider(device: str) -> str:
    available = onnxruntime.get_available_providers()
    if device == "cuda" and "CUDAExecutionProvider" in available:
        return "speaker encoder CPUExecutionProvider, semantic tokenizer (onnx backend) CUDAExecutionProvider"
    return "CPUExecutionProvider"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    for name in _LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return versions


def _tokenizers(root: Path, findings: list[Finding]) -> dict[str, str]:
    """For each readable tokenizer.model: do the ids of AutoTokenizer agree with ours?"""
    # Both load transformers, which takes seconds; AutoTokenizer reads config.json and must know the model type.
    importlib.import_module("stepaudio.lm.modeling")
    from stepaudio.lm.hf_tokenizer import compare

    readable = [f for f in findings if f.status is Status.OK and f.file.endswith("/tokenizer.model")]
    return {finding.checkpoint: compare(root / Path(finding.file).parent) for finding in readable}


def _as_json(diagnosis: Diagnosis) -> str:
    return json.dumps(asdict(diagnosis) | {"healthy": diagnosis.healthy}, ensure_ascii=False, indent=2)


def _as_text(diagnosis: Diagnosis) -> str:
    lines = [f"checkpoints in {diagnosis.root}"]
    for name in CHECKPOINTS:
        rows = [finding for finding in diagnosis.findings if finding.checkpoint == name]
        if rows:
            lines += ["", CHECKPOINTS[name]]
            lines += [_row(finding) for finding in rows]
    lines += ["", f"device {diagnosis.device}, dtype {diagnosis.dtype}, onnxruntime: {diagnosis.onnx_provider}"]
    lines += [f"{name}: {state}" for name, state in diagnosis.tokenizers.items()]
    lines += [f"package {name}: {state}" for name, state in diagnosis.packages.items()]
    lines += [", ".join(f"{name} {version}" for name, version in diagnosis.versions.items()), ""]
    lines.append(f"broken: {len(diagnosis.broken)} files" if diagnosis.broken else "everything needed is there")
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    mark = "!!" if finding.broken else "  "
    file = finding.file.partition("/")[2].replace(ASR_DIR, f"{ASR_DIR[:24]}...") or "the folder"
    remarks = [] if finding.needed else ["optional"]
    remarks += [finding.detail] if finding.detail else []
    return f" {mark} {finding.status.value:<16}{file:<44}{', '.join(remarks)}".rstrip()
