"""Writes docs/reference.md from the docstrings of the public names: python docs/generate_reference.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "reference.md"
NAMES = (
    "moe_compiler.dynamo_compile",
    "moe_compiler.CompileConfig",
    "moe_compiler.DynamoConfig",
    "moe_compiler.explain",
    "moe_compiler.write_report",
    "moe_compiler.read_texts",
    "moe_compiler.zero_shot",
    "moe_compiler.data.load_samples",
    "moe_compiler.evaluate.perplexity",
    "moe_compiler.runtime.runtime.Runtime",
    "moe_compiler.runtime.profile.Profile",
    "moe_compiler.runtime.report.AdaptReport",
    "moe_compiler.runtime.guard.DriftReport",
    "moe_compiler.coverage.CompileReport",
    "moe_compiler.embedded.load_model",
    "moe_compiler.embedded.load_text",
)
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def reference() -> str:
    """The page."""
    head = (
        "# Reference\n\nThe public names, from their docstrings by `python docs/generate_reference.py`.\n"
        "`model.runtime` is a `Runtime`, `model.moe_report` a `CompileReport`.\n"
    )
    found = [(name, _find(name)) for name in NAMES]
    contents = "\n".join(f"- [`{name}`](#{_anchor(name)})" for name, _ in found)
    return "\n".join([head, contents, "", *(section for name, thing in found for section in _describe(name, thing))])


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def _anchor(name: str) -> str:
    return name.lower().replace(".", "")


def _describe(name: str, thing: Any) -> Iterator[str]:
    yield f"## {name}\n\n{_signature(name.rpartition('.')[2], thing)}\n\n{_body(thing)}\n"
    if inspect.isclass(thing):
        for member, found in vars(thing).items():
            if member.startswith("_") or not getattr(_function(found), "__doc__", None):
                continue
            if isinstance(found, property):
                yield f"### {member}\n\nA property. {_body(found.fget)}\n"
            elif inspect.isfunction(_function(found)):
                yield f"### {member}\n\n{_signature(member, _function(found))}\n\n{_body(_function(found))}\n"


def _function(member: Any) -> Any:
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


def _signature(name: str, thing: Any) -> str:
    """The signature in a block of code, a parameter to a line where it is long; `self` and `cls` are left out."""
    found = inspect.signature(thing)
    parameters = [one for label, one in found.parameters.items() if label not in ("self", "cls")]
    parts: list[str] = []
    star = False
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not star and not any(part.startswith("*") for part in parts):
            parts.append("*")
            star = True
        parts.append(_parameter(one))
    arrow = "" if inspect.isclass(thing) or found.return_annotation is inspect.Signature.empty else "-> "
    returned = f" {arrow}{str(found.return_annotation).strip(chr(39))}" if arrow else ""
    line = f"{name}({', '.join(parts)}){returned}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"
    return f"```\n{line}\n```"


def _parameter(one: inspect.Parameter) -> str:
    stars = "*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else ""
    annotation = one.annotation if isinstance(one.annotation, str) else inspect.formatannotation(one.annotation)
    default = "" if one.default is one.empty else f" = {one.default!r}"
    return f"{stars}{one.name}: {annotation.strip(chr(34))}{default}"


def _body(thing: Any) -> str:
    """A docstring as Markdown: the items of its sections become lists."""
    lines: list[str] = []
    section = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        title = line.rstrip(":")
        if line.endswith(":") and title in _SECTIONS:
            section = title
            lines += [f"**{section}**", ""]
        elif section and line.startswith("    "):
            item = re.match(r"    (\*{0,2}\w+): (.*)", line)
            if item:
                label = item[1].replace("*", r"\*")
                lines.append(f"- {label if section == 'Raises' else f'`{item[1]}`'}: {item[2]}")
            else:
                lines.append("  " + line.strip() if lines[-1].startswith(("- ", "  ")) else line.strip())
        else:
            section = "" if line else section
            lines.append(line)
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip()


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
