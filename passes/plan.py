"""What an allocation decides: the bits of every expert linear of a model, as a record that is kept as JSON.

"Code bits" are the bits of the codes alone; "effective bits" add what every weight pays besides (scales, zero
points, tables, channel pool). Averages are over weights, so that a large linear counts for more than a small
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PACKED_WIDTHS = (2, 4, 6, 8)  # the widths that can be packed and served
PLAN_WIDTHS = (2, 3, 4, 6, 8)  # 3 only in baselines that are evaluated with dequantized weights
FORMAT_VERSION = 1

Note = str | int | float | tuple[float, ...]
Option = str | int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class LayerPlan:
    """The bits of one MoE block.

    Attributes:
        path: the block's module path in the model.
        bits: by linear, the width of each of the `E` experts.
        shapes: by linear, `(N, K)`.
        overhead_bits: by linear, the bits per weight besides the codes.
        clusters: the cluster of each expert, 0 for the least significant, where the strategy made clusters.
        channels: by linear, for each expert the number of input channels to be kept at INT8 in the channel
            pool, where the strategy asks for them.
        notes: what the strategy found out on the way, for reports.
    """

    path: str
    bits: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, int]]
    overhead_bits: Mapping[str, float]
    clusters: tuple[int, ...] | None = None
    channels: Mapping[str, tuple[int, ...]] | None = None
    notes: Mapping[str, Note] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.bits.keys()
        if not names or self.shapes.keys() != names or self.overhead_bits.keys() != names:
            raise ValueError(
                f"`bits`, `shapes` and `overhead_bits` of layer {self.path!r} must name the same linears, "
                f"got {sorted(names)}, {sorted(self.shapes)} and {sorted(self.overhead_bits)}"
            )
        per_expert = [*self.bits.values(), *(self.channels or {}).values()]
        if self.clusters is not None:
            per_expert.append(self.clusters)
        if len({len(values) for values in per_expert}) != 1 or not per_expert[0]:
            raise ValueError(
                f"layer {self.path!r} must have one entry per expert everywhere, got lengths "
                f"{[len(values) for values in per_expert]}"
            )
        wrong = sorted({width for widths in self.bits.values() for width in widths} - set(PLAN_WIDTHS))
        if wrong:
            raise ValueError(f"`bits` of layer {self.path!r} must be among {PLAN_WIDTHS}, got {wrong}")

    @property
    def num_experts(self) -> int:
        """The number of experts `E`."""
        return len(next(iter(self.bits.values())))

    @property
    def num_weights(self) -> int:
        """The number of weights of all expert linears."""
        return self.num_experts * sum(N * K for N, K in self.shapes.values())

    @property
    def total_code_bits(self) -> int:
        """The bits of all codes."""
        return sum(sum(widths) * self.shapes[name][0] * self.shapes[name][1] for name, widths in self.bits.items())

    @property
    def code_bits(self) -> float:
        """Code bits per weight."""
        return self.total_code_bits / self.num_weights

    @property
    def mean_overhead_bits(self) -> float:
        """Bits per weight besides the codes."""
        total = sum(self.overhead_bits[name] * N * K for name, (N, K) in self.shapes.items())
        return total / sum(N * K for N, K in self.shapes.values())

    @property
    def effective_bits(self) -> float:
        """Effective bits per weight."""
        return self.code_bits + self.mean_overhead_bits

    def to_dict(self) -> dict[str, Any]:
        """Write the layer as JSON types."""
        return {
            "path": self.path,
            "bits": {name: list(widths) for name, widths in self.bits.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "overhead_bits": dict(self.overhead_bits),
            "clusters": None if self.clusters is None else list(self.clusters),
            "channels": None if self.channels is None else {k: list(v) for k, v in self.channels.items()},
            "notes": {name: list(n) if isinstance(n, tuple) else n for name, n in self.notes.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerPlan:
        """Read the layer that `to_dict` wrote."""
        channels = data["channels"]
        return cls(
            path=data["path"],
            bits={name: tuple(widths) for name, widths in data["bits"].items()},
            shapes={name: (N, K) for name, (N, K) in data["shapes"].items()},
            overhead_bits=dict(data["overhead_bits"]),
            clusters=None if data["clusters"] is None else tuple(data["clusters"]),
            channels=None if channels is None else {name: tuple(n) for name, n in channels.items()},
            notes={name: tuple(n) if isinstance(n, list) else n for name, n in data["notes"].items()},
        )


@dataclass(frozen=True)
class PrecisionPlan:
    """The bits of every MoE block of a model, and how they came about.

    Attributes:
        strategy: the allocation strategy.
        layers: by module path, in the model's order.
        target_bits: the effective bits per weight that were asked for, if any.
        options: the strategy's other options, by name.
    """

    strategy: str
    layers: Mapping[str, LayerPlan]
    target_bits: float | None = None
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("`layers` must hold at least one MoE block, got none")

    @property
    def num_weights(self) -> int:
        """The number of weights of all expert linears."""
        return sum(layer.num_weights for layer in self.layers.values())

    @property
    def code_bits(self) -> float:
        """Code bits per weight over the model."""
        return sum(layer.total_code_bits for layer in self.layers.values()) / self.num_weights

    @property
    def effective_bits(self) -> float:
        """Effective bits per weight over the model."""
        overhead = sum(layer.mean_overhead_bits * layer.num_weights for layer in self.layers.values())
        return self.code_bits + overhead / self.num_weights

    @property
    def is_packable(self) -> bool:
        """Whether every width can be packed; 3 bits are for evaluation with dequantized weights only."""
        return set(self.histogram()) <= set(PACKED_WIDTHS)

    def histogram(self) -> dict[int, float]:
        """Return the share of the weights at each width that occurs, by ascending width."""
        weights: dict[int, int] = {}
        for layer in self.layers.values():
            for name, widths in layer.bits.items():
                N, K = layer.shapes[name]
                for width in widths:
                    weights[width] = weights.get(width, 0) + N * K
        return {width: weights[width] / self.num_weights for width in sorted(weights)}

    def to_dict(self) -> dict[str, Any]:
        """Write the plan as JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "strategy": self.strategy,
            "target_bits": self.target_bits,
            "options": {name: list(o) if isinstance(o, tuple) else o for name, o in self.options.items()},
            "layers": [layer.to_dict() for layer in self.layers.values()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrecisionPlan:
        """Read the plan that `to_dict` wrote.

        Raises:
            ValueError: if the format version is unknown, a field is missing, or the layers are inconsistent.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"`format_version` of a precision plan must be {FORMAT_VERSION}, got {version!r}")
        try:
            layers = [LayerPlan.from_dict(layer) for layer in data["layers"]]
            return cls(
                strategy=data["strategy"],
                layers={layer.path: layer for layer in layers},
                target_bits=data["target_bits"],
                options={n: tuple(o) if isinstance(o, list) else o for n, o in data["options"].items()},
            )
        except KeyError as error:
            raise ValueError(f"the precision plan lacks the field {error.args[0]!r}") from error
