"""From a case to a compiled copy of the original model: its configuration, its bits, its seconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accuracy_data import Texts, Windows
from accuracy_suites import Case, target_of

from moe_compiler import CompileConfig, dynamo_compile
from moe_compiler.passes.base import Progress

_PROBE_WINDOWS = 2


@dataclass(frozen=True)
class Options:
    """What holds for every row of a run.

    Attributes:
        model: name of the original model.
        dtype: of its weights.
        window: tokens per window.
        seed: of everything that draws.
        overrides: fields of `CompileConfig` for all cases; a case's own come after them.
        tokens_per_batch: upper bound of the tokens in one forward pass.
    """

    model: str
    dtype: str
    window: int
    seed: int
    overrides: Mapping[str, Any]
    tokens_per_batch: int = 4096


class Compiler:
    """Compiles copies of the original model.

    Attributes:
        model: the original; it is never changed.
        texts: the windows to calibrate on.
        options: what holds for every row.
        progress: shows how far a compilation is.
    """

    def __init__(self, model: Any, texts: Texts, options: Options, progress: Progress) -> None:
        self.model = model
        self.texts = texts
        self.options = options
        self.progress = progress
        self._overheads: dict[str, float] = {}

    def calibration(self, case: Case) -> Windows:
        """What the case is calibrated on."""
        names = self.texts.seen if case.calibrate is None else case.calibrate
        return {name: self.texts.calibration[name] for name in names}

    def compile(self, case: Case) -> tuple[Any, float]:
        """A compiled copy of the original, and the seconds that `dynamo_compile` took."""
        copied = copy.deepcopy(self.model)
        config = self.config(case, case.level)
        torch.manual_seed(self.options.seed)
        start = time.perf_counter()
        dynamo_compile(copied, self.calibration(case), config, progress=self.progress)
        return copied, time.perf_counter() - start

    def config(self, case: Case, level: str | None) -> CompileConfig:
        """The configuration of a case, at the effective bits of a level if one is given."""
        base = {"master": "memory", "sequence_length": self.options.window, "seed": self.options.seed}
        config = CompileConfig().with_overrides(**base | dict(self.options.overrides))
        config = config.with_overrides(**case.overrides)
        if level is None:
            return config
        overhead = self._overhead(config) if level.startswith("codes") else 0.0
        return config.with_overrides(target_bits=target_of(level, overhead, config.group_size))

    def _overhead(self, config: CompileConfig) -> float:
        """Bits per weight besides the codes, from the buffers of a quick compilation at 2 bits."""
        probe = config.with_overrides(strategy="uniform", uniform_bits=2, target_bits=None, quantizer="rtn")
        if probe.to_json() not in self._overheads:
            name, windows = next(iter(self.texts.calibration.items()))
            model = dynamo_compile(
                copy.deepcopy(self.model), {name: windows[:_PROBE_WINDOWS]}, probe, progress=self.progress
            )
            self._overheads[probe.to_json()] = model.moe_report.effective_bits - model.moe_report.code_bits
        return self._overheads[probe.to_json()]
