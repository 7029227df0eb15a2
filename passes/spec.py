"""The normalised description of the experts of one MoE layer, whatever form the model keeps them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Projection:
    """One linear of all experts together.

    Attributes:
        name: `"gate_up_proj"`, `"up_proj"` or `"down_proj"`: the attribute that holds its weight, where one
            does.
        out_features: output features `N`; for `gate_up_proj` gate and up together.
        in_features: input features `K`.
        bias: the name of its bias `(E, N)`, or `None`.
    """

    name: str
    out_features: int
    in_features: int
    bias: str | None


@dataclass(frozen=True)
class ExpertsSpec:
    """What the experts of one MoE layer compute: up, activation or gate, down, routing weights, sum.

    Attributes:
        path: module path of the experts in the model.
        kind: where the description comes from. `"interface"`: the flags that transformers'
            `use_experts_implementation` sets. `"structural"`: stacked weights and a forward of the same
            contract. `"list"`: an `nn.ModuleList` of MLPs with a dispatch method.
        num_experts: `E`.
        hidden_size: `H`, the features of a token as the experts see it (a latent size where the block
            projects first).
        intermediate_size: `I`, the input features of `down_proj`.
        has_gate: whether the first linear is `gate_up_proj` (otherwise `up_proj`).
        has_bias: whether both linears have a bias.
        is_transposed: whether weights are stored `(E, K, N)` rather than `(E, N, K)`.
        is_concatenated: whether rows of `gate_up_proj` are all gates, then all ups (otherwise gate and up
            alternate).
        has_post_norm: whether each expert's output is normalised before the routing weight.
        projections: the first and the second linear.
    """

    path: str
    kind: Literal["interface", "structural", "list"]
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_norm: bool
    projections: tuple[Projection, Projection]

    def projection(self, name: str) -> Projection:
        """Return the linear called `name`.

        Raises:
            ValueError: there is none.
        """
        for one in self.projections:
            if one.name == name:
                return one
        known = " and ".join(one.name for one in self.projections)
        raise ValueError(f"`name` must be one of the linears {known} of experts `{self.path}`, but is {name!r}")


def make_spec(
    path: str,
    kind: Literal["interface", "structural", "list"],
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    *,
    has_gate: bool = True,
    has_bias: bool = False,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    has_post_norm: bool = False,
) -> ExpertsSpec:
    """Describe experts from the shapes of their two weights, as `(E, N, K)`.

    Raises:
        ValueError: the shapes do not belong to two linears of the same experts, one after the other.
    """
    experts, width, hidden = first
    intermediate = width // 2 if has_gate else width
    name = "gate_up_proj" if has_gate else "up_proj"
    if second[0] != experts:
        raise ValueError(
            f"{name} holds {experts} experts, down_proj {second[0]}: the experts of one layer must all have "
            "the same form"
        )
    if second != (experts, hidden, intermediate) or (has_gate and width % 2):
        raise ValueError(
            f"{name} {first} and down_proj {second} as (E, N, K) do not fit each other: down_proj should be "
            f"{(experts, hidden, intermediate)}"
        )
    return ExpertsSpec(
        path=path,
        kind=kind,
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        has_post_norm=has_post_norm,
        projections=(
            Projection(name, width, hidden, f"{name}_bias" if has_bias else None),
            Projection("down_proj", hidden, intermediate, "down_proj_bias" if has_bias else None),
        ),
    )
