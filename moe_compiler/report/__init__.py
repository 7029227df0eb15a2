"""A report on a compiled model: figures, tables and graphs on one HTML page.

It draws with matplotlib, which ``pip install 'moe-compiler[report]'`` brings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compiler.runtime.report import AdaptReport

__all__ = ["write_report"]


def write_report(
    model: Any,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    figures: str | os.PathLike[str] | None = None,
    adaptations: Sequence[AdaptReport] = (),
) -> Path:
    """Writes what is known of a compiled model to one HTML page that needs no other file.

    Args:
        model: a compiled model, or one that was loaded with its analysis. It is only read.
        path: the page, replaced whole or not at all.
        tokenizer: shows the most frequent tokens as text; their ids are shown without it.
        figures: a folder to write the figures to as well, as PNG files; made if it does not exist.
        adaptations: what `model.runtime.adapt` returned; shows the expected error that adapting left.

    Returns:
        The page.

    Raises:
        TypeError: `model` was not compiled, or `adaptations` holds something else than reports.
        ValueError: the model has no analysis, an adaptation is of a model with other MoE blocks, or `figures` is a
            file.
        FileNotFoundError: the folder of `path` does not exist.
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "a report needs matplotlib, which is not installed: pip install 'moe-compiler[report]'"
        ) from error
    from moe_compiler.report.write import write

    return write(model, Path(path), tokenizer, None if figures is None else Path(figures), tuple(adaptations))
