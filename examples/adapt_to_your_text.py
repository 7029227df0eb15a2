"""Adapt a compiled model to text of your own while it stays loaded, and measure what that gains.

python examples/adapt_to_your_text.py --model allenai/OLMoE-1B-7B-0924 --text support.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler import dynamo_compile
from moe_compiler.data import load_samples
from moe_compiler.embedded import MODEL_FOLDER, load_text
from moe_compiler.evaluate import perplexity


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or name on the hub, compiled or not")
    parser.add_argument("--text", type=Path, help="a file of text (default: generated records)")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on, of each text, and to adapt to")
    parser.add_argument("--profile", type=Path, default=Path("yours.safetensors"), help="file to keep the result in")
    options = parser.parse_args(arguments)
    name = MODEL_FOLDER if options.model == "embedded" else options.model

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    if not hasattr(model, "runtime"):  # not compiled yet
        calibration = {domain: [load_text(domain, "train", 4 * options.tokens)] for domain in ("docs", "code")}
        dynamo_compile(model, calibration, tokenizer=tokenizer, target_bits=3.2, pool_fraction=0.02)

    text = options.text.read_text() if options.text else load_text("records", "train", 8 * options.tokens)
    windows = load_samples(
        [text], name="yours", tokenizer=tokenizer, sequence_length=256, max_tokens=2 * options.tokens
    )
    half = len(windows) // 2
    if not half:
        parser.error("the text is too short: it must have at least two windows of 256 tokens")
    held_out = windows[half:]
    before = perplexity(model, held_out)
    print(model.runtime.adapt(windows[:half], name="yours"))
    print(f"perplexity on the other half of the text: {before:.3f}, adapted {perplexity(model, held_out):.3f}")

    model.runtime.save("yours", options.profile)
    model.runtime.revert()
    print(f"{options.profile} holds the profile; the model computes what it did after compiling")


if __name__ == "__main__":
    main()
