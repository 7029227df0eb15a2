"""The texts of an accuracy run: for each domain one to calibrate on and one, held out, to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_windows import load_windows
from torch import Tensor

from moe_compiler.embedded import DOMAINS, load_model, load_text
from moe_compiler.sources import read_texts

EMBEDDED = "embedded"
CALIBRATION, EVALUATION = ".calib.txt", ".eval.txt"
_CHARACTERS = 8  # per token, more than any text here has
_TOKENS_OF_A_TEXT = 32  # a text of a hub data set has more on average

Windows = Mapping[str, list[Tensor]]
"""By domain, windows of token ids."""


@dataclass(frozen=True)
class Sources:
    """Where the texts of a domain are: files, or names that `moe_compiler.sources.read_texts` knows.

    Attributes:
        calibration: to calibrate on or adapt to.
        evaluation: held out.
    """

    calibration: str
    evaluation: str


@dataclass(frozen=True)
class Texts:
    """What an accuracy run reads.

    Attributes:
        seen: the domains to calibrate on.
        new: the others.
        calibration: of each domain, the windows to calibrate on where it is seen.
        adaptation: of each new domain, the windows to adapt to.
        evaluation: of each domain, held-out windows.
    """

    seen: tuple[str, ...]
    new: tuple[str, ...]
    calibration: Windows
    adaptation: Windows
    evaluation: Windows

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains, those seen first."""
        return *self.seen, *self.new

    def describe(self, window: int) -> str:
        """The tokens of each kind in one sentence."""

        def tokens(windows: Windows) -> str:
            numbers = sorted({len(one) * window for one in windows.values()})
            return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"

        calibrated = {name: self.calibration[name] for name in self.seen}
        adapted = f"adapted to {tokens(self.adaptation)} of each new one ({', '.join(self.new)}), " if self.new else ""
        return (
            f"Calibrated on {tokens(calibrated)} tokens of each seen domain ({', '.join(self.seen)}), {adapted}"
            f"evaluated on {tokens(self.evaluation)} held-out tokens of each, in windows of {window}."
        )


def find_domains(arguments: Sequence[str]) -> dict[str, Sources]:
    """The domains that the command line names, in order.

    Args:
        arguments: each a folder with files `NAME.calib.txt` and `NAME.eval.txt`, or `NAME=CALIBRATION,EVALUATION` with
            files or sources of `moe_compiler.sources.read_texts`, or `embedded` for the domains of the embedded model.

    Raises:
        ValueError: an argument is none of these, a folder has no such pair, or a domain occurs twice.
    """
    found: dict[str, Sources] = {}
    for argument in arguments:
        if argument == EMBEDDED:
            pairs = {name: Sources(f"{EMBEDDED}:{name}:train", f"{EMBEDDED}:{name}:evaluation") for name in DOMAINS}
        elif "=" in argument:
            pairs = _pair(argument)
        else:
            pairs = _folder(Path(argument))
        for name, sources in pairs.items():
            if name in found:
                raise ValueError(f"`domains` must name each domain once, but {name!r} occurs twice")
            found[name] = sources
    return found


def _pair(argument: str) -> dict[str, Sources]:
    name, _, rest = argument.partition("=")
    parts = rest.split(",")
    if not name or name.split() != [name] or len(parts) != 2 or not all(parts):
        raise ValueError(f"`domains` must be folders or NAME=CALIBRATION,EVALUATION, but one is {argument!r}")
    return {name: Sources(*parts)}


def _folder(folder: Path) -> dict[str, Sources]:
    pairs = {}
    for path in sorted(folder.glob(f"*{CALIBRATION}")):
        name = path.name.removesuffix(CALIBRATION)
        held_out = folder / f"{name}{EVALUATION}"
        if held_out.is_file():
            pairs[name] = Sources(str(path), str(held_out))
    if not pairs:
        raise ValueError(
            f"`domains` must be a folder with files NAME{CALIBRATION} and NAME{EVALUATION}, but is {folder}"
        )
    return pairs


def choose_domains(
    sources: Mapping[str, Sources], seen: Sequence[str], new: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The domains to calibrate on and the others.

    Args:
        sources: all that are there.
        seen: the first kind, at least one.
        new: the second kind; all that are left if `None`.

    Raises:
        ValueError: a name is unknown or in both, or there is none to calibrate on.
    """
    chosen = tuple(name for name in sources if name not in seen) if new is None else tuple(new)
    for kind, names in (("seen", seen), ("new", chosen)):
        unknown = [name for name in names if name not in sources]
        if unknown:
            raise ValueError(f"`{kind}` must name some of {', '.join(sources)}, but names {', '.join(unknown)}")
    both = [name for name in chosen if name in seen]
    if both or not seen:
        raise ValueError(
            f"`seen` must name at least one domain and none that is new, but names {', '.join(both) or 'none'}"
        )
    return tuple(seen), chosen


def read_domains(
    sources: Mapping[str, Sources],
    seen: Sequence[str],
    new: Sequence[str],
    tokenizer: Any,
    *,
    window: int,
    calibration_tokens: int,
    adapt_tokens: int,
    evaluation_tokens: int,
) -> Texts:
    """Reads and tokenizes the domains.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: a text is shorter than one window.
    """

    def windows(source: str, tokens: int) -> list[Tensor]:
        return load_windows(tokenizer, _text(source, tokens), window, tokens)

    return Texts(
        tuple(seen),
        tuple(new),
        {name: windows(sources[name].calibration, calibration_tokens) for name in (*seen, *new)},
        {name: windows(sources[name].calibration, adapt_tokens) for name in new},
        {name: windows(sources[name].evaluation, evaluation_tokens) for name in (*seen, *new)},
    )


def _text(source: str, tokens: int) -> str:
    if source.startswith(f"{EMBEDDED}:"):
        _, domain, split = source.split(":")
        return load_text(domain, "train" if split == "train" else "evaluation", _CHARACTERS * tokens)
    if Path(source).suffix == ".txt" and Path(source).is_file():
        return Path(source).read_text()
    return "\n\n".join(read_texts(source, max_texts=None if Path(source).exists() else tokens // _TOKENS_OF_A_TEXT + 1))


def load_original(name: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """The original model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, a name on the Hugging Face hub, or `embedded`.
        dtype: of its weights: `"auto"` (the checkpoint's) or a floating-point type of PyTorch by name.
        device: where to.

    Raises:
        ValueError: there is no such type.
        OSError: there is no such model.
    """
    wanted = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if wanted != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"`dtype` must be auto or a floating-point type such as bfloat16, but is {dtype!r}")
    if name == EMBEDDED:
        model, tokenizer = load_model(torch.float32 if wanted == "auto" else wanted)
        return model.to(device), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted)
    return model.eval().to(device), AutoTokenizer.from_pretrained(name)
