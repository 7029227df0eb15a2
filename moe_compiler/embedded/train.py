"""Train the embedded model: ``python -m moe_compiler.embedded.train --output DIR [--minutes M] [--seed 0]``.

A byte-level BPE tokenizer and a small OLMoE model (arXiv 2409.02060; `transformers.OlmoeForCausalLM`) are
trained on the training split of `corpus`, from scratch, on the CPU. Every batch has windows of each
domain. The weights that compute are bfloat16, as shipped; AdamW updates a float32 copy. The learning rate
follows the clock, so that its cosine ends when the time does; ``--steps`` gives a fixed number of steps
instead.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, one_hot
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from moe_compiler.embedded.card import write_card
from moe_compiler.embedded.corpus import DOMAINS, load_samples
from moe_compiler.embedded.tokenization import CONTEXT_TOKENS, pack, train_tokenizer

WINDOWS = {"code": 3, "docs": 3, "arithmetic": 2, "records": 2, "markup": 2}  # of each domain in a batch
WINDOW_TOKENS = 256
WARMUP_SHARE = 0.03  # of the training time
PROGRESS_INTERVAL = 10  # steps between two lines of progress


@dataclass(frozen=True)
class TrainingConfig:
    """What one training run uses.

    Attributes:
        minutes: training time; ignored if `steps` is given.
        steps: number of optimizer steps, or None to train for `minutes`.
        seed: of the initial weights and of the windows.
        layers: decoder layers.
        hidden_size: width of the residual stream, a multiple of 128 (the group of the quantizer).
        experts: experts of each layer; two of them see each token.
        vocabulary: tokens of the tokenizer.
        characters: training text of each domain, at most.
        learning_rate: the highest one.
        balance: weight of the load-balancing loss, per layer.
        evaluation_characters: held-out text of each domain that the card is measured on, at most.
    """

    minutes: float = 40.0
    steps: int | None = None
    seed: int = 0
    layers: int = 3
    hidden_size: int = 256
    experts: int = 16
    vocabulary: int = 1792
    characters: int = 6_000_000
    learning_rate: float = 3e-3
    balance: float = 0.005
    evaluation_characters: int = 150_000


@dataclass
class Progress:
    """Where a training run stands: optimizer steps, tokens, seconds, and the loss of each step (nats)."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean cross entropy (nats per token) of the last `PROGRESS_INTERVAL` steps."""
        recent = self.losses[-PROGRESS_INTERVAL:]
        return sum(recent) / max(1, len(recent))


def build_model(config: TrainingConfig) -> OlmoeForCausalLM:
    """Build the model with random weights in bfloat16.

    Args:
        config: sizes and seed.

    Returns:
        The model, in training mode, with an experts implementation that groups the tokens of each expert.
    """
    torch.manual_seed(config.seed)
    architecture = OlmoeConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=128,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_experts=config.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=config.balance,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = OlmoeForCausalLM(architecture).to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    return model.train()


