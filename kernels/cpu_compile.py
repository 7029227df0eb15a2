"""Compiles the CPU kernels' formulas with Inductor, each once per class of shapes, without Dynamo.

A formula is traced with `make_fx` and compiled with `torch._inductor.compile`: no guards, no limit on the number of
classes, and nothing that a caller's `torch.compile`, `torch.compiler.reset` or stance reaches. A call whose weights are
few is not worth the seconds that this takes: see `set_compile_threshold`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

logger = logging.getLogger(__name__)

THRESHOLD_VARIABLE = "MOE_COMPILER_CPU_COMPILE_THRESHOLD"
DEFAULT_THRESHOLD = 1 << 18

_OPTIONS: dict[str, str | bool | int] = {
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    "cpp.dynamic_threads": True,
    "assert_indirect_indexing": False,
    "pick_loop_orders": False,  # loops nest as the formulas say
    # one loop, whatever the number of operations in it
    "realize_opcount_threshold": 100_000,
    "realize_reads_threshold": 1_000,
    "realize_acc_reads_threshold": 1_000,
}

Kernel = Callable[..., Tensor]


class CompilerUnavailableError(RuntimeError):
    """Inductor could not compile for the CPU, most often because there is no C++ compiler."""


class _State:
    """What is compiled so far, shared by all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kernels: dict[Hashable, Kernel] = {}
        self.available = True
        self.threshold: int | None = None


_state = _State()


def set_compile_threshold(weights: int | None) -> None:
    """Sets from how many weights per expert on the CPU kernels are compiled; fewer run as plain PyTorch calls.

    Args:
        weights: a number of weights; `None` takes it from the environment variable
            `MOE_COMPILER_CPU_COMPILE_THRESHOLD` or, without that, is 2**18. A huge number compiles nothing.

    Raises:
        ValueError: `weights` is negative.
    """
    if weights is not None and weights < 0:
        raise ValueError(f"`weights` must be a number of weights, 0 or more, but is {weights}")
    _state.threshold = weights


def compile_threshold() -> int:
    """From how many weights per expert on the kernels are compiled.

    Raises:
        ValueError: the environment variable holds no number.
    """
    if _state.threshold is not None:
        return _state.threshold
    text = os.environ.get(THRESHOLD_VARIABLE, str(DEFAULT_THRESHOLD))
    if not text.isdecimal():
        raise ValueError(f"`{THRESHOLD_VARIABLE}` must be a number of weights, 0 or more, but is {text!r}")
    return int(text)


def is_worth_compiling(weights: int) -> bool:
    """Whether kernels for experts of so many weights are compiled, which they are not without a compiler either."""
    return _state.available and weights >= compile_threshold()


def compiled(
    name: str,
    key: Hashable,
    formula: Kernel,
    arguments: Sequence[Tensor],
    *,
    varying: Sequence[int] = (),
    half_vectors: bool,
) -> Kernel:
    """The compiled form of a formula for one class of shapes; the first call takes seconds.

    Args:
        name: of the kernel, for the log.
        key: the class: whatever the formula's code, shapes, strides and dtypes depend on.
        formula: a function of tensors in PyTorch operations.
        arguments: tensors of this class.
        varying: places of the arguments whose first size varies within the class; those that agree stay equal.
        half_vectors: compile for vectors of 256 bits where the machine has 512.

    Raises:
        CompilerUnavailableError: it could not be compiled. It is logged, and no other kernel is tried from then on.
    """
    key = (name, key)
    kernel = _state.kernels.get(key)
    if kernel is not None:
        return kernel
    with _state.lock:
        if key not in _state.kernels:
            _state.kernels[key] = _compile(name, formula, arguments, varying, half_vectors)
        return _state.kernels[key]


def _compile(
    name: str, formula: Kernel, arguments: Sequence[Tensor], varying: Sequence[int], half_vectors: bool
) -> Kernel:
    shapes = ", ".join("x".join(map(str, argument.shape)) for argument in arguments)
    logger.info("compiling the CPU kernel %s for %s", name, shapes)
    options = dict(_OPTIONS)
    if half_vectors and "AVX512" in torch.backends.cpu.get_cpu_capability():
        options["cpp.simdlen"] = 256
    began = time.perf_counter()
    try:
        if not _state.available:
            raise RuntimeError("an earlier kernel could not be compiled")
        with torch.inference_mode(False), torch.no_grad():
            mode = FakeTensorMode(shape_env=ShapeEnv())
            examples: list[Any] = [_example(mode, argument, at in varying) for at, argument in enumerate(arguments)]
            with mode:
                graph = make_fx(formula)(*examples)
            kernel: Kernel = torch._inductor.compile(graph, examples, options)
    except RuntimeError as error:
        if _state.available:
            _state.available = False
            logger.warning(
                "the CPU kernels cannot be compiled and run as plain PyTorch calls, many times slower: %s",
                str(error).strip().partition("\n")[0],
            )
        raise CompilerUnavailableError(f"the CPU kernel {name} could not be compiled") from error
    logger.info("compiled the CPU kernel %s in %.1f s", name, time.perf_counter() - began)
    return kernel


def _example(mode: FakeTensorMode, argument: Tensor, varies: bool) -> Tensor:
    """An argument without contents for tracing. A first size that varies is a symbol, for which 1 would be special."""
    if varies and argument.shape[0] == 1:
        argument = argument.expand(2, *argument.shape[1:]).contiguous()
    sizes = [DimDynamic.STATIC] * argument.dim()
    if varies:
        sizes[0] = DimDynamic.DUCK
    return mode.from_tensor(argument, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
