"""Teaches transformers the model type "step1" without importing transformers before somebody wants it.

`stepaudio.lm.modeling` registers itself when it is imported, but it takes seconds to import. So where transformers
is not loaded yet, a finder waits for its import and loads our module right after it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LIBRARY, _MODEL = "transformers", "stepaudio.lm.modeling"


def register_step1() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know Step-1, now or as soon as transformers is imported."""
    if _LIBRARY in sys.modules:
        importlib.import_module(_MODEL)
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers(MetaPathFinder):
    """Finds transformers as the other finders do, with a loader that imports our model behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIBRARY:
            return None
        found = (
            finder.find_spec(fullname, path, target)
            for finder in sys.meta_path
            if finder is not self and hasattr(finder, "find_spec")
        )
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenModel(spec.loader)
        return spec


class _ThenModel(Loader):
    """Another loader, and our model's import after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader  # what looks at it later sees the ordinary loader
        module.__loader__ = self._loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterTransformers)]
        self._loader.exec_module(module)
        importlib.import_module(_MODEL)
