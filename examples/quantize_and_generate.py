"""Quantize a model, save it, load it again with transformers, and let it write.

python examples/quantize_and_generate.py --model allenai/OLMoE-1B-7B-0924 --output olmoe-3bit
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler import dynamo_compile
from moe_compiler.embedded import MODEL_FOLDER, load_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or name on the hub (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on, of each text")
    parser.add_argument("--bits", type=float, default=3.2, help="effective bits per expert weight, at most")
    parser.add_argument("--strategy", default="budget", help="who decides the widths (default: %(default)s)")
    parser.add_argument("--quantizer", default="gptq", help="gptq, hqq or, the fastest, rtn (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("compiled"), help="folder to save in")
    parser.add_argument("--prompt", default="def read(path):\n    ")
    options = parser.parse_args(arguments)
    name = MODEL_FOLDER if options.model == "embedded" else options.model

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    calibration = {domain: [load_text(domain, "train", 4 * options.tokens)] for domain in ("docs", "code")}
    dynamo_compile(
        model,
        calibration,
        tokenizer=tokenizer,
        target_bits=options.bits,
        strategy=options.strategy,
        quantizer=options.quantizer,
    )
    report = model.moe_report
    print(f"{report.code_bits:.2f} code bits, {report.effective_bits:.2f} effective bits per expert weight")

    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    loaded = AutoModelForCausalLM.from_pretrained(options.output)
    inputs = tokenizer(options.prompt, return_tensors="pt")
    tokens = loaded.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
