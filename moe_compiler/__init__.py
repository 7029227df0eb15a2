"""Mixed-precision quantization of Mixture-of-Experts models that adapts to the data while serving.

The public names are loaded on first use, so that ``import moe_compiler`` stays cheap. Importing it is what lets
transformers load compiled models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_compiler.registration import register as _register

if TYPE_CHECKING:
    from moe_compiler.api import dynamo_compile
    from moe_compiler.config import CompileConfig
    from moe_compiler.dynamo_config import DynamoConfig
    from moe_compiler.inspection import explain
    from moe_compiler.report import write_report
    from moe_compiler.sources import read_texts
    from moe_compiler.zero_shot_evaluation import zero_shot

__version__ = "0.1.0"
__all__ = ["CompileConfig", "DynamoConfig", "dynamo_compile", "explain", "read_texts", "write_report", "zero_shot"]

_HOME = {
    "CompileConfig": "moe_compiler.config",
    "DynamoConfig": "moe_compiler.dynamo_config",
    "dynamo_compile": "moe_compiler.api",
    "explain": "moe_compiler.inspection",
    "read_texts": "moe_compiler.sources",
    "write_report": "moe_compiler.report",
    "zero_shot": "moe_compiler.zero_shot_evaluation",
}


_register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_compiler' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
