"""Which golden components exist, and running one of them."""

from __future__ import annotations

import importlib
from pathlib import Path

from stepaudio.golden.base import Row
from tokenizer.errors import RequestError

COMPONENTS = (
    "postprocessing",
    "linguistic_tokenizer",
    "semantic_tokenizer",
    "dual_tokens",
    "prompt_features",
    "flow",
    "vocoder",
    "manifests",
    "step1_lm",
    "prompts",
    "chat_prompts",
    "tts_e2e",
)


_FOLDERS = {"chat_prompts": "prompts"}  # where a component's data lies, if not in the folder of its name


def present(root: Path) -> list[str]:
    """The components a golden folder has. Raises RequestError if it has none."""
    found = [name for name in COMPONENTS if (root / _FOLDERS.get(name, name)).is_dir()]
    if not found:
        raise RequestError(f"{root} holds none of {', '.join(COMPONENTS)}: give the folder above them")
    return found


def replay(component: str, root: Path) -> list[Row]:
    """All rows of one component of a golden folder. Raises RequestError for an unknown name."""
    if component not in COMPONENTS:
        raise RequestError(f"unknown golden component {component!r}: choose from {', '.join(COMPONENTS)}")
    return list(importlib.import_module(f"stepaudio.golden.{component}").replay(root))
