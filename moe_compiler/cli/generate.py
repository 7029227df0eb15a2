"""`moe-compiler generate`: continues a text, token by token."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from moe_compiler.cli.models import load, switch_profile
from moe_compiler.cli.output import print_json
from moe_compiler.cli.parser import UsageError


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
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"`--chat` needs a tokenizer with a chat template, but that of {options.model!r} has none")
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
