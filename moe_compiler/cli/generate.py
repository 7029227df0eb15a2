"""`moe-compiler generate`: continues a text, token by token."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from moe_compiler.cli.models import add_loading_options, load, switch_profile
from moe_compiler.cli.names import MODEL_HELP
from moe_compiler.cli.output import print_json
from moe_compiler.cli.parser import UsageError
from moe_compiler.cli.texts import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines the command's options."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="what to continue")
    text.add_argument("--prompt-file", metavar="FILE", help="a file of what to continue; - is standard input")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template, as a user's turn"
    )
    parser.add_argument("--profile", metavar="NAME", help="profile to generate with")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="at most so many (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON at the end instead of text as it comes")
    add_loading_options(parser)


def run(options: argparse.Namespace) -> None:
    """Generates, printing text as it comes; speed goes to standard error."""
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UsageError(
            "`--temperature` must not be negative and `--top-p` must lie in (0, 1], "
            f"but they are {options.temperature} and {options.top_p}"
        )
    prompt = _prompt(options)
    model, tokenizer = load(options.model, options)
    switch_profile(model, options.profile)
    if options.chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not options.chat).to(model.device)
    if not inputs["input_ids"].numel():
        raise ValueError("`--prompt` must have at least one token, but has none")
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    streamer = None if options.json else TextStreamer(tokenizer, skip_prompt=options.chat, skip_special_tokens=True)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=options.max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - start
    new = output[0, inputs["input_ids"].shape[1] :]
    if options.json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print_json({"prompt": prompt, "text": text, "new_tokens": new.numel(), "seconds": seconds})
        return
    print(f"{new.numel()} tokens in {seconds:.2f} s, {new.numel() / seconds:.1f} tokens/s", file=sys.stderr)


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        return str(options.prompt)
    if options.prompt_file == "-":
        return sys.stdin.read()
    return Path(options.prompt_file).read_text(encoding="utf-8")
