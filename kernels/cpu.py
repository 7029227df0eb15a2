"""The operators in PyTorch calls: one matrix product per expert that was hit.

On the CPU, packed experts of real size take the compiled kernels of `moe_compiler.kernels.cpu_packed` instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels import cpu_native, cpu_packed
from moe_compiler.kernels.activation import gated
from moe_compiler.kernels.cpu_compile import CompilerUnavailableError
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.reference import dequantize_expert, rows_per_input


def rows_by_expert(expert_ids: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yields each expert that was hit with the rows routed to it, `(rows,)` int64. Ids of `E` or more are skipped."""
    order = torch.argsort(expert_ids, stable=True)
    counts = torch.bincount(expert_ids, minlength=num_experts)[:num_experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, order[start : start + count]
        start += count


def expert_linear(x: Tensor, expert_ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """High-precision expert linear; arguments as in `moe_compiler.kernels.ops`."""
    if transposed:
        weight = weight.transpose(1, 2)
    repeat = rows_per_input(x, expert_ids)
    out = x.new_zeros(expert_ids.shape[0], weight.shape[1])
    for expert, rows in rows_by_expert(expert_ids, weight.shape[0]):
        expert_bias = None if bias is None else bias[expert].to(x.dtype)
        out[rows] = F.linear(x[rows // repeat], weight[expert].to(x.dtype), expert_bias)
    return out


def packed_expert_linear(
    x: Tensor, expert_ids: Tensor, weight: Sequence[Tensor], bias: Tensor | None, group_size: int
) -> Tensor:
    """Expert linear over packed weights; arguments as in `moe_compiler.kernels.ops`."""
    packed = PackedTensors(*weight)
    if cpu_packed.has_kernels(x, packed, group_size):
        with contextlib.suppress(CompilerUnavailableError):
            return cpu_packed.packed_expert_linear(x, expert_ids, packed, bias, group_size)
    repeat = rows_per_input(x, expert_ids)
    out = x.new_zeros(expert_ids.shape[0], packed.out_features)
    for expert, rows in rows_by_expert(expert_ids, packed.num_experts):
        expert_bias = None if bias is None else bias[expert].to(x.dtype)
        dense = dequantize(packed, expert, x.shape[1], group_size).to(x.dtype)
        out[rows] = F.linear(x[rows // repeat], dense, expert_bias)
    return out


def packed_experts(
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
    """All experts of a layer over packed weights; arguments as in `moe_compiler.kernels.ops`."""
    first, second = PackedTensors(*gate_up), PackedTensors(*down)
    if cpu_packed.has_kernels(x, first, group_size):
        with contextlib.suppress(CompilerUnavailableError):
            return cpu_packed.packed_experts(
                x, top_k_index, top_k_weights, first, gate_up_bias, second, down_bias, activation, group_size
            )
    return experts_by_linears(
        packed_expert_linear, x, top_k_index, top_k_weights, gate_up, gate_up_bias, down, down_bias, activation,
        group_size,
    )[0]  # fmt: skip


def packed_experts_hidden(
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
    """`packed_experts`, and the hidden states on the way; arguments as in `moe_compiler.kernels.ops`."""
    first, second = PackedTensors(*gate_up), PackedTensors(*down)
    if cpu_packed.has_kernels(x, first, group_size):
        hidden = x.new_zeros(top_k_index.numel(), first.out_features // 2)
        with contextlib.suppress(CompilerUnavailableError):
            out = cpu_packed.packed_experts(
                x, top_k_index, top_k_weights, first, gate_up_bias, second, down_bias, activation, group_size, hidden
            )
            return out, hidden
    return experts_by_linears(
        packed_expert_linear, x, top_k_index, top_k_weights, gate_up, gate_up_bias, down, down_bias, activation,
        group_size,
    )  # fmt: skip


def experts_by_linears(
    linear: Callable[[Tensor, Tensor, Sequence[Tensor], Tensor | None, int], Tensor],
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
    """`packed_experts_hidden` by two calls of `linear`, a `packed_expert_linear`, and PyTorch on any device."""
    expert_ids = top_k_index.reshape(-1)
    hidden = gated(linear(x, expert_ids, gate_up, gate_up_bias, group_size), activation)
    rows = linear(hidden, expert_ids, down, down_bias, group_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    weighted = rows.to(wide) * top_k_weights.reshape(-1, 1).to(wide)
    return weighted.view(*top_k_index.shape, x.shape[1]).sum(dim=1).to(x.dtype), hidden


def dequantize(packed: PackedTensors, expert: int, in_features: int, group_size: int) -> Tensor:
    """Weight of one expert with the pool's corrections, `(N, K)` float32."""
    weight = dequantize_expert(
        expert, in_features, packed.planes, packed.table, packed.scale, packed.zero_point, group_size
    )
    first, last = packed.pool_offset[expert : expert + 2].tolist()
    if last > first:
        delta = packed.pool_value[first:last].float() * packed.pool_scale[first:last].float()[:, None]
        index = packed.pool_index[first:last].long()
        channel = index < in_features
        weight.index_add_(1, index[channel], delta[channel].t())
        directions = packed.pool_direction[index[~channel] - in_features]
        weight.addmm_(delta[~channel].t(), directions.float())
    return weight


def observe_experts_(
    x: Tensor,
    expert_ids: Tensor,
    gate: Tensor,
    token_weight: Tensor,
    abs_sum: Tensor,
    sq_sum: Tensor,
    hessian: Tensor,
) -> None:
    """Adds the statistics of one linear's inputs to its accumulators; as in `moe_compiler.kernels.ops`."""
    repeat = rows_per_input(x, expert_ids)
    token_repeat = rows_per_input(token_weight, expert_ids)
    mass = token_weight.double().repeat_interleave(token_repeat)[: expert_ids.shape[0]] * gate.double()
    first, second = mass.float(), (mass * gate.double()).float()
    native = cpu_native.can_observe(x)
    if native:
        cpu_native.observe(x, expert_ids, first, second, abs_sum, sq_sum)
    if native and not hessian.numel():
        return
    for expert, rows in rows_by_expert(expert_ids, abs_sum.shape[0]):
        values = x[rows // repeat].float()
        if not native:
            abs_sum[expert] += first[rows] @ values.abs()
            sq_sum[expert] += second[rows] @ values.square()
        if hessian.numel():
            weighted = values * gate[rows].float()[:, None]
            hessian[expert].addmm_(weighted.t(), weighted)


def observe_routing_(
    expert_ids: Tensor,
    gate: Tensor,
    token_weight: Tensor,
    top_k: int,
    tokens: Tensor,
    count: Tensor,
    token_mass: Tensor,
    gate_mass: Tensor,
) -> None:
    """Adds what the router did to its accumulators; arguments as in `moe_compiler.kernels.ops`."""
    num_experts = count.shape[0]
    num_tokens = expert_ids.shape[0] // top_k
    per_token = token_weight.double()
    if per_token.numel() == 1:
        per_token = per_token.expand(num_tokens)
    tokens[0] += num_tokens
    tokens[1] += per_token.sum()
    tokens[2] = top_k
    weight = per_token.repeat_interleave(top_k)
    kept = expert_ids < num_experts
    ids, weight = expert_ids[kept], weight[kept]
    count += torch.bincount(ids, minlength=num_experts)
    token_mass.index_add_(0, ids, weight)
    gate_mass.index_add_(0, ids, weight * gate[kept].double())