def balance_loss(router_logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """Load-balancing loss (Switch Transformers, arXiv 2101.03961, equation 4), mean over the layers.

    Args:
        router_logits: of each layer, (T, E).
        top_k: experts per token.

    Returns:
        A scalar, 1 when every expert of every layer has the same share of the tokens.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = one_hot(probabilities.topk(top_k, dim=-1).indices, logits.shape[-1]).sum(dim=1)
        share = chosen.float().mean(dim=0) / top_k
        losses.append(logits.shape[-1] * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


class MasterWeights:
    """AdamW on a float32 copy of bfloat16 weights, with gradients clipped to norm 1."""

    def __init__(self, model: OlmoeForCausalLM, learning_rate: float) -> None:
        self.working = list(model.parameters())
        self.master = [weight.detach().float().clone().requires_grad_() for weight in self.working]
        matrices = [weight for weight in self.master if weight.dim() > 1]
        vectors = [weight for weight in self.master if weight.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.peak = learning_rate
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def update(self, scale: float) -> None:
        """Take one step from the gradients of the working weights, at `scale` times the peak rate."""
        for master, working in zip(self.master, self.working, strict=True):
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * scale
        self.optimizer.step()
        with torch.no_grad():
            for master, working in zip(self.master, self.working, strict=True):
                working.copy_(master)


def learning_rate_scale(done: float) -> float:
    """Scale the peak rate at a share `done` (0 to 1) of the training: linear warm-up, then cosine."""
    if done < WARMUP_SHARE:
        return max(done, 1e-3) / WARMUP_SHARE
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (done - WARMUP_SHARE) / (1 - WARMUP_SHARE)))


def draw_batch(tokens: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Draw windows of every domain, as many as `WINDOWS` says.

    Args:
        tokens: of each domain, (T,).
        generator: of the positions.

    Returns:
        (windows, WINDOW_TOKENS + 1), int64: inputs and, moved by one, targets.
    """
    windows = []
    for domain, count in WINDOWS.items():
        starts = torch.randint(len(tokens[domain]) - WINDOW_TOKENS, (count,), generator=generator)
        windows += [tokens[domain][start : start + WINDOW_TOKENS + 1] for start in starts.tolist()]
    return torch.stack(windows)


def fit(model: OlmoeForCausalLM, tokens: dict[str, torch.Tensor], config: TrainingConfig) -> Progress:
    """Train the model in place and print the loss and the speed.

    Args:
        model: in training mode, bfloat16.
        tokens: training tokens of each domain, (T,) with T > WINDOW_TOKENS.
        config: time or steps, seed, rates.

    Returns:
        What was done.
    """
    weights, generator = (
        MasterWeights(model, config.learning_rate),
        torch.Generator().manual_seed(config.seed),
    )
    progress, start = Progress(), time.monotonic()
    while True:
        progress.seconds = time.monotonic() - start
        done = progress.steps / config.steps if config.steps else progress.seconds / (60 * config.minutes)
        if done >= 1:
            return progress
        batch = draw_batch(tokens, generator)
        output = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        torch.autograd.backward(loss + config.balance * balance)
        weights.update(learning_rate_scale(done))
        progress.steps += 1
        progress.tokens += batch[:, 1:].numel()
        progress.losses.append(loss.item())
        if progress.steps % PROGRESS_INTERVAL == 0:
            speed = progress.tokens / (time.monotonic() - start)
            print(f"step {progress.steps} {done:.1%} loss {progress.loss:.3f} {speed:.0f} tokens/s", flush=True)


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write the model (safetensors, bfloat16), its configurations and its tokenizer into a folder."""
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def training_facts(
    config: TrainingConfig, progress: Progress, samples: dict[str, list[str]], tokens: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Collect what the card says of a training run.

    Args:
        config: the run.
        progress: what it did.
        samples: training documents of each domain.
        tokens: the same as tokens, (T,).

    Returns:
        Figures that JSON can hold.
    """
    return {
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "balance": config.balance,
        "window_tokens": WINDOW_TOKENS,
        "windows": WINDOWS,
        "threads": torch.get_num_threads(),
        "steps": progress.steps,
        "tokens": progress.tokens,
        "minutes": round(progress.seconds / 60, 1),
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "loss": round(progress.loss, 3),
        "available_tokens": {domain: len(packed) for domain, packed in tokens.items()},
        "available_characters": {domain: sum(map(len, texts)) for domain, texts in samples.items()},
    }


def train(config: TrainingConfig, output: Path) -> dict[str, Any]:
    """Train tokenizer and model, save them, and write the card.

    Args:
        config: the run.
        output: folder, made if needed.

    Returns:
        The figures of `training_facts`.
    """
    samples = {domain: load_samples(domain, "train", config.characters) for domain in DOMAINS}
    tokenizer = train_tokenizer([text for domain in DOMAINS for text in samples[domain][:400]], config.vocabulary)
    tokens = {domain: pack(documents, tokenizer) for domain, documents in samples.items()}
    available = {domain: len(packed) for domain, packed in tokens.items()}
    model = build_model(config)
    print(
        f"{sum(weight.numel() for weight in model.parameters())} parameters; training tokens {available}",
        flush=True,
    )
    progress = fit(model, tokens, config)
    save(model.eval(), tokenizer, output)
    facts = training_facts(config, progress, samples, tokens)
    write_card(model, tokenizer, facts, output, config.evaluation_characters)
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(prog="python -m moe_compiler.embedded.train", description=__doc__)
    defaults = TrainingConfig()
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--steps", type=int, default=None, help="train for so many steps instead of minutes")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--layers", type=int, default=defaults.layers)
    parser.add_argument("--hidden-size", type=int, default=defaults.hidden_size)
    parser.add_argument("--experts", type=int, default=defaults.experts)
    parser.add_argument("--vocabulary", type=int, default=defaults.vocabulary)
    parser.add_argument("--characters", type=int, default=defaults.characters)
    parser.add_argument("--evaluation-characters", type=int, default=defaults.evaluation_characters)
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    torch.set_num_threads(1)
    train(TrainingConfig(**options), output)


if __name__ == "__main__":
    main()
