"""Peak memory of `dynamo_compile` on a random model, against the model's own size.

Contract: compiling holds at most the original model, one window of layers' working set (Hessians, bounded by
`hessian_memory_bytes` but for at least one layer, and GPTQ's chunks) and what has been packed so far.

Run: python benches/bench_compile_memory.py --layers 8
"""

from __future__ import annotations

import argparse
import resource
import sys

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_compiler import dynamo_compile


def peak_mib() -> float:
    """The largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """The resident set of this process, in MiB (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, default=512)
    options = parser.parse_args()
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_experts=options.experts,
        num_experts_per_tok=2,
        pad_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    before = resident_mib()
    model = OlmoeForCausalLM(config).to(torch.bfloat16).eval()
    experts = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n) / 2**20
    loaded = resident_mib()
    windows = torch.randint(0, 1024, (16, 128))
    with torch.no_grad():
        model(input_ids=windows[:8], use_cache=False)
    warm, warm_peak = resident_mib(), peak_mib()
    dynamo_compile(model, {"random": windows}, target_bits=3.3, hessian_memory_bytes=1, progress=False)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, CPU")
    print(
        f"{options.layers} layers of {options.experts} experts, H {options.hidden_size}, I {options.intermediate_size}"
    )
    print(f"model in bf16           {loaded - before:8.0f} MiB, of which experts {experts:.0f} MiB")
    print(f"experts of one layer    {experts / options.layers:8.1f} MiB")
    print(f"after a forward pass    {warm:8.0f} MiB resident, peak so far {warm_peak:.0f} MiB")
    print(f"peak while compiling    {peak_mib():8.0f} MiB, {peak_mib() - warm_peak:.0f} MiB more")
    print(f"after compiling         {resident_mib():8.0f} MiB resident")


if __name__ == "__main__":
    main()
