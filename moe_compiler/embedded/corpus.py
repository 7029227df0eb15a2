"""The text of the embedded model: five domains that every Python installation has or can generate.

``code`` is the source of the standard library without docstrings and comments, ``docs`` is its docstrings and
the topics of ``help()``, and the other domains come from `generators`. Nothing else is read.

The split goes by name, never by file order: a module belongs to the evaluation split if the CRC-32 of its
normalized top-level name says so (`pathlib._local` and `pathlib`, `_pydatetime` and `datetime` stay
together). So does a topic. The same modules are therefore held out on every Python version. The topics
share paragraphs; the training split leaves out the paragraphs that a held-out topic has too.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from itertools import islice
from pathlib import Path
from typing import get_args
from zlib import crc32

from moe_compiler.embedded.generators import GENERATED_DOMAINS, Split, generate_documents, held_out

DOMAINS: tuple[str, ...] = ("code", "docs", *GENERATED_DOMAINS)
GENERATED_CHARACTERS = 1_000_000  # what a generated domain has if `max_characters` is not given
SECTION_CHARACTERS = 4_096  # longer modules are cut, so that little text still comes from many modules

# other people's packages, tests and their data, tables, and what later Python versions dropped
_EXCLUDED_FOLDERS = frozenset(
    [
        "__pycache__",
        "__phello__",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
    ]
) | frozenset(["lib-dynload", "msilib", "pydoc_data", "site-packages", "test", "tests", "turtledemo"])
_EXCLUDED_MODULES = frozenset(["antigravity", "this"])


def load_samples(domain: str, split: Split, max_characters: int | None = None) -> list[str]:
    """Load the documents of one domain and split.

    Args:
        domain: one of `DOMAINS`.
        split: "train", or "evaluation" for text that the embedded model never saw.
        max_characters: stop when the documents have so many characters together, the last one cut; None for
            all of it (generated domains: `GENERATED_CHARACTERS`). Only the files that are needed are read.

    Returns:
        Non-empty documents, the same ones at every call.

    Raises:
        ValueError: unknown `domain` or `split`, or `max_characters` below 1.
        RuntimeError: the Python installation has no source of the standard library.
    """
    if domain not in DOMAINS:
        raise ValueError(f"`domain` must be one of {', '.join(DOMAINS)}; got {domain!r}.")
    if split not in get_args(Split):
        raise ValueError(f"`split` must be 'train' or 'evaluation'; got {split!r}.")
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"`max_characters` must be at least 1 or None; got {max_characters}.")
    if domain in GENERATED_DOMAINS:
        documents = generate_documents(domain, split)
        max_characters = GENERATED_CHARACTERS if max_characters is None else max_characters
    else:
        documents = _code(split) if domain == "code" else _docs(split)
    samples: list[str] = []
    room = max_characters
    while room is None or room > 0:
        document = next(documents, None)
        if document is None:
            break
        samples.append(document[:room])
        room = None if room is None else room - len(document)
    return samples


def load_text(domain: str, split: Split, max_characters: int | None = None) -> str:
    """Load one domain and split as one text: the documents of `load_samples`, one after the other.

    Args:
        domain: one of `DOMAINS`.
        split: "train", or "evaluation" for text that the embedded model never saw.
        max_characters: the length of the text, unless the domain has less; None for all of it.

    Returns:
        The text, the same one at every call.

    Raises:
        ValueError: unknown `domain` or `split`, or `max_characters` below 1.
        RuntimeError: the Python installation has no source of the standard library.
    """
    return "".join(load_samples(domain, split, max_characters))


def module_key(module: str) -> str:
    """Give the name that decides the split of a module.

    Args:
        module: dotted name, such as "asyncio.tasks" or "_pydatetime".

    Returns:
        The top-level package without a leading "_py" or "_": modules that moved between Python versions, or
        that are the Python twin of a C module, have the same key.
    """
    top = module.split(".")[0]
    return top.removeprefix("_py").removeprefix("_") or top


def _modules() -> tuple[tuple[str, Path], ...]:
    """List name and path of each module, in an order that mixes packages and is the same everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    modules, folders = [], [root] if root.is_dir() else []
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir() and path.name not in _EXCLUDED_FOLDERS and not path.name.startswith("config-"):
                folders.append(path)
            elif path.suffix == ".py" and path.stem not in _EXCLUDED_MODULES and not path.stem.startswith("_sysconfig"):
                name = ".".join(path.relative_to(root).with_suffix("").parts)
                modules.append((name.removesuffix(".__init__"), path))
    if not modules:
        raise RuntimeError(
            f"The domains 'code' and 'docs' need the source of the standard library, but {root} has no "
            "Python files; use a Python installation that includes them, or a generated domain."
        )
    return tuple(sorted(modules, key=lambda module: (crc32(module[0].encode()), module[0])))


