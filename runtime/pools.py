"""The channel pools of a whole model: reading them, and replacing all of their contents at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_compiler.kernels.experts import PackedExpertLinear
from moe_compiler.kernels.forward_lock import ForwardLock
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.record import HISTOGRAM
from moe_compiler.runtime.adaptation import RuntimeLayer
from moe_compiler.runtime.profile import Linear, fingerprint, moved


class ModelPools:
    """The pools of a model's lowered layers.

    Attributes:
        layers: the layers by path.
        lock: what a forward pass holds.
    """

    def __init__(self, layers: Mapping[str, RuntimeLayer], lock: ForwardLock) -> None:
        self.layers = layers
        self.lock = lock
        self._fingerprint: tuple[object, str] | None = None

    def packed(self) -> dict[Linear, PackedExpertLinear]:
        """Every packed linear of routed experts, by reference."""
        return {
            (path, name): packed
            for path, layer in self.layers.items()
            for name, packed in layer.experts.all_packed().items()
        }

    def contents(self) -> dict[Linear, ChannelPool]:
        """Copies of what the pools hold."""
        return {key: one.pool.clone() for key, one in self.packed().items()}

    def histograms(self) -> dict[str, Tensor]:
        """By path, the routing histogram of each layer, by reference; see `moe_compiler.kernels.histogram`."""
        return {path: layer.experts.get_buffer(HISTOGRAM) for path, layer in self.layers.items()}

    def fingerprint(self) -> str:
        """The model's fingerprint, computed anew only where the base was written or moved since."""
        packed = self.packed()
        bases = (tensor for one in packed.values() for tensor in (one.planes, one.table, one.scale, one.zero_point))
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in bases)
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = state, fingerprint(packed)
        return self._fingerprint[1]

    @torch.no_grad()
    def swap(self, contents: Mapping[Linear, ChannelPool], timeout: float) -> None:
        """Replaces the contents of all pools, or of none, while no forward pass runs; the histograms start anew.

        What can take long or fail is done before: the new contents are on the device when forward passes stop, and
        what stands between them and the next are device copies.

        Args:
            contents: the new contents of each pool.
            timeout: how long to wait for forward passes to end, in seconds.

        Raises:
            RuntimeError: some did not end. Nothing was changed.
        """
        packed = self.packed()
        new = {key: moved(contents[key], one.pool.offset.device) for key, one in packed.items()}
        old = self.contents()
        with self.lock.exclusive(timeout):
            self._wait_for_devices(packed)
            try:
                self._copy(packed, new)
            except BaseException:
                self._copy(packed, old)
                raise
            for histogram in self.histograms().values():
                histogram.zero_()

    def _copy(self, packed: Mapping[Linear, PackedExpertLinear], contents: Mapping[Linear, ChannelPool]) -> None:
        for key, one in packed.items():
            one.pool.copy_(contents[key])
        self._wait_for_devices(packed)

    @staticmethod
    def _wait_for_devices(packed: Mapping[Linear, PackedExpertLinear]) -> None:
        """Waits for all that was enqueued on GPUs, on whatever stream: forward passes that ended on the host."""
        for device in {one.pool.offset.device for one in packed.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
