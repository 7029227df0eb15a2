"""The zero-shot tasks of `moe_compiler.zero_shot` from local files, as their publishers distribute them.

Prompts, choices and metrics stay lm-eval's own: a task here only says where its files are and what their columns mean.
"""

from moe_compiler.tasks.files import LocalDocuments, find_folder, load_local
from moe_compiler.tasks.formats import FORMATS

__all__ = ["FORMATS", "LocalDocuments", "find_folder", "load_local"]
