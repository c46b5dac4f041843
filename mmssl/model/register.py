"""Makes transformers' Auto classes know our model."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRIGGER = "transformers.models.auto.modeling_auto"


def auto_classes() -> None:
    """Register with AutoConfig, AutoModel and the classes of tasks."""
    import transformers
    from transformers import AutoConfig, AutoModel

    from mmssl.model.configuration import MmsslConfig
    from mmssl.model.modeling import MmsslModel
    from mmssl.model.tasks import TASKS

    AutoConfig.register("mmssl", MmsslConfig, exist_ok=True)
    AutoModel.register(MmsslConfig, MmsslModel, exist_ok=True)
    for name, task in TASKS.items():
        getattr(transformers, name).register(MmsslConfig, task, exist_ok=True)


def when_transformers_loads() -> None:
    """Register as soon as somebody uses the Auto classes.

    `import mmssl` must know `AutoModel`, and `mmssl --help` must not wait for torch: so the registration waits instead.
    """
    if TRIGGER in sys.modules:
        auto_classes()
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the trigger module as usual, and registers once it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            auto_classes()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
