"""The table of everything that `bench_accuracy.py` measures: one line per case, its options as overrides.

A case gives one row, and one more for each rule that the model is then adapted by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["original", "uniform", "compiled", "redone"]
SUITES = ("quantizers", "allocation", "rules", "single")

LEVELS = ("gptq-3", "gptq-3-0.3", "gptq-2+0.3")
"""Effective bits of the allocations. With groups of 128 a packed base takes more than GPTQ at 2 bits, since tables and
the pool come on top: the lowest level leaves 0.3 bits for them and for wider codes. Groups of 256 reach
`LOWEST_LEVEL`."""
LOWEST_LEVEL = "2.14"
"""What other tools take at 2 bits: a float16 scale and a 2-bit zero point per group of 128."""
POOL_FRACTIONS = (0.005, 0.01, 0.02, 0.04)
RULE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "cluster": {"pool": "channels", "master": "cache"},  # as the paper has it: from cached columns
    "restore": {"pool": "channels", "master": "memory"},
    "compensate": {"pool": "channels", "master": "memory"},
    "lowrank": {"pool": "lowrank", "master": "memory"},
}
"""What each rule needs of the compilation."""
RULES_STRATEGY = "dynamo"
RULES_LEVEL = "codes=2.5"

ALLOCATIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("random", {"strategy": "random"}),
    ("dynamo", {"strategy": "dynamo"}),
    ("pooled", {"strategy": "pooled"}),
    ("moqa", {"strategy": "moqa"}),
    ("budget", {"strategy": "budget", "insurance": 0.0}),
    ("budget, insured", {"strategy": "budget"}),
    ("budget, insured, routers as they were", {"strategy": "budget", "router_tokens": 0}),
)
"""The allocations: name and overrides of `CompileConfig`. A new option is measured by a line here."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        suite: its group.
        name: its name in the group.
        kind: `"original"`; `"uniform"`, every weight at `bits` and dequantized; `"compiled"` by `dynamo_compile`;
            `"redone"`, the widths of a compilation, quantized anew for every new domain and dequantized.
        overrides: fields of `CompileConfig`.
        level: effective bits to compile to, see `target_of`; `None` if the overrides say it.
        bits: width of the kind `"uniform"`.
        rules: the rules to adapt by, one row each; `"auto"` is the configuration's own.
        calibrate: the domains to calibrate on, all seen ones if `None`.
        per_domain: every domain is measured on a model that was calibrated on it alone (kind `"uniform"`).
    """

    suite: str
    name: str
    kind: Kind
    overrides: Mapping[str, Any] = field(default_factory=dict)
    level: str | None = None
    bits: int | None = None
    rules: tuple[str, ...] = ()
    calibrate: tuple[str, ...] | None = None
    per_domain: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """The name of its first row."""
        return self.suite, self.name

    def row_names(self) -> list[str]:
        """The names of all its rows."""
        return [self.name, *(self.adapted_name(rule) for rule in self.rules)]

    def adapted_name(self, rule: str) -> str:
        """The name of the row after adapting by `rule`."""
        return f"{self.name}, {'adapted' if rule == 'auto' else rule}"


ORIGINAL = Case("original", "original", "original")


def build_cases(suites: Sequence[str], domains: Sequence[str], levels: Sequence[str] = LEVELS) -> list[Case]:
    """The cases of some suites in order, with those that they are compared with; none twice.

    Args:
        suites: some of `SUITES`.
        domains: all domains, for the suite `"single"`.
        levels: effective bits of the suite `"allocation"`, see `target_of`.

    Raises:
        ValueError: there is no such suite.
    """
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown or not suites:
        raise ValueError(f"`suite` must be some of {', '.join(SUITES)} or all, but is {', '.join(unknown) or 'empty'}")
    found = [ORIGINAL, *(one for one in _quantizers() if one.name in ("GPTQ-3", "GPTQ-2"))]
    for suite in suites:
        found += {
            "quantizers": _quantizers,
            "allocation": lambda: _allocation(levels),
            "rules": _rules,
            "single": lambda: _single(domains),
        }[suite]()
    return list({case.key: case for case in found}.values())


def _quantizers() -> Iterator[Case]:
    for bits in (2, 3, 4):
        for quantizer in ("rtn", "hqq", "gptq"):
            name = f"{quantizer.upper()}-{bits}"
            yield Case("quantizers", name, "uniform", {"quantizer": quantizer}, bits=bits)


def _allocation(levels: Sequence[str]) -> Iterator[Case]:
    for level in levels:
        for name, overrides in ALLOCATIONS:
            yield Case("allocation", f"{name} @ {level}", "compiled", overrides, level, rules=("auto",))
    two = {"strategy": "uniform", "uniform_bits": 2, "target_bits": None}
    yield Case("allocation", "2 bits and pool", "compiled", two, rules=("auto",))
    wide = {"strategy": "budget", "group_size": 256, "pool_fraction": 0.0055}
    yield Case("allocation", f"groups of 256 @ {LOWEST_LEVEL}", "compiled", wide, LOWEST_LEVEL, rules=("auto",))


def _rules() -> Iterator[Case]:
    base = {"strategy": RULES_STRATEGY}
    yield Case("rules", "no pool", "compiled", {**base, "pool": "channels", "pool_fraction": 0.0}, RULES_LEVEL)
    yield Case("rules", "redone", "redone", {**base, "pool": "channels", "pool_fraction": 0.0}, RULES_LEVEL)
    for fraction in POOL_FRACTIONS:
        groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for rule, options in RULE_OPTIONS.items():
            groups.setdefault(tuple(options.items()), []).append(rule)
        for key, rules in groups.items():
            overrides = {**base, **dict(key), "pool_fraction": fraction}
            name = f"{overrides['pool']}, {overrides['master']}, pool {100 * fraction:g} %"
            yield Case("rules", name, "compiled", overrides, RULES_LEVEL, rules=tuple(rules))


def _single(domains: Sequence[str]) -> Iterator[Case]:
    yield next(case for case in _allocation(("gptq-3",)) if case.name == "dynamo @ gptq-3")
    for domain in domains:
        overrides = {"strategy": "dynamo"}
        yield Case("single", f"dynamo on {domain} alone", "compiled", overrides, "gptq-3", calibrate=(domain,))
    for bits in (3, 2):
        yield Case("single", f"GPTQ-{bits} redone", "uniform", {"quantizer": "gptq"}, bits=bits, per_domain=True)


def target_of(level: str, overhead_bits: float, group_size: int) -> float:
    """The effective bits that a level stands for.

    Args:
        level: `"gptq-B"`, what a packing of uniform `B`-bit codes takes with a float16 scale and a byte zero point per
            group, with `+x` or `-x` bits; `"codes=x"`, `x` bits for the codes and whatever the rest takes; or a number.
        overhead_bits: bits per weight that a packed base takes besides its codes, the pool included.
        group_size: input channels that share a scale.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"gptq-(\d)([+-]\d*\.?\d+)?|codes=(\d*\.?\d+)|(\d*\.?\d+)", level)
    if found is None:
        raise ValueError(f"a level must be like gptq-3, gptq-3-0.3, codes=2.5 or 3.05, but is {level!r}")
    bits, change, codes, number = found.groups()
    if bits is not None:
        return int(bits) + 24 / group_size + float(change or 0)
    return float(codes) + overhead_bits if codes is not None else float(number)
