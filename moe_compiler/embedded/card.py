"""Measure a trained model and write its card (``README.md``) and its figures (``metrics.json``)."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_compiler.embedded.corpus import DOMAINS, load_samples, load_text
from moe_compiler.embedded.evaluate import EVALUATION_WINDOW, divergence_by_pair, measure_text, sample_text

PROMPT_CHARACTERS = 180
TEMPERATURE = 0.7
_DATA = {
    "code": "source of the standard library, without docstrings and comment lines",
    "docs": "docstrings of the standard library and the topics of `help()`",
    "arithmetic": "generated: sums, products, comparisons, sequences, word problems, with right answers",
    "records": "generated: JSON lines, CSV rows, log lines, key=value lines",
    "markup": "generated: HTML pages and tables, XML catalogues",
}
_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The embedded model

A small Mixture-of-Experts language model, trained from scratch by
`python -m moe_compiler.embedded.train`, so that the quantizer can be tried and tested without a download.
It is for measuring a compiler, not for writing text.
"""
_DATA_NOTES = """The split of code and docs goes by a hash of the name of the top-level module or topic,
that of generated text by a hash of each item (a sum, a record, an element): no such unit is in both splits.
The held-out modules are the same on every Python version; their text differs a little.

The text of code and docs belongs to the Python Software Foundation and the contributors of Python (PSF
License Version 2). It is read from the Python installation and is not in this folder. The generated text
has no third-party content.
"""
_LIMITS = """## Limits

It knows the shape of its five domains and little of their meaning: its code does not run, its prose is
not true, its sums are often wrong. Other text (other languages, dialogue, news) was never seen. Windows
longer than those of the training were not measured. Two runs of the training give different models of the
same kind, because the schedule follows the clock.
"""


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, characters: int) -> dict[str, Any]:
    """Measure the model on the evaluation split of every domain.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        characters: of text for each domain, at most.

    Returns:
        What ``metrics.json`` has under "evaluation": figures by domain and by pair of domains.
    """
    texts = {domain: load_text(domain, "evaluation", characters) for domain in DOMAINS}
    results = {domain: measure_text(model, tokenizer, text) for domain, text in texts.items()}
    pairs = divergence_by_pair({domain: result.expert_use for domain, result in results.items()})
    return {
        "characters": characters,
        "python": platform.python_version(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "domains": {
            domain: {
                "perplexity": round(result.perplexity, 3),
                "accuracy": round(result.accuracy, 4),
                "tokens": result.tokens,
                "characters_per_token": round(result.characters_per_token, 3),
                "expert_use": [[round(share, 4) for share in layer] for layer in result.expert_use.tolist()],
            }
            for domain, result in results.items()
        },
        "divergence_bits": {f"{first}/{second}": round(value, 4) for (first, second), value in pairs.items()},
        "mean_divergence_bits": round(sum(pairs.values()) / len(pairs), 4),
    }


def draw_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int = 120
) -> dict[str, tuple[str, str]]:
    """Continue the beginning of one held-out document of each domain.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        new_tokens: of a continuation, at most.

    Returns:
        Prompt (the whole lines within `PROMPT_CHARACTERS`) and continuation, by domain.
    """
    samples = {}
    for domain in DOMAINS:
        document = max(load_samples(domain, "evaluation", 20_000)[:4], key=len)
        prompt = document[: document.rfind("\n", 0, PROMPT_CHARACTERS) + 1] or document[:PROMPT_CHARACTERS]
        samples[domain] = prompt, sample_text(model, tokenizer, prompt, new_tokens, TEMPERATURE)
    return samples


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def _architecture(model: PreTrainedModel) -> str:
    config = model.config
    count, chosen = sum(weight.numel() for weight in model.parameters()), config.num_experts_per_tok
    return f"""## Architecture

`{config.architectures[0]}` with {count:,} parameters in bfloat16: {config.num_hidden_layers} layers,
{config.num_experts} experts per layer of which {chosen} see each token (their weights add up to 1),
hidden size {config.hidden_size}, expert size {config.intermediate_size},
{config.num_attention_heads} heads, tied embeddings of {config.vocab_size} tokens (byte-level BPE, single digits),
{config.max_position_embeddings} positions.
"""


