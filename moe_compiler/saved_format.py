"""What the `config.json` of a saved model says of its compiled blocks: all that it takes to rebuild them empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe_compiler.kernels.linear import PackedLinear
from moe_compiler.passes.absorb import SharedExperts
from moe_compiler.passes.capture import BlockCall
from moe_compiler.runtime.adaptation import RuntimeLayer

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LinearFormat:
    """One packed linear of a layer's experts.

    Attributes:
        bits: the width of each routed expert.
        shared_bits: of each shared expert that runs as a routed one.
        slots: of the pool.
        directions: of the pool.
    """

    bits: tuple[int, ...]
    shared_bits: tuple[int, ...]
    slots: int
    directions: int

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types; widths as a text of digits, one per expert."""
        return {
            "bits": _digits(self.bits),
            "shared_bits": _digits(self.shared_bits),
            "slots": self.slots,
            "directions": self.directions,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearFormat:
        """The inverse of `to_dict`."""
        bits, shared = (tuple(int(digit) for digit in str(values[name])) for name in ("bits", "shared_bits"))
        return cls(bits, shared, int(values["slots"]), int(values["directions"]))


@dataclass(frozen=True)
class BlockFormat:
    """One lowered MoE block.

    Attributes:
        linears: the packed linears of its experts by name.
        absorbed: the shared experts that run as routed ones, if any do.
        shared_linears: by path in the block, the width of the other shared experts' linears.
        call: how the block is called.
    """

    linears: Mapping[str, LinearFormat]
    absorbed: SharedExperts | None
    shared_linears: Mapping[str, int]
    call: BlockCall

    @classmethod
    def of(cls, layer: RuntimeLayer) -> BlockFormat:
        """The format of a lowered block."""
        experts = layer.experts
        shared = experts.shared_packed()
        linears = {
            name: LinearFormat(
                bits=packed.bits,
                shared_bits=shared[name].bits if name in shared else (),
                slots=packed.pool.capacity,
                directions=packed.pool.direction.shape[0],
            )
            for name, packed in experts.all_packed().items()
        }
        modules = layer.block.graph.named_modules()
        others = {path: one.packed.bits[0] for path, one in modules if isinstance(one, PackedLinear)}
        return cls(linears, experts.meta["absorbed"], others, layer.block.call)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types."""
        absorbed = self.absorbed
        return {
            "linears": {name: one.to_dict() for name, one in self.linears.items()},
            "absorbed": None if absorbed is None else vars(absorbed),
            "shared_linears": dict(self.shared_linears),
            "call": {"ranks": dict(self.call.ranks), "none_args": sorted(self.call.none_args)},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockFormat:
        """The inverse of `to_dict`."""
        absorbed, call = values["absorbed"], values["call"]
        return cls(
            linears={name: LinearFormat.from_dict(one) for name, one in values["linears"].items()},
            absorbed=None if absorbed is None else SharedExperts(**absorbed),
            shared_linears={path: int(width) for path, width in values["shared_linears"].items()},
            call=BlockCall(dict(call["ranks"]), frozenset(call["none_args"])),
        )


@dataclass(frozen=True)
class SavedFormat:
    """A compiled model.

    Attributes:
        blocks: its lowered MoE blocks by path.
        base_model: where it came from before it was compiled, a folder or a repository of the hub; empty if unknown.
        base_revision: the repository's commit, where that is known.
        fingerprint: see `moe_compiler.runtime.profile.fingerprint`; empty until the model is saved.
    """

    blocks: Mapping[str, BlockFormat]
    base_model: str = ""
    base_revision: str | None = None
    fingerprint: str = field(default="", compare=False)

    def with_fingerprint(self, fingerprint: str) -> SavedFormat:
        """The same with a fingerprint."""
        return replace(self, fingerprint=fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "fingerprint": self.fingerprint,
            "blocks": {path: block.to_dict() for path, block in self.blocks.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SavedFormat:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is of another version, or damaged.
        """
        try:
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"`format_version` must be {FORMAT_VERSION}, but is {version!r}: the model was saved by another "
                    "version of moe-compiler"
                )
            blocks = {path: BlockFormat.from_dict(block) for path, block in values["blocks"].items()}
            if not blocks:
                raise ValueError("`blocks` must hold at least one MoE block, but is empty")
            return cls(blocks, str(values["base_model"]), values["base_revision"], str(values["fingerprint"]))
        except KeyError as error:
            raise ValueError(f"`compiled` lacks the field {error.args[0]!r}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"`compiled` is damaged: {error}") from error


def _digits(widths: tuple[int, ...]) -> str:
    return "".join(map(str, widths))
