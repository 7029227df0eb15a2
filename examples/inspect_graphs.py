"""Look inside a compiled model: the graphs of one MoE block, where an operator lies in them, and how wide experts are.

python examples/inspect_graphs.py --model allenai/OLMoE-1B-7B-0924
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler import dynamo_compile, explain
from moe_compiler.embedded import MODEL_FOLDER, load_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or name on the hub, compiled or not")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on, of each text")
    options = parser.parse_args(arguments)
    name = MODEL_FOLDER if options.model == "embedded" else options.model

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    if not hasattr(model, "runtime"):  # not compiled yet
        calibration = {domain: [load_text(domain, "train", 4 * options.tokens)] for domain in ("docs", "code")}
        dynamo_compile(model, calibration, tokenizer=tokenizer, target_bits=3.2)

    first = next(iter(model.moe_graphs))
    explain(model, layers=[first])  # captured, observed, lowered

    print("operators in the lowered graph and in the graphs inside it:")
    modules = (module for module in model.moe_graphs[first].modules() if hasattr(module, "graph"))
    nodes = (node for module in modules for node in module.graph.nodes if node.op == "call_function")
    for operator, count in Counter(str(node.target) for node in nodes).items():
        if operator.startswith("moe_compiler."):
            print(f"    {count} x {operator}")

    print("experts by width:")
    for path, layer in model.runtime.layers.items():
        for linear, packed in layer.experts.all_packed().items():
            widths = ", ".join(f"{number} x INT{bits}" for bits, number in sorted(Counter(packed.bits).items()))
            print(f"    {path} {linear}: {widths}")


if __name__ == "__main__":
    main()
