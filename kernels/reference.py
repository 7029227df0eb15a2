"""The oracles: every operator again in plain PyTorch, written for clarity, in float64 where sums are long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compiler.kernels.activation import gated
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import ALIGNMENT, unpack_expert


def rows_per_input(x: Tensor, expert_ids: Tensor) -> int:
    """How many consecutive rows of the output share one row of `x`: `k` for the first linear, 1 for the second."""
    return max(1, expert_ids.shape[0] // max(1, x.shape[0]))


def expert_linear_reference(
    x: Tensor, expert_ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """`out[r] = W[id_r] · x[r // (R / T)] + b[id_r]`, one row at a time.

    Args:
        x: `(T, K)`, where `T` divides `R`.
        expert_ids: `(R,)` int64; an id of `E` or more gives a row of zeros.
        weight: `(E, N, K)`, or `(E, K, N)` if `transposed`.
        bias: `(E, N)` or `None`.
        transposed: see `weight`.

    Returns:
        `(R, N)` in the dtype of `x`.
    """
    if transposed:
        weight = weight.transpose(1, 2)
    repeat = rows_per_input(x, expert_ids)
    out = torch.zeros(expert_ids.shape[0], weight.shape[1], dtype=torch.float64)
    for row, expert in enumerate(expert_ids.tolist()):
        if expert < weight.shape[0]:
            out[row] = weight[expert].double() @ x[row // repeat].double()
            if bias is not None:
                out[row] += bias[expert].double()
    return out.to(x.dtype)


def packed_expert_linear_reference(
    x: Tensor, expert_ids: Tensor, weight: Sequence[Tensor], bias: Tensor | None, group_size: int
) -> Tensor:
    """The packed form of `expert_linear_reference`; arguments as in `moe_compiler.kernels.ops`."""
    dense = dequantize_reference(PackedTensors(*weight), x.shape[1], group_size)
    return expert_linear_reference(x, expert_ids, dense, bias, transposed=False)


def packed_experts_reference(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_bias: Tensor | None,
    down: Sequence[Tensor],
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
) -> Tensor:
    """All experts of a layer, one token and expert at a time; arguments as in `moe_compiler.kernels.ops`.

    In float64, but the intermediate is rounded to the dtype of `x`, as the operator stores it.
    """
    return packed_experts_hidden_reference(
        x, top_k_index, top_k_weights, gate_up, gate_up_bias, down, down_bias, activation, group_size
    )[0]


def packed_experts_hidden_reference(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_bias: Tensor | None,
    down: Sequence[Tensor],
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """`packed_experts_reference` with the intermediate `(R, I)`, of which another rank's rows are zero."""
    features, top_k = PackedTensors(*gate_up).out_features // 2, top_k_index.shape[1]
    first = dequantize_reference(PackedTensors(*gate_up), x.shape[1], group_size)
    second = dequantize_reference(PackedTensors(*down), features, group_size)
    out = torch.zeros(x.shape, dtype=torch.float64)
    states = x.new_zeros(top_k_index.numel(), features)
    weights = top_k_weights.reshape(-1).tolist()
    for row, expert in enumerate(top_k_index.reshape(-1).tolist()):
        if expert >= first.shape[0]:
            continue
        token = row // top_k
        hidden = first[expert] @ x[token].double()
        if gate_up_bias is not None:
            hidden += gate_up_bias[expert].double()
        states[row] = gated(hidden, activation).to(x.dtype)
        result = second[expert] @ states[row].double()
        if down_bias is not None:
            result += down_bias[expert].double()
        out[token] += weights[row] * result
    return out.to(x.dtype), states


def dequantize_reference(packed: PackedTensors, in_features: int, group_size: int) -> Tensor:
    """Weights of all experts with the pool's corrections, `(E, N, K)` float64."""
    weight = torch.stack(
        [
            dequantize_expert(e, in_features, packed.planes, packed.table, packed.scale, packed.zero_point, group_size)
            for e in range(packed.num_experts)
        ]
    ).double()
    for expert in range(packed.num_experts):
        for slot in range(int(packed.pool_offset[expert]), int(packed.pool_offset[expert + 1])):
            column = packed.pool_value[slot].double() * packed.pool_scale[slot].double()
            index = int(packed.pool_index[slot])
            if index < in_features:
                weight[expert, :, index] += column
            else:
                weight[expert] += torch.outer(column, packed.pool_direction[index - in_features].double())
    return weight


def dequantize_expert(
    expert: int,
    in_features: int,
    planes: Tensor,
    table: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
) -> Tensor:
    """Base weight of one expert, `(N, K)` float32, without the channel pool."""
    num_planes, start = table[expert].tolist()
    codes = unpack_expert(planes, num_planes, start * ALIGNMENT, scale.shape[1], in_features)
    zero = zero_point[expert].float() / 2 ** (8 - 2 * num_planes)
    per_channel = torch.arange(in_features, device=planes.device) // group_size
    weight: Tensor = (codes.float() - zero[:, per_channel]) * scale[expert].float()[:, per_channel]
    return weight


def observe_experts_reference(
    x: Tensor, expert_ids: Tensor, gate: Tensor, token_weight: Tensor, num_experts: int
) -> dict[str, Tensor]:
    """What `observe_experts_` adds to its accumulators, in float64, row by row.

    Args:
        x: `(T, K)` or `(R, K)`.
        expert_ids: `(R,)` int64.
        gate: `(R,)` routing weights `g`.
        token_weight: `(T',)` token weights `w`, `T'` divides `R`.
        num_experts: `E`.
    """
    columns = x.shape[1]
    abs_sum = torch.zeros(num_experts, columns, dtype=torch.float64)
    sq_sum = torch.zeros(num_experts, columns, dtype=torch.float64)
    hessian = torch.zeros(num_experts, columns, columns, dtype=torch.float64)
    repeat = rows_per_input(x, expert_ids)
    token_repeat = rows_per_input(token_weight, expert_ids)
    for row, expert in enumerate(expert_ids.tolist()):
        if expert >= num_experts:
            continue
        value, g, w = (
            x[row // repeat].double(),
            gate[row].double(),
            token_weight[row // token_repeat].double(),
        )
        abs_sum[expert] += w * g * value.abs()
        sq_sum[expert] += w * g**2 * value**2
        hessian[expert] += g**2 * torch.outer(value, value)
    return {"abs_sum": abs_sum, "sq_sum": sq_sum, "hessian": hessian}
