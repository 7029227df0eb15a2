"""The operators of the rewritten graphs: `torch.ops.moe_compiler.*`, one name for every device.

Importing this module registers them. `R` rows are the (token, expert) pairs of a batch: `T` tokens with `k` experts
each give `R = T·k` rows in token order. An id of `E` or more marks a pair that another rank computes: its row is 0.

`expert_linear(x, expert_ids, weight, bias, transposed) -> (R, N)`
    The linear of the captured graph, in the model's own precision. `x` is `(T, K)` or `(R, K)`: row `r` of the output
    reads `x[r // (R / x.shape[0])]`. `weight` is `(E, N, K)`, or `(E, K, N)` if `transposed`; `bias` `(E, N)`.

`packed_expert_linear(x, expert_ids, weight, bias, group_size) -> (R, N)`
    The linear of the lowered graph. `weight` is the list of tensors that `moe_compiler.kernels.packed.PackedTensors`
    names: planes, table, scales, zero points and the channel pool, whose slot `s` of expert `e` adds
    `pool_scale[s] · pool_value[s] · x[:, pool_index[s]]`.

`packed_experts(x, top_k_index, top_k_weights, gate_up, gate_up_bias, down, down_bias, activation, group_size)
-> (T, H)`
    All experts of a layer in one operator: `Σ_k w_k · down(act(gate(x)) · up(x))`. `x` is `(T, H)`, `top_k_index`
    `(T, k)` int64 and `top_k_weights` `(T, k)`; `gate_up` is a packed linear `(2I, H)`, the gate's rows first, `down`
    one `(H, I)`; `activation` is one of `moe_compiler.kernels.activation.ACTIVATIONS`. Sums are float32, the
    intermediate is rounded to the dtype of `x`.

`packed_experts_hidden(x, top_k_index, ...) -> ((T, H), (R, I))`
    `packed_experts` and its intermediate, `act(gate(x)) · up(x)` of every row: what an observer of the second linear
    needs.

`observe_experts_(x, expert_ids, gate, token_weight, abs_sum, sq_sum, hessian) -> ()`
    The observer: adds to `abs_sum` and `sq_sum` `(E, K)` float64 and, unless it is empty, `hessian` `(E, K, K)`
    float32 what `moe_compiler.passes.statistics` defines. `gate` is `(R,)`; `token_weight` is `(T,)`, or `(1,)` for
    one weight for all.

`observe_routing_(expert_ids, gate, token_weight, top_k, tokens, count, token_mass, gate_mass) -> ()`
    Adds the number of tokens and the sum of their weights to `tokens[0]` and `tokens[1]` and writes `top_k` to
    `tokens[2]` (float64); adds the routed tokens, their weights and their routing weights to `count` `(E,)` int64,
    `token_mass` and `gate_mass` `(E,)` float64.

`observe_coactivation_(expert_ids, top_k, coactivation) -> ()`
    Adds to `coactivation` `(E, E)` int64 the tokens that were routed to both experts of each pair; on the diagonal, to
    the one.

`record_routing_(histogram, expert_ids, decay) -> ()`
    Adds the tokens whose experts are `expert_ids` `(T, k)` to the decayed histogram `(E + 1,)` float32, whose last
    entry counts ids of `E` or more; see `moe_compiler.kernels.histogram`. `decay` is per token.

`begin_forward(top_k_index, lock) -> (T, k)` and `end_forward_(marker, after, lock) -> ()`
    Between them this thread's forward pass holds the lock of that number (see `moe_compiler.kernels.forward_lock`):
    nobody changes the pools. `begin_forward` returns a copy, which the first packed operator reads; `after` is the
    result of the last one, `marker` any tensor. They act on the host, so a CUDA graph must not take them in.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_compiler.kernels import coactivation, cpu, forward_lock, histogram
from moe_compiler.kernels.packed import PackedTensors

logger = logging.getLogger(__name__)

NAMESPACE = "moe_compiler"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define("expert_linear(Tensor x, Tensor expert_ids, Tensor weight, Tensor? bias, bool transposed) -> Tensor")
_LIBRARY.define(
    "packed_expert_linear(Tensor x, Tensor expert_ids, Tensor[] weight, Tensor? bias, int group_size) -> Tensor"
)
_LIBRARY.define(
    "packed_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor[] gate_up, Tensor? gate_up_bias, "
    "Tensor[] down, Tensor? down_bias, str activation, int group_size) -> Tensor"
)
_LIBRARY.define(
    "packed_experts_hidden(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor[] gate_up, "
    "Tensor? gate_up_bias, Tensor[] down, Tensor? down_bias, str activation, int group_size) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "observe_experts_(Tensor x, Tensor expert_ids, Tensor gate, Tensor token_weight, "
    "Tensor(a!) abs_sum, Tensor(b!) sq_sum, Tensor(c!) hessian) -> ()"
)
_LIBRARY.define(
    "observe_routing_(Tensor expert_ids, Tensor gate, Tensor token_weight, int top_k, Tensor(a!) tokens, "
    "Tensor(b!) count, Tensor(c!) token_mass, Tensor(d!) gate_mass) -> ()"
)
_LIBRARY.define("observe_coactivation_(Tensor expert_ids, int top_k, Tensor(a!) coactivation) -> ()")
_LIBRARY.define("record_routing_(Tensor(a!) histogram, Tensor expert_ids, float decay) -> ()")
_ON_HOST = (torch.Tag.cudagraph_unsafe,)
_LIBRARY.define("begin_forward(Tensor top_k_index, int lock) -> Tensor", tags=_ON_HOST)
_LIBRARY.define("end_forward_(Tensor(a!) marker, Tensor after, int lock) -> ()", tags=_ON_HOST)


@cache
def _cuda_kernels() -> ModuleType:
    """The module of the Triton kernels, imported when a GPU first needs it: Triton takes long, and may be missing."""
    try:
        return importlib.import_module("moe_compiler.kernels.cuda")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        logger.warning("Triton is not installed: packed experts run on the GPU as plain PyTorch, which is slow")
        return cpu


def _packed_expert_linear_cuda(*args: Any) -> Tensor:
    out: Tensor = _cuda_kernels().packed_expert_linear(*args)
    return out


def _packed_experts_cuda(*args: Any) -> Tensor:
    out: Tensor = _cuda_kernels().packed_experts(*args)
    return out


def _packed_experts_hidden_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return cpu.experts_by_linears(_packed_expert_linear_cuda, *args)


_LIBRARY.impl("packed_expert_linear", cpu.packed_expert_linear, "CPU")
_LIBRARY.impl("packed_expert_linear", _packed_expert_linear_cuda, "CUDA")
_LIBRARY.impl("packed_experts", cpu.packed_experts, "CPU")
_LIBRARY.impl("packed_experts", _packed_experts_cuda, "CUDA")
_LIBRARY.impl("packed_experts_hidden", cpu.packed_experts_hidden, "CPU")
_LIBRARY.impl("packed_experts_hidden", _packed_experts_hidden_cuda, "CUDA")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("expert_linear", cpu.expert_linear, _device)
    _LIBRARY.impl("observe_experts_", cpu.observe_experts_, _device)
    _LIBRARY.impl("observe_routing_", cpu.observe_routing_, _device)
    _LIBRARY.impl("observe_coactivation_", coactivation.observe_coactivation_, _device)
    _LIBRARY.impl("record_routing_", histogram.record_routing_, _device)
    _LIBRARY.impl("begin_forward", forward_lock.begin_forward, _device)
    _LIBRARY.impl("end_forward_", forward_lock.end_forward_, _device)


def _check_device(x: Tensor, weight: Tensor) -> None:
    """The fake also serves as the meta kernel: weights left on meta must not yield uninitialised memory."""
    if x.device != weight.device:
        raise RuntimeError(
            f"`x` is on {x.device} but the experts' weights are on {weight.device}: move the model to one device"
        )


def _expert_linear_fake(x: Tensor, expert_ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    _check_device(x, weight)
    return x.new_empty(expert_ids.shape[0], weight.shape[2 if transposed else 1])


def _packed_expert_linear_fake(
    x: Tensor, expert_ids: Tensor, weight: list[Tensor], bias: Tensor | None, group_size: int
) -> Tensor:
    packed = PackedTensors(*weight)
    _check_device(x, packed.planes)
    return x.new_empty(expert_ids.shape[0], packed.out_features)


def _packed_experts_fake(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: list[Tensor],
    gate_up_bias: Tensor | None,
    down: list[Tensor],
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
) -> Tensor:
    _check_device(x, gate_up[0])
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _packed_experts_hidden_fake(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: list[Tensor],
    gate_up_bias: Tensor | None,
    down: list[Tensor],
    down_bias: Tensor | None,
    activation: str,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    _check_device(x, gate_up[0])
    hidden = x.new_empty(top_k_index.numel(), PackedTensors(*gate_up).out_features // 2)
    return torch.empty_like(x, memory_format=torch.contiguous_format), hidden


def _observe_experts_fake(
    x: Tensor,
    expert_ids: Tensor,
    gate: Tensor,
    token_weight: Tensor,
    abs_sum: Tensor,
    sq_sum: Tensor,
    hessian: Tensor,
) -> None:
    _check_device(x, abs_sum)


def _observe_routing_fake(
    expert_ids: Tensor,
    gate: Tensor,
    token_weight: Tensor,
    top_k: int,
    tokens: Tensor,
    count: Tensor,
    token_mass: Tensor,
    gate_mass: Tensor,
) -> None:
    _check_device(expert_ids, count)


def _observe_coactivation_fake(expert_ids: Tensor, top_k: int, coactivation: Tensor) -> None:
    _check_device(expert_ids, coactivation)


def _record_routing_fake(histogram: Tensor, expert_ids: Tensor, decay: float) -> None:
    _check_device(expert_ids, histogram)


def _begin_forward_fake(top_k_index: Tensor, lock: int) -> Tensor:
    return torch.empty_like(top_k_index)


def _end_forward_fake(marker: Tensor, after: Tensor, lock: int) -> None:
    return None


torch.library.register_fake(f"{NAMESPACE}::expert_linear", _expert_linear_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::packed_expert_linear", _packed_expert_linear_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::packed_experts", _packed_experts_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::packed_experts_hidden", _packed_experts_hidden_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::observe_experts_", _observe_experts_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::observe_routing_", _observe_routing_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::observe_coactivation_", _observe_coactivation_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::record_routing_", _record_routing_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::begin_forward", _begin_forward_fake, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::end_forward_", _end_forward_fake, lib=_LIBRARY)

expert_linear = torch.ops.moe_compiler.expert_linear.default
packed_expert_linear = torch.ops.moe_compiler.packed_expert_linear.default
packed_experts = torch.ops.moe_compiler.packed_experts.default
packed_experts_hidden = torch.ops.moe_compiler.packed_experts_hidden.default
observe_experts_ = torch.ops.moe_compiler.observe_experts_.default
observe_routing_ = torch.ops.moe_compiler.observe_routing_.default
observe_coactivation_ = torch.ops.moe_compiler.observe_coactivation_.default
record_routing_ = torch.ops.moe_compiler.record_routing_.default
begin_forward = torch.ops.moe_compiler.begin_forward.default
end_forward_ = torch.ops.moe_compiler.end_forward_.default
