"""What can be chosen when a model is compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moe_compiler.kernels.affine import WIDTHS
from moe_compiler.passes.quantize import QUANTIZERS
from moe_compiler.passes.rtn import GROUP_SIZES
from moe_compiler.passes.strategies import STRATEGIES
from moe_compiler.runtime.rules import RULES

MASTERS = ("auto", "checkpoint", "memory", "cache")
POOLS: Mapping[str, str] = {"lowrank": "lowrank", "channels": "restore"}
"""The kinds of pool, and the rule that `adapt` uses for each if it is not told."""


@dataclass(frozen=True)
class CompileConfig:
    """The choices of `dynamo_compile`. Every field has a default; JSON both ways.

    Attributes:
        strategy: who decides the widths: `"dynamo"`, `"moqa"`, `"uniform"`, `"random"`, `"pooled"` or `"budget"`.
        target_bits: upper bound of the *effective* bits of an expert weight (codes, scales, zero points, tables and
            the channel pool, measured over the buffers), or `None` to take what the clustering gives.
        widths: the code widths that may be used, some of 2, 4, 6, 8; by default the strategy's own: 2 and 4 for
            `"moqa"` and `"random"`, all for the others.
        uniform_bits: the width of the strategy `"uniform"`; by default the widest that meets `target_bits`.
        overlap: fuzzy memberships closer than this go to the lower cluster (strategies `"dynamo"`, `"pooled"`).
        insurance: how much of the layer's mean error is added to each expert's (strategy `"budget"`): more protects
            experts that the calibration data do not use.
        token_weight_alpha: exponent of the token weights (MoQa eq. 2), or `None` for weight 1. The strategy `"moqa"`
            uses 0.3 where this is `None`.
        group_size: input channels that share a scale and a zero point: 32, 64, 128, 256, 512 or 1,024.
        quantizer: `"gptq"`, `"rtn"` or `"hqq"`.
        shared_bits: width of the linears of shared experts.
        pool: what the slots of the pools can hold: with `"lowrank"` corrections of rank one, single channels among
            them, with `"channels"` single channels only. A slot of the first kind takes `8·N + 8·K + 64` bits, of the
            second `8·N + 64`; a pool takes the same bits either way, so that it has fewer slots of the first.
        pool_fraction: capacity of the pool: the bits of so many channel slots, as a share of all input channels of a
            linear's experts. The INT8 channels that the strategy `"moqa"` plans are held as far as the pool has room.
        rule: how `adapt` fills the pool if it is not told: `"lowrank"`, `"compensate"`, `"restore"` or `"cluster"`;
            `"auto"` becomes `"lowrank"` for the pool of that name, `"restore"` for the other.
        master: where `adapt` takes original weights from. `"checkpoint"` reads them from the safetensors files that the
            model was loaded from, one expert at a time; `"memory"` keeps all of them in host memory; `"auto"` is the
            first where the files have the model's weights, the second elsewhere; `"cache"` keeps `cache_fraction` of
            the columns in host memory, which does for the rules `"restore"` and `"cluster"` and the pool `"channels"`.
        cache_fraction: share of the input channels whose original columns the master `"cache"` keeps.
        sequence_length: tokens per sample that text is cut into.
        tokens_per_batch: upper bound of the tokens in one forward pass of calibration.
        hessian_memory_bytes: upper bound of the memory for Hessians, which are held twice while they are collected;
            the layers are quantized in windows of as many as fit (at least one).
        router_tokens: calibration tokens on which the routers are refitted after quantizing, so that tokens find the
            experts that they found before; 0 leaves the routers as they are. The inputs of every router are kept
            meanwhile, `2·H` bytes per token and layer in a 16-bit model.
        seed: of the strategy `"random"` and of everything else that draws.
    """

    strategy: str = "budget"
    target_bits: float | None = 3.2
    widths: tuple[int, ...] | None = None
    uniform_bits: int | None = None
    overlap: float = 0.2
    insurance: float = 0.2
    token_weight_alpha: float | None = None
    group_size: int = 128
    quantizer: str = "gptq"
    shared_bits: int = 8
    pool: str = "lowrank"
    pool_fraction: float = 0.01
    rule: str = "auto"
    master: str = "auto"
    cache_fraction: float = 0.1
    sequence_length: int = 512
    tokens_per_batch: int = 4096
    hessian_memory_bytes: int = 4 << 30
    router_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.widths is not None:
            object.__setattr__(self, "widths", tuple(self.widths))
        for name, allowed in (
            ("strategy", STRATEGIES),
            ("quantizer", QUANTIZERS),
            ("pool", tuple(POOLS)),
            ("rule", ("auto", *RULES)),
            ("master", MASTERS),
            ("group_size", GROUP_SIZES),
            ("uniform_bits", (None, *WIDTHS)),
            ("shared_bits", WIDTHS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, but is {value!r}")
        if self.widths is not None and (not self.widths or not set(self.widths) <= set(WIDTHS)):
            raise ValueError(f"`widths` must be some of {WIDTHS}, but is {self.widths}")
        if self.target_bits is not None and not 0 < self.target_bits <= 16:
            raise ValueError(f"`target_bits` must lie in (0, 16], but is {self.target_bits}")
        for name in ("pool_fraction", "cache_fraction", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], but is {getattr(self, name)}")
        if self.master == "cache" and self.cache_fraction < self.pool_fraction:
            raise ValueError(
                f"`cache_fraction` must be at least `pool_fraction`, but {self.cache_fraction} < {self.pool_fraction}"
            )
        if self.master == "cache" and self.pool == "lowrank":
            raise ValueError(
                "`master` must not be 'cache' where `pool` is 'lowrank', since low-rank corrections need whole "
                "weights: choose `pool` 'channels' or another master"
            )
        if self.rule == "auto":
            object.__setattr__(self, "rule", POOLS[self.pool])
        if self.rule == "lowrank" and self.pool != "lowrank":
            raise ValueError(f"`rule` must not be 'lowrank' where `pool` is {self.pool!r}: it has no directions")
        if self.rule in ("compensate", "lowrank") and self.master == "cache":
            raise ValueError(f"`rule` must not be {self.rule!r} where `master` is 'cache': it needs whole weights")
        if self.insurance < 0:
            raise ValueError(f"`insurance` must not be negative, but is {self.insurance}")
        for name, least in (
            ("sequence_length", 2),
            ("tokens_per_batch", 2),
            ("hessian_memory_bytes", 1),
            ("router_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {getattr(self, name)}")

        if self.sequence_length > self.tokens_per_batch:
            raise ValueError(
                "`sequence_length` must be at most `tokens_per_batch`, "
                f"but {self.sequence_length} > {self.tokens_per_batch}"
            )

    def with_overrides(self, **overrides: Any) -> CompileConfig:
        """The same choices with some replaced.

        Raises:
            TypeError: a name is not a field.
        """
        known = [field.name for field in fields(self)]
        for name in overrides:
            if name not in known:
                raise TypeError(f"`{name}` is not an option of CompileConfig; the options are {', '.join(known)}")
        if "pool" in overrides and self.rule == POOLS[self.pool]:
            overrides.setdefault("rule", "auto")
        return replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The choices as JSON types."""
        return {**asdict(self), "widths": None if self.widths is None else list(self.widths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompileConfig:
        """The inverse of `to_dict`; missing fields take their defaults, unknown ones are an error."""
        return cls().with_overrides(**values)

    def to_json(self) -> str:
        """The choices as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CompileConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))
