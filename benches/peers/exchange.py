"""What passes between the driver and a peer's process, as files: token ids and settings there, figures back.

Needs PyTorch alone, so that it runs in the peers' virtual environments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from storage import Storage
from torch import Tensor, nn

Windows = Mapping[str, list[Tensor]]
"""By domain, windows of token ids."""


@dataclass(frozen=True)
class Task:
    """What a peer has to do.

    Attributes:
        model: folder of the original model.
        expert_weights: how many weights its experts have.
        calibration: windows to calibrate on, by seen domain.
        evaluation: windows to measure on, by domain.
        settings: of the peer, see `registry.Peer`.
        seed: of everything that draws.
        folder: for the peer's files; it is deleted afterwards.
    """

    model: str
    expert_weights: int
    calibration: Windows
    evaluation: Windows
    settings: Mapping[str, Any]
    seed: int
    folder: Path

    def save(self, path: Path) -> None:
        """Writes the task."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        windows = {"calibration": dict(self.calibration), "evaluation": dict(self.evaluation)}
        torch.save({**plain, **windows, "settings": json.dumps(dict(self.settings)), "folder": str(self.folder)}, path)

    @classmethod
    def load(cls, path: Path) -> Task:
        """Reads what `save` wrote."""
        data = torch.load(path, weights_only=True)
        return cls(**{**data, "settings": json.loads(data["settings"]), "folder": Path(data["folder"])})

    @property
    def samples(self) -> list[Tensor]:
        """The calibration windows of all domains, one after the other."""
        return [window for windows in self.calibration.values() for window in windows]


@dataclass(frozen=True)
class Quantized:
    """What a peer made of the model.

    Attributes:
        model: runs as the peer's own code runs it, or with dequantized weights where `note` says so.
        storage: what the experts take.
        bits_source: as in `accuracy_rows.Row`.
        code_bits: mean width of the experts' codes; 16 where they are as they were.
        seconds: to quantize, without loading and saving.
        note: anything a reader must know.
    """

    model: nn.Module
    storage: Storage
    bits_source: str
    code_bits: float
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        tool: name and version of the package.
        status: `"ok"` or the error.
        figures: fields of `accuracy_rows.Row`, by name.
        nll: by domain, the negative log-likelihood of each window.
    """

    tool: str
    status: str = "ok"
    figures: Mapping[str, Any] = field(default_factory=dict)
    nll: Mapping[str, list[float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the outcome as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Reads what `save` wrote."""
        return cls(**json.loads(path.read_text()))
