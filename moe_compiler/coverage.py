"""What was done to every MoE block and linear of a model: lowered, or left alone and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_compiler.config import CompileConfig
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.linear import PackedLinear
from moe_compiler.passes.plan import PrecisionPlan
from moe_compiler.runtime.adaptation import RuntimeLayer

if TYPE_CHECKING:
    from moe_compiler.analysis import Analysis


@dataclass(frozen=True)
class CoverageEntry:
    """One linear, or one expert linear of all experts together.

    Attributes:
        path: its path in the model.
        kind: `"experts"`, `"shared experts"` or `"other"`.
        lowered: whether it runs as a packed operator now.
        reason: why it was left alone; empty if it was lowered.
        weights: how many weights it stands for.
        size_bytes: bytes of its buffers, channel pool included.
        code_bits: mean width of a code, or the bits of the model's own dtype.
        effective_bits: bits per weight from the buffers' real sizes.
    """

    path: str
    kind: str
    lowered: bool
    reason: str
    weights: int
    size_bytes: int
    code_bits: float
    effective_bits: float


@dataclass(frozen=True)
class CoverageGroup:
    """Linears that are counted together.

    Attributes:
        pattern: the path of the first one with `*` for the layer.
        kind: as in `CoverageEntry`, of the first one.
        outcome: `"lowered"`, or why the first one was left alone.
        linears: how many there are.
        weights: weights in all of them.
        size_bytes: bytes of all of them.
        code_bits: mean over the weights.
    """

    pattern: str
    kind: str
    outcome: str
    linears: int
    weights: int
    size_bytes: int
    code_bits: float

    @property
    def effective_bits(self) -> float:
        """Bits per weight, everything counted."""
        return 8 * self.size_bytes / self.weights


def put_together(entries: Sequence[CoverageEntry]) -> CoverageGroup:
    """Sums up at least one entry."""
    weights = sum(entry.weights for entry in entries)
    return CoverageGroup(
        pattern=_pattern(entries[0].path),
        kind=entries[0].kind,
        outcome=_outcome(entries[0]),
        linears=len(entries),
        weights=weights,
        size_bytes=sum(entry.size_bytes for entry in entries),
        code_bits=sum(entry.code_bits * entry.weights for entry in entries) / weights,
    )


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _outcome(entry: CoverageEntry) -> str:
    return "lowered" if entry.lowered else f"left alone: {entry.reason}"


@dataclass(frozen=True)
class CompileReport:
    """What `dynamo_compile` decided and did; hangs on the model as `model.moe_report`.

    Attributes:
        config: the choices.
        plan: the width of every expert and linear.
        blended: by block path and linear, the experts that saw too few tokens for a Hessian of their own and took
            part of the layer's pooled one.
        coverage: every linear of every MoE block.
        analysis: what was found out about experts and datasets, where it was kept.
        datasets: by name of a calibration dataset, the tokens that were used.
        routers: by block path, how far the routing logits were from the original's on calibration tokens before and
            after the router was refitted, root mean square.
        perplexities: by dataset, that of the original and that of the compiled model, where somebody measured them:
            `model.moe_report = dataclasses.replace(model.moe_report, perplexities=...)` records them.
    """

    config: CompileConfig
    plan: PrecisionPlan
    blended: Mapping[str, Mapping[str, tuple[int, ...]]]
    coverage: tuple[CoverageEntry, ...]
    analysis: Analysis | None = None
    datasets: Mapping[str, int] = field(default_factory=dict)
    routers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    perplexities: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def experts(self) -> CoverageGroup:
        """All linears of the routed experts together."""
        return put_together([entry for entry in self.coverage if entry.kind == "experts"])

    @property
    def code_bits(self) -> float:
        """Mean width of the codes of the routed experts' weights."""
        return self.experts.code_bits

    @property
    def effective_bits(self) -> float:
        """Bits per weight of the routed experts: all their buffers over all their weights."""
        return self.experts.effective_bits

    def of_block(self, path: str) -> list[CoverageEntry]:
        """The entries of one MoE block."""
        return [entry for entry in self.coverage if entry.path == path or entry.path.startswith(path + ".")]

    def groups(self) -> list[CoverageGroup]:
        """The coverage with the layers put together."""
        alike: dict[tuple[str, str, str], list[CoverageEntry]] = {}
        for entry in self.coverage:
            alike.setdefault((_pattern(entry.path), entry.kind, _outcome(entry)), []).append(entry)
        return [put_together(entries) for entries in alike.values()]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, without the analysis, which has a file of its own."""
        return {
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "blended": {
                path: {linear: list(experts) for linear, experts in one.items()} for path, one in self.blended.items()
            },
            "coverage": [asdict(entry) for entry in self.coverage],
            "datasets": dict(self.datasets),
            "routers": {path: list(pair) for path, pair in self.routers.items()},
            "perplexities": {name: list(pair) for name, pair in self.perplexities.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompileReport:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or damaged.
        """
        try:
            return cls(
                config=CompileConfig.from_dict(values["config"]),
                plan=PrecisionPlan.from_dict(values["plan"]),
                blended={
                    path: {linear: tuple(experts) for linear, experts in one.items()}
                    for path, one in values["blended"].items()
                },
                coverage=tuple(CoverageEntry(**entry) for entry in values["coverage"]),
                datasets={name: int(tokens) for name, tokens in values["datasets"].items()},
                routers={path: (float(before), float(after)) for path, (before, after) in values["routers"].items()},
                perplexities={
                    name: (float(original), float(compiled))
                    for name, (original, compiled) in values["perplexities"].items()
                },
            )
        except KeyError as error:
            raise ValueError(f"the report lacks the field {error.args[0]!r}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the report is damaged: {error}") from error


def block_coverage(layer: RuntimeLayer) -> list[CoverageEntry]:
    """Every linear of one lowered MoE block."""
    block = layer.block
    entries = [
        _packed_entry(f"{block.spec.path}.{name}", "experts", packed)
        for name, packed in layer.experts.all_packed().items()
    ]
    for name, packed in layer.experts.shared_packed().items():
        shared = block.shared_linears[0].rpartition(".")[0]
        entries.append(_packed_entry(f"{block.path}.{shared}.{name}", "shared experts", packed))
    for name, module in block.graph.named_modules():
        path = f"{block.path}.{name}"
        if isinstance(module, PackedLinear):
            entries.append(_packed_entry(path, "shared experts", module.packed))
        elif name and not any(module.children()):
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2:
                entries.append(_left_alone(path, weight))
    return entries


def _packed_entry(path: str, kind: str, packed: PackedExpertLinear) -> CoverageEntry:
    return CoverageEntry(
        path=path,
        kind=kind,
        lowered=True,
        reason="",
        weights=packed.num_weights,
        size_bytes=packed.size_bytes,
        code_bits=packed.code_bits,
        effective_bits=packed.effective_bits,
    )


def _left_alone(path: str, weight: nn.Parameter) -> CoverageEntry:
    bits = 8.0 * weight.element_size()
    return CoverageEntry(
        path=path,
        kind="other",
        lowered=False,
        reason="not an expert",
        weights=weight.numel(),
        size_bytes=weight.numel() * weight.element_size(),
        code_bits=bits,
        effective_bits=bits,
    )
