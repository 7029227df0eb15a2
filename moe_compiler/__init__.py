"""Mixed-precision quantization of Mixture-of-Experts models that adapts to the data while serving.

The public names are loaded on first use, so that ``import moe_compiler`` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compiler.api import dynamo_compile
    from moe_compiler.config import CompileConfig
    from moe_compiler.inspection import explain

__version__ = "0.1.0"
__all__ = ["CompileConfig", "dynamo_compile", "explain"]

_HOME = {
    "CompileConfig": "moe_compiler.config",
    "dynamo_compile": "moe_compiler.api",
    "explain": "moe_compiler.inspection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_compiler' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
