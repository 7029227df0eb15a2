"""The compiled blocks of a saved model, rebuilt without their weights: what a loader can put the weights into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.planes import PlaneLayout
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.capture import MoEBlock, Projection, capture_moe_blocks
from moe_compiler.passes.lower import LoweredExperts, place_block
from moe_compiler.saved_format import BlockFormat, LinearFormat, SavedFormat

_META = torch.device("meta")


def build_skeleton(model: nn.Module, saved: SavedFormat, group_size: int) -> dict[str, MoEBlock]:
    """Lowers the MoE blocks of a model on the meta device, in place, to the form that a saved model has.

    Args:
        model: the uncompiled model, without weights.
        saved: what the saved model's blocks look like.
        group_size: input channels that share a scale.

    Returns:
        The lowered blocks by path.

    Raises:
        ValueError: the model's MoE blocks are not those of the saved one.
    """
    with _plain_defaults():
        blocks = capture_moe_blocks(model, calls={path: one.call for path, one in saved.blocks.items()})
        if blocks.keys() != saved.blocks.keys():
            raise ValueError(
                f"the saved model has the MoE blocks {', '.join(saved.blocks)}, but a {type(model).__name__} has "
                f"{', '.join(blocks)}: load it with the class that it was saved with"
            )
        for path, block in blocks.items():
            _lower(model, block, saved.blocks[path], group_size)
    return blocks


def fill_constants(blocks: Mapping[str, MoEBlock], saved: SavedFormat) -> None:
    """Sets the buffers that are not saved, and checks that the weights which were loaded are those of the config.

    Raises:
        ValueError: an expert has another width than the config says.
    """
    for path, block in blocks.items():
        experts = block.experts
        assert isinstance(experts, LoweredExperts)
        ids = experts._buffers.get("shared_ids")
        if ids is not None:
            ids.copy_(torch.arange(experts.num_experts, experts.num_experts + ids.numel()))
        for name, linear in saved.blocks[path].linears.items():
            table = experts.get_buffer(f"{name}_table")
            layout = _layout(block.spec.projection(name), linear)
            if not torch.equal(table.cpu(), layout.table()):
                raise ValueError(
                    f"the weights of `{block.spec.path}.{name}` are not those that config.json describes: the files "
                    "are of different models, or damaged"
                )


def _lower(model: nn.Module, block: MoEBlock, saved: BlockFormat, group_size: int) -> None:
    names = [one.name for one in block.spec.projections]
    if saved.linears.keys() != set(names):  # JSON has forgotten their order
        raise ValueError(f"`{block.path}` must have the linears {', '.join(names)}, but config.json has others")
    packed = {}
    for projection in block.spec.projections:
        linear = saved.linears[projection.name]
        copies = 0 if saved.absorbed is None else saved.absorbed.copies
        if len(linear.bits) != block.spec.num_experts or len(linear.shared_bits) != copies:
            raise ValueError(
                f"`{block.path}.{projection.name}` must have widths for {block.spec.num_experts} experts and {copies} "
                f"shared ones, but config.json has {len(linear.bits)} and {len(linear.shared_bits)}"
            )
        packed[projection.name] = _empty(_layout(projection, linear), group_size, linear.slots, linear.directions)
    shared = {}
    for path, width in saved.shared_linears.items():
        original = block.graph.get_submodule(path)
        if not isinstance(original, nn.Linear):
            raise ValueError(f"`{block.path}.{path}` must be an nn.Linear, but is a {type(original).__name__}")
        layout = PlaneLayout((width,), original.out_features, original.in_features)
        shared[path] = _empty(layout, group_size, 0, 0)
    place_block(model, block, packed, shared, saved.absorbed)


def _layout(projection: Projection, linear: LinearFormat) -> PlaneLayout:
    return PlaneLayout((*linear.bits, *linear.shared_bits), projection.out_features, projection.in_features)


def _empty(layout: PlaneLayout, group_size: int, slots: int, directions: int) -> PackedExpertLinear:
    experts, rows, columns = len(layout.bits), layout.out_features, layout.in_features
    groups = -(-columns // group_size)
    return PackedExpertLinear(
        planes=torch.empty(layout.offsets[-1], dtype=torch.int16, device=_META),
        table=torch.empty(experts, 2, dtype=torch.int32, device=_META),
        scale=torch.empty(experts, rows, groups, dtype=torch.float16, device=_META),
        zero_point=torch.empty(experts, rows, groups, dtype=torch.uint8, device=_META),
        pool=ChannelPool.empty(experts, slots, rows, columns, directions, _META),
        in_features=columns,
        group_size=group_size,
    )


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """Undoes the default dtype and device that transformers sets while it builds a model: graphs are tried out."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)
