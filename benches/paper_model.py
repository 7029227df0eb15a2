"""Trains a small model of Qwen1.5-MoE's form on given texts, for the experiments of `bench_paper.py`.

The form: routed experts, and beside them a shared expert of four times their size behind a scalar gate
(transformers' Qwen2Moe; Qwen team, 2024, https://qwenlm.github.io/blog/qwen-moe). Optimizer, schedule and balance loss
are those of `moe_compiler.embedded.train`.

Run: python benches/paper_model.py --output DIR --domains FOLDER --minutes 20
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_data import EMBEDDED, Sources, find_domains
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_compiler.embedded import load_text
from moe_compiler.embedded.tokenization import CONTEXT_TOKENS, pack, train_tokenizer
from moe_compiler.embedded.train import MasterWeights, Progress, balance_loss, learning_rate_scale, save

SHARED_FACTOR = 4  # the shared expert's size over a routed one's
TOP_K = 4
EXPERT_SIZE = 128
PROGRESS_INTERVAL = 10  # steps between two lines of progress
_PIECE = 4096  # characters of text that are one document


@dataclass(frozen=True)
class PaperModelConfig:
    """What one training run uses.

    Attributes:
        minutes: training time; ignored if `steps` is given.
        steps: number of optimizer steps, or `None` to train for `minutes`.
        seed: of the initial weights and of the windows.
        layers: decoder layers.
        hidden_size: width of the residual stream, a multiple of 128.
        experts: routed experts of each layer, at least `TOP_K`; four of them see each token.
        vocabulary: tokens of the tokenizer, at least 258.
        characters: training text of each domain, at most.
        window: tokens of a training window.
        windows: windows in a batch, taken from the domains in turn.
        learning_rate: the highest one.
        balance: weight of the load-balancing loss, per layer.
    """

    minutes: float = 20.0
    steps: int | None = None
    seed: int = 0
    layers: int = 3
    hidden_size: int = 256
    experts: int = 16
    vocabulary: int = 1792
    characters: int = 2_000_000
    window: int = 256
    windows: int = 12
    learning_rate: float = 3e-3
    balance: float = 0.005

    def __post_init__(self) -> None:
        for name, least in (("experts", TOP_K), ("vocabulary", 258), ("characters", 1), ("window", 2), ("windows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {getattr(self, name)}")
        if self.hidden_size < 128 or self.hidden_size % 128:
            raise ValueError(f"`hidden_size` must be a multiple of 128, but is {self.hidden_size}")
        if self.window > CONTEXT_TOKENS:
            raise ValueError(f"`window` must be at most {CONTEXT_TOKENS}, but is {self.window}")
        if self.steps is None and not self.minutes > 0:
            raise ValueError(f"`minutes` must be positive, but is {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, but is {self.steps}")


def build_model(config: PaperModelConfig) -> Qwen2MoeForCausalLM:
    """The model with random weights in bfloat16, in training mode."""
    torch.manual_seed(config.seed)
    architecture = Qwen2MoeConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=SHARED_FACTOR * EXPERT_SIZE,
        moe_intermediate_size=EXPERT_SIZE,
        shared_expert_intermediate_size=SHARED_FACTOR * EXPERT_SIZE,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=config.experts,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
        router_aux_loss_coef=config.balance,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen2MoeForCausalLM(architecture).to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    return model.train()


def read_pieces(source: Sources, characters: int) -> list[str]:
    """The training text of a domain in pieces.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty.
    """
    if source.calibration.startswith(f"{EMBEDDED}:"):
        text = load_text(source.calibration.split(":")[1], "train", characters)
    else:
        path = Path(source.calibration)
        if not path.is_file():
            raise FileNotFoundError(f"`domains` must name files to train on, but there is no {path}")
        text = path.read_text()[:characters]
    if not text.strip():
        raise ValueError(f"`domains` must have text to train on, but {source.calibration} is empty")
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def fit(model: Any, tokens: Mapping[str, Tensor], config: PaperModelConfig) -> Progress:
    """Trains the model in place and prints the loss and the speed.

    Args:
        model: in training mode, bfloat16.
        tokens: training tokens of each domain, `(T,)`.
        config: time or steps, seed, rates.

    Raises:
        ValueError: a domain has fewer tokens than a window and one more.
    """
    for name, packed in tokens.items():
        if len(packed) <= config.window:
            raise ValueError(
                f"`domains` must have more than {config.window} tokens each, but {name!r} has {len(packed)}"
            )
    weights, generator = MasterWeights(model, config.learning_rate), torch.Generator().manual_seed(config.seed)
    progress, start = Progress(), time.monotonic()
    while True:
        progress.seconds = time.monotonic() - start
        done = progress.steps / config.steps if config.steps else progress.seconds / (60 * config.minutes)
        if done >= 1:
            return progress
        batch = _batch(list(tokens.values()), progress.steps * config.windows, config, generator)
        output = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        torch.autograd.backward(loss + config.balance * balance_loss(output.router_logits, TOP_K))
        weights.update(learning_rate_scale(done))
        progress.steps += 1
        progress.tokens += batch[:, 1:].numel()
        progress.losses.append(loss.item())
        if progress.steps % PROGRESS_INTERVAL == 0:
            speed = progress.tokens / (time.monotonic() - start)
            print(f"step {progress.steps} {done:.1%} loss {progress.loss:.3f} {speed:.0f} tokens/s", flush=True)


def _batch(domains: Sequence[Tensor], first: int, config: PaperModelConfig, generator: torch.Generator) -> Tensor:
    """`(windows, window + 1)`: windows of the domains in turn, from the one after the last of the batch before."""
    found = []
    for number in range(first, first + config.windows):
        packed = domains[number % len(domains)]
        start = int(torch.randint(len(packed) - config.window, (1,), generator=generator))
        found.append(packed[start : start + config.window + 1])
    return torch.stack(found)


def train(config: PaperModelConfig, domains: Mapping[str, Sources], output: Path) -> Progress:
    """Trains tokenizer and model, and saves both.

    Args:
        config: the run.
        domains: what to train on: the calibration text of each.
        output: folder, made if needed.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a text is empty or too short.
    """
    pieces = {name: read_pieces(source, config.characters) for name, source in domains.items()}
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(
        [text for texts in pieces.values() for text in texts[:400]], config.vocabulary
    )
    tokens = {name: pack(texts, tokenizer) for name, texts in pieces.items()}
    model = build_model(config)
    print(
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters; training tokens "
        + ", ".join(f"{name} {len(packed):,}" for name, packed in tokens.items()),
        flush=True,
    )
    progress = fit(model, tokens, config)
    save(model.eval(), tokenizer, output)
    print(f"{progress.steps} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s, loss {progress.loss:.3f}")
    return progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    defaults = PaperModelConfig()
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--domains", nargs="+", default=[EMBEDDED], metavar="FOLDER or NAME=TRAINING,EVALUATION",
        help="as for bench_paper.py; the model is trained on the first file of each")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--steps", type=int, help="train for so many steps instead of minutes")
    for name in ("seed", "layers", "hidden_size", "experts", "vocabulary", "characters", "window", "windows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    options = vars(parser.parse_args(arguments))
    output, domains = options.pop("output"), find_domains(options.pop("domains"))
    train(PaperModelConfig(**options), domains, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
