"""The packed operators on the CPU: few rows of an expert take a fused kernel, many dequantize its weight first.

The kernels are native code where the CPU has the instructions for it (`moe_compiler.kernels.cpu_native`), else formulas
compiled by Inductor (`moe_compiler.kernels.cpu_gemv`, `moe_compiler.kernels.cpu_dequantize`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compiler.kernels import cpu_native
from moe_compiler.kernels.activation import ACTIVATIONS, gated
from moe_compiler.kernels.cpu_compile import is_worth_compiling
from moe_compiler.kernels.cpu_dequantize import dense_linear
from moe_compiler.kernels.cpu_gemv import RowBlock, gemv, row_blocks
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import TILE
from moe_compiler.kernels.reference import rows_per_input

MAX_FEW_ROWS = 8
"""Rows of one expert up to which unpacking for each block of rows beats dequantizing once."""

MAX_FEW_ROWS_NATIVE = 32
"""The same for the native kernels."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALL_GROUPS = (16, 32, 64)


def has_kernels(x: Tensor, packed: PackedTensors, group_size: int) -> bool:
    """Whether the compiled kernels serve a call: on the CPU, for weights that are worth compiling for."""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and (group_size in _SMALL_GROUPS or group_size % TILE == 0)
        and (cpu_native.serves(x, group_size) or is_worth_compiling(packed.out_features * x.shape[-1]))
    )


@dataclass(frozen=True)
class RowPlan:
    """Which rows of a batch are computed together.

    Attributes:
        blocks: blocks of rows of experts with few.
        rows: `(R',)` int64, the rows of the blocks; a block's last row is repeated where it has too few.
        once: `(≤ R',)` int64, the places in `rows` that are no repetition.
        many: the experts with many rows, and their rows.
    """

    blocks: tuple[RowBlock, ...]
    rows: Tensor
    once: Tensor
    many: tuple[tuple[int, Tensor], ...]


def plan_rows(expert_ids: Tensor, num_experts: int) -> RowPlan:
    """Sorts rows by expert and cuts them into blocks; ids of `num_experts` or more are in none."""
    order = torch.argsort(expert_ids, stable=True)
    blocks: list[RowBlock] = []
    many: list[tuple[int, Tensor]] = []
    places: list[int] = []
    once: list[int] = []
    start = 0
    for expert, count in enumerate(torch.bincount(expert_ids, minlength=num_experts)[:num_experts].tolist()):
        if count > MAX_FEW_ROWS:
            many.append((expert, order[start : start + count]))
        elif count:
            sizes = row_blocks(count)
            blocks += [RowBlock(expert, rows) for rows in sizes]
            once += range(len(places), len(places) + count)
            places += [start + min(row, count - 1) for row in range(sum(sizes))]
        start += count
    return RowPlan(tuple(blocks), order[places], torch.tensor(once, dtype=torch.int64), tuple(many))


def split_rows(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, tuple[tuple[int, Tensor], ...]]:
    """Takes the experts with more rows than the native kernels take out.

    Args:
        expert_ids: `(R,)` int64.
        num_experts: `E`.

    Returns:
        The ids, with `E` in the place of those experts', and those experts with their rows.
    """
    if expert_ids.shape[0] <= MAX_FEW_ROWS_NATIVE:
        return expert_ids, ()
    counts = torch.bincount(expert_ids, minlength=num_experts)[:num_experts]
    if int(counts.max()) <= MAX_FEW_ROWS_NATIVE:
        return expert_ids, ()
    order = torch.argsort(expert_ids, stable=True)
    starts = (counts.cumsum(0) - counts).tolist()
    many = tuple(
        (expert, order[starts[expert] : starts[expert] + count])
        for expert, count in enumerate(counts.tolist())
        if count > MAX_FEW_ROWS_NATIVE
    )
    few = expert_ids.clone()
    few[torch.cat([rows for _, rows in many])] = num_experts
    return few, many


