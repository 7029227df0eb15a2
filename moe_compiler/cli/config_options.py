"""`CompileConfig` as command-line options: names, types, defaults and help are those of the dataclass itself."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from moe_compiler.cli.parser import UsageError
from moe_compiler.config import CompileConfig

_PREFIX = "config_"


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--config FILE` and an option for every field of `CompileConfig`."""
    group = parser.add_argument_group("options of the compilation (CompileConfig)")
    group.add_argument("--config", metavar="FILE", help="a JSON file with any of the fields below; options override it")
    hints, helps = get_type_hints(CompileConfig), field_helps()
    for field in fields(CompileConfig):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=_PREFIX + field.name,
            type=_reader(hints[field.name], field.name),
            default=argparse.SUPPRESS,
            metavar=_metavar(hints[field.name]),
            help=f"{helps[field.name]} (default: {_shown(field)})".replace("%", "%%"),
        )


def read_config(options: argparse.Namespace) -> CompileConfig:
    """The choices that were typed: the defaults, changed by `--config FILE`, changed by single options.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: it holds no JSON object, or the choices cannot be met.
    """
    values: dict[str, Any] = {}
    if options.config is not None:
        try:
            values = json.loads(Path(options.config).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UsageError(f"`--config` must be a JSON file, but {options.config} is not: {error}") from error
        if not isinstance(values, dict):
            raise UsageError(
                f"`--config` must hold a JSON object, but {options.config} holds a {type(values).__name__}"
            )
    for name, value in vars(options).items():
        if name.startswith(_PREFIX):
            values[name.removeprefix(_PREFIX)] = value
    try:
        return CompileConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def field_helps() -> dict[str, str]:
    """By field, what the docstring of `CompileConfig` says about it."""
    documentation = inspect.cleandoc(CompileConfig.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.split(r"^    (\w+): ", documentation, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()).rstrip(".") for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: of `float | None`, both."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _reader(hint: Any, name: str) -> Callable[[str], Any]:
    """Reads what was typed for a field of the type `hint`."""
    parts = _parts(hint)
    kind = next(part for part in parts if part is not NoneType)

    def read(text: str) -> Any:
        if text.lower() == "none" and NoneType in parts:
            return None
        if kind in (int, float, str):
            return kind(text)
        if kind is bool:
            return _boolean(text)
        if get_origin(kind) is tuple:
            return tuple(get_args(kind)[0](item) for item in text.split(","))
        return json.loads(text)

    read.__name__ = f"{getattr(hint, '__name__', str(hint))} for {name}"
    return read


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"must be true or false, but is {text!r}")
    return text.lower() == "true"


def _metavar(hint: Any) -> str:
    kind = next(part for part in _parts(hint) if part is not NoneType)
    if get_origin(kind) is tuple:
        return "N,N"
    return {str: "NAME", int: "N", float: "X", bool: "true|false"}.get(kind, "JSON")


def _shown(field: Field[Any]) -> str:
    return "none" if field.default is None else str(field.default)
