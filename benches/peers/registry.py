"""The peers: which package quantizes, where it is installed, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAN = "plan"
"""A setting that stands for the file that `--plan` names."""


@dataclass(frozen=True)
class Peer:
    """One way to quantize with another project's package.

    Attributes:
        package: its name in the package index.
        environment: the virtual environment and its requirements file.
        module: of this folder, with the function `quantize`.
        settings: what `quantize` is told.
        variables: of the process's environment, so that the package runs on a CPU at all.
    """

    package: str
    environment: str
    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


def _gptqmodel(bits: int, **settings: Any) -> Peer:
    variables = {"GPTQMODEL_CPU_WORKERS": "2"}
    return Peer("gptqmodel", "gptqmodel", "peer_gptqmodel", {"bits": bits, "group_size": 128, **settings}, variables)


PEERS: Mapping[str, Peer] = {
    "gptqmodel-4": _gptqmodel(4),
    "gptqmodel-3": _gptqmodel(3),
    "gptqmodel-2": _gptqmodel(2),
    "gptqmodel-mixed": _gptqmodel(4, plan=PLAN),
    "llmcompressor": Peer("llmcompressor", "llmcompressor", "peer_llmcompressor", {"bits": 3, "group_size": 128}),
    "auto-round": Peer("auto-round", "auto-round", "peer_auto_round", {"bits": 3, "group_size": 128, "iters": 50}),
    "hqq": Peer("hqq", "hqq", "peer_hqq", {"bits": 3, "group_size": 128}),
    "bitsandbytes": Peer("bitsandbytes", "transformers", "peer_transformers", {"config": "bitsandbytes"}),
    "quanto": Peer("optimum-quanto", "transformers", "peer_transformers", {"config": "quanto"}),
    "torchao": Peer("torchao", "transformers", "peer_transformers", {"config": "torchao"}),
}
"""By the name that `--peers` takes and that the row has."""


def find_peers(names: str) -> dict[str, Peer]:
    """The peers of a list of names with commas between; `"all"` is all of them.

    Raises:
        ValueError: a name is none of `PEERS`.
    """
    wanted = list(PEERS) if names == "all" else [name for name in names.split(",") if name]
    unknown = [name for name in wanted if name not in PEERS]
    if unknown or not wanted:
        raise ValueError(f"`peers` must be some of {', '.join(PEERS)}, but is {names!r}")
    return {name: PEERS[name] for name in wanted}
