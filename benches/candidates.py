"""The candidates of a setting: the packed operators and every baseline, each as a cycle of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import baselines
import torch
import torch.nn.functional as F
from int4 import ExpertLinear, int4_bytes
from targets import PACKED, PACKED_WITHOUT_POOL
from torch import Tensor
from workloads import (
    LayerShape,
    packed_bytes,
    random_tensor,
    rotations,
    with_shared,
    without_pool,
)

from moe_compiler.kernels import ops
from moe_compiler.kernels.experts import PackedExpertLinear

LINEAR = "bf16 F.linear"
INT4_MOST = 16  # tokens per expert; above, it is slower than bfloat16 many times over
BATCHED_MM_LIMIT = {"cpu": 1 << 28, "cuda": 8 << 30}  # bytes that it gathers at once
Pair = tuple[PackedExpertLinear, PackedExpertLinear]
"""`gate_up` and `down`."""


@dataclass(frozen=True)
class Candidate:
    """What is timed: the calls to cycle through, and the bytes that one of them must read, in the mean."""

    calls: Sequence[Callable[[], Any]]
    bytes_read: int


def layer_candidates(
    shape: LayerShape,
    layer: baselines.Layer,
    linears: Sequence[Pair],
    ids: Tensor,
    dtype: torch.dtype,
    compiled: bool,
) -> dict[str, Candidate]:
    """The packed operator and every baseline for one routing.

    Args:
        shape: the layer.
        layer: its weights in bfloat16.
        linears: its packed weights, once for each copy.
        ids: `(T, k)`, the routing, without shared experts, on the host.
        dtype: of the packed operator's activations.
        compiled: whether baselines also run compiled by `torch.compile`.
    """
    device, tokens = linears[0][0].planes.device, ids.shape[0]
    x = random_tensor((tokens, shape.hidden_size), torch.float32, device)
    weights = torch.softmax(random_tensor(ids.shape, torch.float32, device), dim=1)
    every, every_weight = with_shared(ids.to(device), weights, shape)
    turns = [turn.to(device) for turn in rotations(every.cpu(), shape.all_experts)]
    candidates = {PACKED: packed_layer(linears, x.to(dtype), turns, every_weight)}
    if linears[0][0].pool.capacity:
        bare = [(without_pool(gate_up), without_pool(down)) for gate_up, down in linears]
        candidates[PACKED_WITHOUT_POOL] = packed_layer(bare, x.to(dtype), turns, every_weight)

    x, weights = x.bfloat16(), weights.bfloat16()
    routed = [turn.to(device) for turn in rotations(ids, shape.num_experts)]
    read = 2 * (ids.unique().numel() + shape.shared_experts) * shape.expert_weights
    for by_compile in (False, True) if compiled else (False,):
        ending = ", compiled" if by_compile else ""
        calls = baselines.transformers_experts(layer, "grouped_mm", by_compile, x, routed, weights)
        candidates[f"bf16 grouped_mm{ending}"] = Candidate(calls, read)
        if baselines.batched_mm_bytes(shape, tokens) <= BATCHED_MM_LIMIT[device.type]:
            calls = baselines.transformers_experts(layer, "batched_mm", by_compile, x, routed, weights)
            candidates[f"bf16 batched_mm{ending}"] = Candidate(calls, read)
        if device.type == "cpu" or not by_compile:
            calls = baselines.linear_per_expert(layer, by_compile, x, routed, weights)
            candidates[LINEAR + ending] = Candidate(calls, read)
    if device.type == "cpu" and ids.numel() <= INT4_MOST * shape.num_experts:
        calls = baselines.int4_per_expert(shape, x, turns, every_weight.bfloat16())
        candidates["int4 ATen"] = Candidate(calls, int4_bytes(read))
    return candidates


def packed_layer(linears: Sequence[Pair], x: Tensor, turns: Sequence[Tensor], weights: Tensor) -> Candidate:
    """The fused operator, over every copy of the weights and every turn of the routing."""

    def prepare(gate_up: PackedExpertLinear, down: PackedExpertLinear, ids: Tensor) -> Callable[[], Tensor]:
        first, second, group_size = list(gate_up.tensors), list(down.tensors), gate_up.group_size
        return lambda: ops.packed_experts(x, ids, weights, first, None, second, None, "silu", group_size)

    calls = [prepare(gate_up, down, ids) for ids in turns for gate_up, down in linears]
    gate_up, down = linears[0]
    read = [packed_bytes(gate_up, hit) + packed_bytes(down, hit) for hit in (ids.unique().tolist() for ids in turns)]
    return Candidate(calls, sum(read) // len(read))


def operator_candidates(
    packed: Sequence[PackedExpertLinear],
    dense: Sequence[Tensor],
    int4: Sequence[Mapping[str, ExpertLinear]],
    tokens: int,
    dtype: torch.dtype,
) -> dict[str, Candidate]:
    """The packed expert linear and its baselines at `tokens` tokens for every expert.

    Args:
        packed: the packed weights, once for each copy.
        dense: `(E, N, K)` bfloat16, once for each copy.
        int4: other projects' 4-bit linears by name, once for each copy.
        tokens: rows per expert.
        dtype: of the packed operator's activations.
    """
    first = packed[0]
    every = range(first.num_experts)
    x = random_tensor((first.num_experts * tokens, first.in_features), torch.float32, first.planes.device)
    candidates = {PACKED: Candidate(packed_linear(packed, x.to(dtype), tokens), packed_bytes(first, every))}
    if first.pool.capacity:
        bare = [without_pool(one) for one in packed]
        calls = packed_linear(bare, x.to(dtype), tokens)
        candidates[PACKED_WITHOUT_POOL] = Candidate(calls, packed_bytes(bare[0], every))
    rows = list(x.bfloat16().split(tokens))
    dense_bytes = 2 * dense[0].numel()
    candidates[LINEAR] = Candidate([dense_linear(weight, rows) for weight in dense], dense_bytes)
    for name in int4[0]:
        others = [int4_linear(copy[name], rows) for copy in int4]
        candidates[name] = Candidate(others, int4_bytes(dense_bytes))
    return candidates


def packed_linear(packed: Sequence[PackedExpertLinear], x: Tensor, tokens: int) -> list[Callable[[], Tensor]]:
    """The packed expert linear, `tokens` rows per expert; one call per copy of the weights."""
    ids = torch.arange(packed[0].num_experts, device=x.device).repeat_interleave(tokens)

    def prepare(one: PackedExpertLinear) -> Callable[[], Tensor]:
        tensors = list(one.tensors)
        return lambda: ops.packed_expert_linear(x, ids, tensors, None, one.group_size)

    return [prepare(one) for one in packed]


def dense_linear(weight: Tensor, rows: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """`F.linear` once per expert."""
    return lambda: [F.linear(x, weight[expert]) for expert, x in enumerate(rows)]


def int4_linear(linear: ExpertLinear, rows: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Another project's 4-bit linear, once per expert."""
    rows = [x.to(linear.dtype) for x in rows]
    return lambda: [linear(x, expert) for expert, x in enumerate(rows)]
