"""The packed operators on a GPU: which Triton kernels run, in which order, and what is left to PyTorch.

Nothing is read on the host: launches, grids and allocations follow from shapes alone, so a CUDA graph that was captured
for a shape serves every routing and every content of the weights and pools.

Triton launches on the current device, which need not be that of the tensors: a model may be spread over several GPUs.
So the operators here make theirs the current one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from moe_compiler.kernels import cpu, triton_experts
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.tiles import DEFAULT, Schedule, choose_schedule
from moe_compiler.kernels.triton_dequantize import down_dense, gate_up_dense, linear_dense, workspace_bytes
from moe_compiler.kernels.triton_routing import Blocks, route

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""Activations that the Triton kernels take; others run as plain PyTorch, which reads the routing on the host."""

MAX_WORKSPACE_BYTES = 2 << 30
"""The most that a dequantized linear may take; a larger one stays with the kernels that read packed weights."""


def packed_expert_linear(
    x: Tensor, expert_ids: Tensor, weight: Sequence[Tensor], bias: Tensor | None, group_size: int
) -> Tensor:
    """Expert linear over packed weights; arguments as in `moe_compiler.kernels.ops`."""
    if x.dtype not in KERNEL_DTYPES:
        return cpu.packed_expert_linear(x, expert_ids, weight, bias, group_size)
    packed = PackedTensors(*weight)
    schedule = _schedule(x, expert_ids, packed, x.shape[1])
    with torch.cuda.device_of(x):
        blocks = _blocks(expert_ids, packed, schedule)
        if schedule.path == "dense":
            assert blocks is not None
            return linear_dense(x, expert_ids, blocks, packed, bias, group_size)
        return triton_experts.linear(schedule.path, x, expert_ids, blocks, packed, bias, group_size, schedule.down)


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
    """All experts of a layer over packed weights; arguments as in `moe_compiler.kernels.ops`.

    Launches: the sort of the rows (none where every row is a block, one for few, two for many), `gate_up` with the
    activation, `down` with the routing weights, and the sum over a token's experts; one more for each linear whose pool
    has directions. The dense path takes about twelve.
    """
    if x.dtype not in KERNEL_DTYPES:
        return cpu.packed_experts(
            x, top_k_index, top_k_weights, gate_up, gate_up_bias, down, down_bias, activation, group_size
        )
    first, second = PackedTensors(*gate_up), PackedTensors(*down)
    schedule = _schedule(x, top_k_index.reshape(-1), first, x.shape[1])
    with torch.cuda.device_of(x):
        return run_experts(
            schedule, x, top_k_index, top_k_weights, first, gate_up_bias, second, down_bias, activation, group_size
        )


def run_experts(
    schedule: Schedule,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: PackedTensors,
    gate_up_bias: Tensor | None,
    down: PackedTensors,
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
) -> Tensor:
    """`packed_experts` by a given schedule, on the current device."""
    expert_ids = top_k_index.reshape(-1)
    blocks = _blocks(expert_ids, gate_up, schedule)
    if schedule.path == "dense":
        assert blocks is not None
        hidden = gate_up_dense(x, blocks, gate_up, gate_up_bias, activation, group_size, top_k_index.shape[1])
        return down_dense(hidden, blocks, top_k_weights, down, down_bias, group_size)
    hidden = triton_experts.gate_up(
        schedule.path, x, expert_ids, blocks, gate_up, gate_up_bias, activation, group_size, schedule.gate_up
    )
    deterministic = not schedule.atomic or torch.are_deterministic_algorithms_enabled()
    return triton_experts.down(
        schedule.path, hidden, expert_ids, blocks, top_k_weights, down, down_bias, group_size, schedule.down,
        deterministic=deterministic,
    )  # fmt: skip


def _schedule(x: Tensor, expert_ids: Tensor, packed: PackedTensors, in_features: int) -> Schedule:
    rows, experts = expert_ids.shape[0], packed.num_experts
    schedule = choose_schedule(_device_name(x.device), rows, experts)
    if schedule.path == "dense" and workspace_bytes(packed, in_features, x.dtype) > MAX_WORKSPACE_BYTES:
        return choose_schedule(_device_name(x.device), rows, experts, exclude="dense")
    return schedule


def _blocks(expert_ids: Tensor, packed: PackedTensors, schedule: Schedule) -> Blocks | None:
    return None if schedule.direct else route(expert_ids, packed.num_experts, schedule.down.block_m)


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT
