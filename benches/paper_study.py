"""What all experiments of the papers share: one original model, its texts, and the papers' methods as cases."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import paper_published as published
from accuracy_compile import Compiler, Options
from accuracy_data import Texts
from accuracy_rows import Row, RowFile
from accuracy_run import Workbench
from accuracy_suites import ORIGINAL, Case

from moe_compiler.passes.base import NoProgress

SUITE = "paper"
CHANNELS = 0.01  # of all input channels, are switched (DynaMo, V-A)
PAPER_BITS = "codes=2.95"  # what both papers' tables have for OLMoE
RULE = "cluster"

_PLAIN = {"router_tokens": 0}
BITS_READING = (
    "#Bits are code bits: the methods are compiled to `--bits` {bits}; `--bits own` takes what each method's own rule "
    "gives instead. Effective bits count scales, zero points, tables and the pool as well."
)
GPTQ_READING = (
    "GPTQ has groups of 128 and a search for the clipping range; the papers do not say what theirs has, which loses "
    "several times as much as other publications' on the same models. Routers, attention and shared experts stay as "
    "they are with GPTQ; compiled models have shared experts at 8 bits. Rows marked * are evaluated with dequantized "
    "weights."
)
RANDOM_READING = "MoEPTQ-R is a random half of the experts at 4 bits and the rest at 2, which makes 3.0, not 3.26."
SWITCH_READING = (
    f"switching is by rule `{RULE}`: {CHANNELS:.0%} of the channels are cached in the original precision, and on new "
    "data each is requantized to the width of its expert's new cluster; slots that are left over restore other cached "
    "channels to 8 bits. Seen domains are measured as compiled, every new one after switching to other text of it."
)


class Study:
    """The original model and everything it is measured with; experiments share the rows they have in common.

    Attributes:
        model: the original; it is never changed.
        tokenizer: its tokenizer.
        texts: windows by domain.
        options: the command line's.
        name: of the model.
        workbench: measures cases.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Texts, options: argparse.Namespace) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.texts = texts
        self.options = options
        self.name = str(options.model)
        self.workbench = Workbench(
            model, texts, self.compile_options, RowFile(None, texts.domains), say=self._say, progress=NoProgress()
        )

    @property
    def compile_options(self) -> Options:
        """What holds for every compilation."""
        given = self.options
        return Options(given.model, given.dtype, given.window, given.seed, overrides={})

    @property
    def compiler(self) -> Compiler:
        """Compiles copies of the original."""
        return self.workbench.compiler

    @property
    def conditions(self) -> str:
        """The model and the tokens."""
        return f"{self.name}. {self.texts.describe(self.options.window)}"

    def measure(self, cases: Sequence[Case]) -> dict[str, Row]:
        """Rows by name, the original's first.

        Raises:
            RuntimeError: a case could not be measured.
        """
        self.workbench.run([ORIGINAL, *cases])
        wanted = [name for case in (ORIGINAL, *cases) for name in self.row_names(case)]
        rows = {row.name: row for row in self.workbench.file.rows if row.name in wanted}
        failed = [f"{name}: {rows[name].status}" for name in wanted if rows[name].status != "ok"]
        if failed:
            raise RuntimeError("no figures for " + "; ".join(failed))
        return {name: rows[name] for name in wanted}

    def row_names(self, case: Case) -> list[str]:
        """The names of a case's rows; nothing is switched where there are no new domains."""
        return case.row_names() if self.texts.new else [case.name]

    def _say(self, line: str) -> None:
        print(line, flush=True)


def gptq(bits: int) -> Case:
    """GPTQ, every weight at one width."""
    return Case(SUITE, f"GPTQ-{bits}", "uniform", {**_PLAIN, "quantizer": "gptq"}, bits=bits)


def random_half() -> Case:
    """The papers' MoEPTQ-R."""
    overrides = {**_PLAIN, "strategy": "random", "target_bits": None, "pool_fraction": 0.0}
    return Case(SUITE, published.RANDOM, "compiled", overrides)


def dynamo(bits: str, *, pool: bool = True) -> Case:
    """DynaMo: the baseline quantization, and with `pool` the channels to switch."""
    overrides: dict[str, Any] = {"strategy": "dynamo", "pool": "channels", "rule": RULE, "master": "cache"}
    overrides |= {"pool_fraction": CHANNELS, "cache_fraction": CHANNELS} if pool else {"pool_fraction": 0.0}
    name = "DynaMo" if pool else "only baseline quantization"
    return _at(Case(SUITE, name, "compiled", {**_PLAIN, **overrides}, rules=(RULE,) if pool else ()), bits)


def moqa(bits: str) -> Case:
    """MoQa: two groups of experts, and INT8 channels in the upper one, held in a pool."""
    overrides = {**_PLAIN, "strategy": "moqa", "pool": "channels", "pool_fraction": CHANNELS}
    return _at(Case(SUITE, "MoQa", "compiled", overrides), bits)


def by_rounding(case: Case) -> Case:
    """The same widths and buffers, quickly: for what does not depend on how weights are rounded."""
    return replace(case, overrides={**case.overrides, "quantizer": "rtn"})


def on_all(case: Case, domains: Sequence[str]) -> Case:
    """The same, calibrated on all domains."""
    return replace(case, calibrate=tuple(domains))


def _at(case: Case, bits: str) -> Case:
    if bits == "own":
        return replace(case, overrides={**case.overrides, "target_bits": None})
    return replace(case, level=PAPER_BITS if bits == "paper" else bits)
