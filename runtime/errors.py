"""The error of a quantized weight, one expert at a time, in the precision that is fast enough for it."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compiler.kernels import cpu_native
from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.packed import PackedTensors
from moe_compiler.kernels.planes import ALIGNMENT, HALF_WORDS, TILE
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.moments import RowMoments, SecondMoments
from moe_compiler.runtime.master import LinearMaster


def precision(packed: PackedExpertLinear, of: SecondMoments | LinearMaster) -> torch.dtype:
    """The dtype for products with errors: bfloat16 where rows or weights are in it and this CPU multiplies it.

    Both weights are rounded to bfloat16 then before they are subtracted, as the operator does where it dequantizes.
    Elsewhere it is float32, as it is for Hessians.
    """
    own = torch.float32
    if isinstance(of, LinearMaster):
        own = of.dtype
    elif isinstance(of, RowMoments):
        own = of.rows.dtype
    fast = packed.planes.device.type == "cpu" and "avx512_bf16" in cpu_native.cpu_flags()
    return torch.bfloat16 if fast and own == torch.bfloat16 else torch.float32


def weight_error(
    master: LinearMaster, packed: PackedExpertLinear, expert: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`W − Ŵ` of one expert's base, `(N, K)` on the model's device."""
    original = master.weight(expert)
    exact_tiles = packed.in_features % TILE == 0
    if exact_tiles and original.dtype == dtype and original.device.type == "cpu" and _is_native(packed, dtype):
        return cpu_native.subtract_weight(original, _without_pool(packed), expert, packed.group_size)
    base = base_weight(packed, expert, dtype)
    return torch.sub(original.to(base.device, dtype), base, out=base)


def base_weight(packed: PackedExpertLinear, expert: int, dtype: torch.dtype) -> Tensor:
    """The base weight of one expert, without the channel pool, `(N, K)`."""
    if not _is_native(packed, dtype):
        return packed.dequantize_expert(expert).to(dtype)
    weight = cpu_native.dequantize(_without_pool(packed), expert, packed.in_features, packed.group_size)
    return weight[:, : packed.in_features].contiguous()


def _is_native(packed: PackedExpertLinear, dtype: torch.dtype) -> bool:
    """Whether native code dequantizes to this dtype."""
    on_cpu = packed.planes.device.type == "cpu"
    return on_cpu and dtype == torch.bfloat16 and cpu_native.serves(torch.empty(0, dtype=dtype), packed.group_size)


def _without_pool(packed: PackedExpertLinear) -> PackedTensors:
    pool = ChannelPool.empty(packed.num_experts, 0, packed.out_features, packed.in_features)
    return PackedTensors(*packed.tensors[:4], *pool.tensors().values())


def base_columns(packed: PackedExpertLinear, places: Tensor) -> Tensor:
    """Columns of the quantized base at `places` (`e · K + c`), `(S, N)` float32 on the host.

    Reads the words of these channels only; where they are is said in `moe_compiler.kernels.planes`.
    """
    device, rows = packed.planes.device, packed.out_features
    columns = torch.empty(places.shape[0], rows, device=device)
    experts, channels = places // packed.in_features, places % packed.in_features
    tiles = -(-packed.in_features // TILE)
    table = packed.table.tolist()
    for expert in experts.unique().tolist():
        mine = (experts == expert).nonzero().squeeze(1).to(device)
        channel = channels.to(device)[mine]
        planes, start = table[expert]
        first, size = start * ALIGNMENT, tiles * planes * rows * HALF_WORDS
        words = packed.planes[first : first + size].view(tiles, planes, rows, HALF_WORDS)
        taken = words[channel // TILE, :, :, channel % HALF_WORDS].int()  # (s, P, N)
        digits = (taken >> (2 * (channel % TILE // HALF_WORDS))[:, None, None]) & 3
        shifts = 2 * torch.arange(planes - 1, -1, -1, device=device)
        codes = (digits << shifts[:, None]).sum(dim=1)
        group = channel // packed.group_size
        zero_point = packed.zero_point[expert][:, group].t() / 2 ** (8 - 2 * planes)
        columns[mine] = (codes - zero_point) * packed.scale[expert][:, group].t().float()
    return columns.cpu()
