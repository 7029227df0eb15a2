"""Measures the cases of `accuracy_suites`, one after the other, and appends a row to the file for each."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accuracy_compile import Compiler, Options
from accuracy_data import Texts, Windows
from accuracy_redone import quantize_at_widths
from accuracy_rows import ORIGINAL, Row, RowFile
from accuracy_suites import Case
from accuracy_windows import window_losses

from moe_compiler.baseline import uniform_baseline
from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.plan import PrecisionPlan

TOOL = f"moe_compiler {importlib.metadata.version('moe-compiler')}"
REDONE = ("rules", "redone")
_CONDITIONS = ("model", "settings", "calibration_tokens", "adapt_tokens", "window", "seed", "seen", "new")


class Workbench:
    """Compiles a copy of the original model per case, and evaluates it on the same windows.

    Attributes:
        model: the original; it is never changed.
        texts: the windows.
        options: what holds for every row.
        file: where the rows go.
    """

    def __init__(
        self,
        model: Any,
        texts: Texts,
        options: Options,
        file: RowFile,
        *,
        say: Callable[[str], None] = print,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.texts = texts
        self.options = options
        self.file = file
        self.say = say
        self.progress = progress or NoProgress()
        self.compiler = Compiler(model, texts, options, self.progress)
        self.failed = 0
        self._plans: dict[str, PrecisionPlan] = {}

    def run(self, cases: Sequence[Case]) -> int:
        """Measures what the file does not have yet.

        Returns:
            How many rows failed; each is in the file with the reason.

        Raises:
            ValueError: a row in the file was measured with other options.
        """
        for case in cases:
            self._check_kept(case)
        for number, case in enumerate(cases, 1):
            names = case.row_names() if self.texts.new else [case.name]
            missing = [name for name in names if not self.file.has(case.suite, name)]
            if missing:
                self.say(f"[{number}/{len(cases)}] {case.suite}: {case.name}")
                self._measure(case, missing)
                gc.collect()  # graphs and modules refer to each other
        return self.failed

    def _check_kept(self, case: Case) -> None:
        blank = self._blank(case, case.name)
        for row in self.file.rows:
            if row.suite == case.suite and row.name in case.row_names() and row.status == "ok":
                wanted = replace(blank, adapt_tokens=row.adapt_tokens and self._adapt_tokens())
                for name in _CONDITIONS:
                    kept, new = (json.loads(json.dumps(getattr(one, name))) for one in (row, wanted))
                    if kept != new:
                        raise ValueError(
                            f"`{self.file.path}` cannot be resumed, `{name}` of its row {row.name!r} is {kept} and "
                            f"would be {new} now: take another file, or begin anew"
                        )

    def _measure(self, case: Case, missing: Sequence[str]) -> None:
        try:
            for row in self._rows(case, missing):
                self.file.append(row)
                self.say("    " + self._line(row))
        except (ValueError, RuntimeError, FloatingPointError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            for name in missing:
                if not self.file.has(case.suite, name):
                    self.failed += 1
                    self.file.append(replace(self._blank(case, name), status=reason[:300]))
                    self.say(f"    {name}: FAILED: {reason}")

    def _rows(self, case: Case, missing: Sequence[str]) -> Iterator[Row]:
        if case.kind == "original":
            yield self._original(case)
        elif case.kind == "uniform":
            yield self._uniform(case)
        elif case.kind == "redone":
            yield self._redone(case)
        else:
            yield from self._compiled(case, missing)

    def _original(self, case: Case) -> Row:
        bits = 8 * next(self.model.parameters()).element_size()
        weights = sum(p.numel() for name, p in self.model.named_parameters() if ".experts." in name)
        return replace(
            self._blank(case, ORIGINAL),
            code_bits=bits,
            effective_bits=bits,
            size_bytes=weights * bits // 8,
            nll=self._evaluate(self.model, self.texts.domains),
        )

    def _uniform(self, case: Case) -> Row:
        assert case.bits is not None
        config = self.compiler.config(case, None)
        runs: dict[tuple[str, ...], Windows]
        if case.per_domain:
            runs = {(domain,): {domain: self.texts.calibration[domain]} for domain in self.texts.domains}
        else:
            runs = {self.texts.domains: self.compiler.calibration(case)}
        nll: dict[str, list[float]] = {}
        seconds = 0.0
        for domains, data in runs.items():
            start = time.perf_counter()
            found = uniform_baseline(self.model, data, case.bits, config, progress=self.progress)
            seconds += (time.perf_counter() - start) / len(runs)
            nll |= self._evaluate(found.model, domains)
        return replace(
            self._blank(case, case.name),
            bits_source="formula",
            code_bits=found.code_bits,
            effective_bits=found.effective_bits,
            size_bytes=found.size_bytes,
            compile_s=seconds,
            adapted=case.per_domain,
            note="every domain from a model calibrated on it alone" if case.per_domain else "",
            nll=nll,
        )

    def _compiled(self, case: Case, missing: Sequence[str]) -> Iterator[Row]:
        model, seconds = self.compiler.compile(case)
        report = model.moe_report
        self._remember(case, report.plan)
        row = replace(
            self._blank(case, case.name),
            code_bits=report.code_bits,
            effective_bits=report.effective_bits,
            size_bytes=sum(entry.size_bytes for entry in report.coverage if entry.kind == "experts"),
            compile_s=seconds,
            nll=self._evaluate(model, self.texts.domains),
        )
        if case.name in missing:
            yield row
        for rule in case.rules:
            if case.adapted_name(rule) in missing:
                yield self._adapted(case, row, model, rule)

    def _adapted(self, case: Case, row: Row, model: Any, rule: str) -> Row:
        nll, seconds = dict(row.nll), 0.0
        for domain in self.texts.new:
            start = time.perf_counter()
            model.runtime.adapt(self.texts.adaptation[domain], name=domain, rule=None if rule == "auto" else rule)
            seconds += (time.perf_counter() - start) / len(self.texts.new)
            nll |= self._evaluate(model, [domain])
            model.runtime.revert()
            model.runtime.remove(domain)
        adapted = replace(row, name=case.adapted_name(rule), adapted=True, adapt_s=seconds, nll=nll)
        return replace(adapted, adapt_tokens=self._adapt_tokens(), recovered=self._recovered(case, row, adapted))

    def _recovered(self, case: Case, before: Row, after: Row) -> float | None:
        redone = next((one for one in self.file.rows if one.key == REDONE and one.nll), None)
        if redone is None or case.suite != REDONE[0]:
            return None
        gap, won = (before.loss(other, "new") for other in (redone, after))
        return None if gap is None or won is None or gap.mean <= 0 else won.mean / gap.mean

    def _redone(self, case: Case) -> Row:
        key = self._plan_key(case)
        if key not in self._plans:
            self._remember(case, self.compiler.compile(case)[0].moe_report.plan)
        plan, config, seconds = self._plans[key], self.compiler.config(case, None), 0.0
        seen = quantize_at_widths(self.model, self.compiler.calibration(case), plan, config, self.progress)
        nll = self._evaluate(seen, self.texts.seen)
        for domain in self.texts.new:
            start = time.perf_counter()
            model = quantize_at_widths(self.model, {domain: self.texts.adaptation[domain]}, plan, config, self.progress)
            seconds += (time.perf_counter() - start) / len(self.texts.new)
            nll |= self._evaluate(model, [domain])
        weights = plan.num_weights
        effective = plan.code_bits + 24 / config.group_size
        return replace(
            self._blank(case, case.name),
            bits_source="formula",
            code_bits=plan.code_bits,
            effective_bits=effective,
            size_bytes=round(weights * effective / 8),
            adapted=True,
            adapt_s=seconds,
            adapt_tokens=self._adapt_tokens(),
            note="GPTQ again for every new domain, at the widths of 'no pool'",
            nll=nll,
        )

    def _remember(self, case: Case, plan: PrecisionPlan) -> None:
        self._plans[self._plan_key(case)] = plan

    def _plan_key(self, case: Case) -> str:
        return json.dumps([dict(case.overrides), case.level, case.calibrate], sort_keys=True)

    def _evaluate(self, model: Any, domains: Sequence[str]) -> dict[str, list[float]]:
        found = {}
        for domain in domains:
            windows = self.texts.evaluation[domain]
            with self.progress.task(f"evaluating on {domain}", 1) as advance:
                losses = window_losses(model, windows, tokens_per_batch=self.options.tokens_per_batch)
                advance()
            found[domain] = [round(value, 4) for value in losses.tolist()]
        return found

    def _blank(self, case: Case, name: str) -> Row:
        """A row without figures."""
        options, calibrated = self.options, self.compiler.calibration(case)
        overrides = {} if case.kind == "original" else {**options.overrides, **case.overrides}
        settings: dict[str, Any] = {"dtype": options.dtype, **overrides}
        for key, value in (("level", case.level), ("bits", case.bits), ("calibrated_on", case.calibrate)):
            if value is not None:
                settings[key] = list(value) if isinstance(value, tuple) else value
        return Row(
            suite=case.suite,
            name=name,
            model=options.model,
            tool=TOOL,
            calibration_tokens=0 if case.kind == "original" else max(map(self._tokens, calibrated.values())),
            window=options.window,
            seed=options.seed,
            seen=self.texts.seen,
            new=self.texts.new,
            settings=settings,
        )

    def _tokens(self, windows: Sequence[torch.Tensor]) -> int:
        return len(windows) * self.options.window

    def _adapt_tokens(self) -> int:
        return max(map(self._tokens, self.texts.adaptation.values()), default=0)

    def _line(self, row: Row) -> str:
        original = row if row.name == ORIGINAL else self.file.original
        parts = [f"{row.name}: {row.code_bits:.2f} code bits, {row.effective_bits:.2f} effective"]
        for kind in ("seen", "new"):
            loss = None if original is None else row.loss(original, kind)
            parts += [] if loss is None else [f"loss {kind} {loss}"]
        for name, seconds in (("compiled", row.compile_s), ("adapted", row.adapt_s)):
            parts += [] if seconds is None else [f"{name} in {seconds:.1f} s"]
        return ", ".join(parts)
