"""Telling transformers of the method `"moe_compiler"`, without importing transformers' models for it.

transformers knows a method once its class is in the mappings of `transformers.quantizers.auto`, a module that takes
seconds to import. If it has been imported the class is registered at once, else as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.quantizers.auto"
_PLUGIN = "moe_compiler.huggingface"


def register() -> None:
    """Sees to it that transformers knows the method when it needs it. To call it again does nothing."""
    module = sys.modules.get(_AUTO)
    if module is not None and hasattr(module, "register_quantizer"):
        _register(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """A finder of `sys.meta_path` that registers when the module has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the module as Python does, with an execution that registers at its end; no other module."""
        if fullname != _AUTO:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(module: ModuleType) -> None:
    plugin = import_module(_PLUGIN)
    quantizer = getattr(plugin, "DynamoQuantizer", None)
    if quantizer is None:  # its import is what made Python import transformers': it registers at its own end
        return
    if plugin.METHOD not in module.AUTO_QUANTIZATION_CONFIG_MAPPING:
        module.register_quantization_config(plugin.METHOD)(plugin.DynamoConfig)
        module.register_quantizer(plugin.METHOD)(quantizer)
