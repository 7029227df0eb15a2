"""Models and their tokenizers, loaded by name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from moe_compiler.cli.names import model_path
from moe_compiler.cli.parser import UsageError
from moe_compiler.coverage import CompileReport


def load(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """Loads a model and its tokenizer.

    Args:
        name: a folder, a model of the hub, or `embedded`.
        options: what was typed: has `dtype` and `device`.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        UsageError: there is no such dtype or device.
        OSError: there is no such model.
    """
    dtype = _dtype(options.dtype)
    quiet()
    device = device_of(options.device)
    where = {} if device == "cpu" else {"device_map": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=dtype, **where)
        return model.eval(), AutoTokenizer.from_pretrained(model_path(name))
    except OSError as error:
        raise OSError(f"the model {name!r} cannot be loaded: {error}") from error


def load_compiled(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """Loads a compiled model and its tokenizer.

    Raises:
        ValueError: the model was not compiled.
    """
    model, tokenizer = load(name, options)
    if not is_compiled(model):
        raise ValueError(f"`DIR` must be a model that `moe-compiler compile` saved, but {name!r} is an ordinary one")
    return model, tokenizer


def is_compiled(model: Any) -> bool:
    """Whether a model was compiled by `dynamo_compile`."""
    return isinstance(getattr(model, "moe_report", None), CompileReport)


def switch_profile(model: Any, name: str | None) -> None:
    """Puts a profile into a compiled model's pools; does nothing for `None`.

    Args:
        model: the model.
        name: one of its profiles, or a profile's file.

    Raises:
        ValueError: the model has no profiles, or none of that name; or the file is of another model.
    """
    if name is None:
        return
    if not is_compiled(model):
        raise ValueError("`--profile` must be left out where the model was not compiled: it has no profiles")
    if name not in model.runtime.profiles and Path(name).is_file():
        name = model.runtime.load(name).name
    model.runtime.switch(name)


def quiet() -> None:
    """Keeps transformers' progress bars out of files and pipes."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _dtype(name: str) -> Any:
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"`--dtype` must be auto or a floating-point type as bfloat16, but is {name!r}")
    return dtype


def device_of(name: str) -> str:
    """The device that `--device` means.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise UsageError(f"`--device` must be a device as cpu or cuda:0, but is {name!r}") from error