def packed_expert_linear(
    x: Tensor, expert_ids: Tensor, packed: PackedTensors, bias: Tensor | None, group_size: int
) -> Tensor:
    """Expert linear over packed weights; arguments as in `moe_compiler.kernels.ops`.

    Raises:
        CompilerUnavailableError: a kernel could not be compiled.
    """
    repeat = rows_per_input(x, expert_ids)
    if cpu_native.serves(x, group_size):
        few, many = split_rows(expert_ids, packed.num_experts)
        out = cpu_native.expert_linear(x, few, packed, bias, group_size).to(x.dtype)
    else:
        plan = plan_rows(expert_ids, packed.num_experts)
        many = plan.many
        out = x.new_zeros(expert_ids.shape[0], packed.out_features)
        if plan.blocks:
            out[plan.rows] = _few(packed, plan.blocks, x[plan.rows // repeat], bias, group_size).to(x.dtype)
    for expert, rows in many:
        out[rows] = _many(packed, expert, x[rows // repeat], bias, group_size).to(x.dtype)
    return out


def packed_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: PackedTensors,
    gate_up_bias: Tensor | None,
    down: PackedTensors,
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
    hidden: Tensor | None = None,
) -> Tensor:
    """All experts of a layer over packed weights; arguments as in `moe_compiler.kernels.ops`.

    `hidden`, `(R, I)` in the dtype of `x`, contiguous, is where hidden states are put, but those of ids of `E` or more.

    Raises:
        CompilerUnavailableError: a kernel could not be compiled.
        ValueError: `activation` is not one that the operators know.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, but is {activation!r}")
    top_k = top_k_index.shape[1]
    expert_ids = top_k_index.reshape(-1)
    if cpu_native.serves(x, group_size):
        few, many = split_rows(expert_ids, gate_up.num_experts)
        out = cpu_native.experts(
            x, few.view(-1, top_k), top_k_weights, gate_up, gate_up_bias, down, down_bias, activation, group_size,
            torch.float32 if many else x.dtype, hidden,
        )  # fmt: skip
        if not many:
            return out
        if cpu_native.serves_many(x, group_size):
            cpu_native.add_experts(
                out, many, x, top_k_weights, gate_up, gate_up_bias, down, down_bias, activation, group_size, hidden
            )
            return out.to(x.dtype)
        weights = top_k_weights.reshape(-1, 1).float()
    else:
        weights = top_k_weights.reshape(-1, 1).float()
        plan = plan_rows(expert_ids, gate_up.num_experts)
        many = plan.many
        out = torch.zeros(x.shape, dtype=torch.float32)
        if plan.blocks:
            rows = plan.rows[plan.once]
            gate_and_up = _few(gate_up, plan.blocks, x[plan.rows // top_k], gate_up_bias, group_size)
            states = gated(gate_and_up, activation).to(x.dtype)
            if hidden is not None:
                hidden[rows] = states[plan.once]
            result = _few(down, plan.blocks, states, down_bias, group_size)
            out.index_add_(0, rows // top_k, result[plan.once] * weights[rows])
    for expert, rows in many:
        states = gated(_many(gate_up, expert, x[rows // top_k], gate_up_bias, group_size), activation)
        if hidden is not None:
            hidden[rows] = states.to(x.dtype)
        result = _many(down, expert, states, down_bias, group_size)
        out.index_add_(0, rows // top_k, result * weights[rows])
    return out.to(x.dtype)


def _few(
    packed: PackedTensors, blocks: tuple[RowBlock, ...], x: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """Experts' linears of a few rows each, `(R', N)` float32, for `x` `(R', K)`."""
    x = x.float()
    out = gemv(packed, blocks, x, group_size)
    _add_pools(out, packed, blocks, x)
    if bias is not None:
        experts = torch.tensor([block.expert for block in blocks])
        out += bias[experts.repeat_interleave(torch.tensor([block.rows for block in blocks]))]
    return out


def _add_pools(out: Tensor, packed: PackedTensors, blocks: tuple[RowBlock, ...], x: Tensor) -> None:
    """Adds the slots of every block's expert to its rows."""
    slots = packed.pool_offset.tolist()
    used = {block.expert for block in blocks if slots[block.expert] < slots[block.expert + 1]}
    inputs = _pool_inputs(packed, x) if used else x
    first = 0
    for block in blocks:
        last = first + block.rows
        if block.expert in used:
            _add_pool(out[first:last], packed, slice(*slots[block.expert : block.expert + 2]), inputs[first:last])
        first = last


def _many(packed: PackedTensors, expert: int, x: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """One expert's linear of many rows, `(R, N)` in the dtype of `x`; float32 for float16."""
    if x.dtype == torch.float16:
        x = x.float()
    first, last = packed.pool_offset[expert : expert + 2].tolist()
    slots = torch.arange(first, max(first, last))
    if cpu_native.serves(x, group_size):
        weight = cpu_native.dequantize(packed, expert, x.shape[1], group_size, x.dtype)
        out = F.linear(F.pad(x, (0, weight.shape[1] - x.shape[1])), weight)
        slots = slots[packed.pool_index[slots] >= x.shape[1]]
    else:
        out = dense_linear(packed, expert, x, group_size)
    if slots.numel():
        _add_pool(out, packed, slots, _pool_inputs(packed, x))
    if bias is not None:
        out += bias[expert]
    return out


def _pool_inputs(packed: PackedTensors, x: Tensor) -> Tensor:
    """What slots read: the channels of `x`, and after them its products with the pool's directions."""
    if not packed.pool_direction.shape[0]:
        return x
    return torch.cat([x, x @ packed.pool_direction.to(x.dtype).t()], dim=1)


def _add_pool(out: Tensor, packed: PackedTensors, slots: slice | Tensor, inputs: Tensor) -> None:
    """Adds the slots of one expert to its rows."""
    scaled = inputs[:, packed.pool_index[slots]] * packed.pool_scale[slots].to(inputs.dtype)
    out.addmm_(scaled, packed.pool_value[slots].to(inputs.dtype))