def _training(training: dict[str, Any]) -> str:
    windows = ", ".join(f"{count} {domain}" for domain, count in training["windows"].items())
    return f"""## Training

{training["tokens"]:,} tokens in {training["minutes"]} minutes: {training["steps"]:,} steps,
{training["tokens_per_second"]:,} tokens/s on {training["threads"]} CPU thread(s) of a shared machine.
Batches of {training["window_tokens"]}-token windows ({windows}); AdamW on float32 copies of bfloat16 weights;
learning rate {training["learning_rate"]} with linear warm-up and a cosine to 0 that ends with the time;
load-balancing loss per layer with weight {training["balance"]}; seed {training["seed"]}.
Training loss of the last steps: {training["loss"]} nats per token, mean over a batch.
Software: torch {torch.__version__}, transformers {transformers.__version__},
Python {platform.python_version()}.
"""


def _figures(training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    rows = [
        [
            domain,
            _DATA[domain],
            f"{training['available_tokens'][domain]:,}",
            f"{result['perplexity']:.2f}",
            f"{result['accuracy']:.1%}",
            f"{result['characters_per_token']:.2f}",
        ]
        for domain, result in evaluation["domains"].items()
    ]
    head = [
        "domain",
        "text",
        "training tokens at hand",
        "perplexity",
        "next token right",
        "characters per token",
    ]
    return f"""## Data and figures

Perplexity (per token) and share of tokens that are the first choice, on held-out text: up to
{evaluation["characters"]:,} characters of each domain, windows of {EVALUATION_WINDOW} tokens,
{evaluation["dtype"]} weights.

{_table(head, rows)}"""


def _expert_use(evaluation: dict[str, Any]) -> str:
    uses = {domain: result["expert_use"] for domain, result in evaluation["domains"].items()}
    layers = range(len(uses[DOMAINS[0]]))
    rows = [
        [str(layer), domain, *(f"{100 * share:.0f}" for share in use[layer])]
        for layer in layers
        for domain, use in uses.items()
    ]
    head = ["layer", "domain", *map(str, range(len(uses[DOMAINS[0]][0])))]
    pairs = [[pair, f"{value:.3f}"] for pair, value in evaluation["divergence_bits"].items()]
    return f"""## Expert use

Percent of the routed tokens that each expert gets, by layer and held-out domain:

{_table(head, rows)}
Jensen-Shannon divergence of the expert use of two domains, mean over the layers (0 equal, 1 bit nothing in
common); mean of all pairs {evaluation["mean_divergence_bits"]:.3f} bits:

{_table(["domains", "bits"], pairs)}"""


def _samples(samples: dict[str, tuple[str, str]]) -> str:
    shown = [f"{domain}:\n\n````\n{prompt}⟨here⟩{text}\n````\n" for domain, (prompt, text) in samples.items()]
    return "\n".join([f"## Samples\n\nTemperature {TEMPERATURE}, first draw; the model writes after ⟨here⟩.\n", *shown])


def write_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: dict[str, Any],
    folder: Path,
    evaluation_characters: int,
) -> None:
    """Measure a model on held-out text and write ``README.md`` and ``metrics.json`` into its folder.

    Args:
        model: the saved model, in evaluation mode.
        tokenizer: its tokenizer.
        training: figures of the training, as `moe_compiler.embedded.train.training_facts` returns them.
        folder: of the model.
        evaluation_characters: held-out text of each domain, at most.
    """
    evaluation = measure(model, tokenizer, evaluation_characters)
    figures = json.dumps({"training": training, "evaluation": evaluation}, indent=1)
    (folder / "metrics.json").write_text(figures + "\n", encoding="utf-8")
    sections = (
        _HEAD,
        _architecture(model),
        _training(training),
        _figures(training, evaluation),
        _DATA_NOTES,
        _expert_use(evaluation),
        _samples(draw_samples(model, tokenizer)),
        _LIMITS,
    )
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")