def _chosen_modules(split: Split) -> Iterator[tuple[str, ast.Module]]:
    """Parse the modules of one split, one at a time: source text and syntax tree."""
    for name, path in _modules():
        if held_out(module_key(name)) != (split == "evaluation"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings of the standard library
                yield source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library ships a few files in other encodings


def _sections(texts: Iterator[str]) -> Iterator[str]:
    """Give the first section of each text, then the second of each, and so on."""
    rest: list[str] = []
    for text in texts:
        head, tail = _cut(text)
        yield head
        if tail:
            rest.append(tail)
    if rest:
        yield from _sections(iter(rest))


def _cut(text: str) -> tuple[str, str]:
    """Cut a text at the last line feed within `SECTION_CHARACTERS`."""
    if len(text) <= SECTION_CHARACTERS:
        return text, ""
    end = text.rfind("\n", 0, SECTION_CHARACTERS) + 1 or SECTION_CHARACTERS
    return text[:end], text[end:]


def _code(split: Split) -> Iterator[str]:
    stripped = (strip_documentation(source, tree) for source, tree in _chosen_modules(split))
    return _sections(text for text in stripped if len(text) > 200)


def _documented(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """List the nodes of a module that have a docstring, in the order of their lines."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)]
    return iter(sorted(nodes, key=lambda node: node.body[0].lineno))


def strip_documentation(source: str, tree: ast.Module) -> str:
    """Remove docstrings, comment lines and repeated empty lines from a module.

    Args:
        source: text of the module.
        tree: its syntax tree.

    Returns:
        The code. A body that was only a docstring becomes ``...``; "#" lines within strings stay.
    """
    lines = source.split("\n")  # as `ast` counts them: a form feed ends no line
    removed: set[int] = set()
    for node in _documented(tree):
        docstring = node.body[0]
        first, last = docstring.lineno, docstring.end_lineno or docstring.lineno
        removed.update(range(first, last + 1))
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            if first == node.lineno:  # `def f(): "text"` on one line
                removed.discard(first)
                continue
            lines[first - 1] = " " * docstring.col_offset + "..."
            removed.discard(first)
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr))
    inside = {line for node in strings for line in range(node.lineno + 1, (node.end_lineno or node.lineno) + 1)}
    kept: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.rstrip().expandtabs(8)
        if number in removed or (text.lstrip().startswith("#") and number not in inside):
            continue
        if text or (kept and kept[-1]):
            kept.append(text)
    return "\n".join(kept).strip("\n") + "\n"


def _docs(split: Split) -> Iterator[str]:
    topics, docstrings = _sections(_topics(split)), _sections(_docstrings(split))
    while True:  # one section of a topic, two sections of docstrings
        turn = [*islice(topics, 1), *islice(docstrings, 2)]
        if not turn:
            return
        yield from turn


def _docstrings(split: Split) -> Iterator[str]:
    for _, tree in _chosen_modules(split):
        texts = (cleandoc(ast.get_docstring(node) or "") for node in _documented(tree))
        prose = [text for text in texts if len(text) >= 60]
        if prose:
            yield "\n\n".join(prose) + "\n"


def _topics(split: Split) -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte that only this domain needs

    names = sorted(topics, key=lambda name: (crc32(name.encode()), name))
    withheld = {_words(part) for name in names if held_out(name) for part in topics[name].split("\n\n")}
    for name in names:
        if held_out(name) != (split == "evaluation"):
            continue
        parts = [part.strip("\n").rstrip() for part in topics[name].split("\n\n")]
        if split == "train":
            parts = [part for part in parts if _words(part) not in withheld]
        text = "\n\n".join(part for part in parts if part)
        if text:
            yield text + "\n"


def _words(paragraph: str) -> str:
    """Take the line breaks and indents, which differ between Python versions, out of a paragraph."""
    return " ".join(paragraph.split())
