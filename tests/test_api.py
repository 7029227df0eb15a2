"""`dynamo_compile` as a whole: what it returns, what it refuses, and that it stays a Hugging Face model."""

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import deepseek_v1
import pytest
import torch
from architectures import architecture_names, build
from rich.console import Console
from tiny import VOCABULARY, datasets, olmoe, qwen2_moe, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import moe_compiler
from moe_compiler import CompileConfig, api, dynamo_compile
from moe_compiler.evaluate import perplexity
from moe_compiler.inspection import readable
from moe_compiler.passes.lower import LoweredExperts

QUIET: dict[str, Any] = {"progress": False, "target_bits": 3.6}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture(scope="module")
def compiled() -> Any:
    return dynamo_compile(olmoe(), datasets(), **QUIET)


def test_it_returns_the_same_object_rewritten(compiled: Any) -> None:
    model = qwen2_moe()
    kind = type(model)
    assert dynamo_compile(model, datasets(), **QUIET) is model
    assert type(model) is kind
    assert list(model.moe_graphs) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for path, graph in model.moe_graphs.items():
        assert isinstance(graph, torch.fx.GraphModule)
        assert model.get_submodule(path) is graph
        assert "packed_experts" in graph.experts.code
    assert not model.training


@pytest.mark.parametrize("strategy", ["dynamo", "moqa", "uniform", "random", "pooled", "budget"])
def test_every_strategy_meets_the_target_measured_on_the_buffers(strategy: str) -> None:
    model = dynamo_compile(olmoe(), datasets(), strategy=strategy, target_bits=4.5, progress=False)
    report = model.moe_report
    assert report.plan.strategy == strategy
    assert report.effective_bits <= 4.5 + 1e-9
    stored = sum(
        buffer.numel() * buffer.element_size()
        for module in model.modules()
        if isinstance(module, LoweredExperts)
        for buffer in module.state_dict().values()
    )
    weights = sum(entry.weights for entry in report.coverage if entry.kind == "experts")
    assert report.effective_bits == pytest.approx(8 * stored / weights)
    if strategy != "uniform":
        assert report.effective_bits > 3.9


@pytest.mark.parametrize("quantizer", ["gptq", "rtn", "hqq"])
def test_more_bits_come_closer_to_the_original(quantizer: str) -> None:
    original = olmoe()
    ids = tokens(4, 16, 8)
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        errors = []
        for bits in (2, 4, 8):
            model = dynamo_compile(
                copy.deepcopy(original),
                datasets(),
                strategy="uniform",
                uniform_bits=bits,
                target_bits=None,
                quantizer=quantizer,
                progress=False,
            )
            errors.append(float((model(input_ids=ids).logits - expected).norm() / expected.norm()))
    assert errors[0] > 2 * errors[1]
    assert errors[1] > 2 * errors[2]
    assert errors[2] < 0.05


def test_without_a_target_the_clustering_decides() -> None:
    model = dynamo_compile(olmoe(), datasets(), strategy="dynamo", target_bits=None, progress=False)
    assert model.moe_report.plan.target_bits is None
    assert len(model.moe_report.plan.histogram()) > 1


def test_layers_are_quantized_in_windows_where_memory_is_short(compiled: Any) -> None:
    windowed = dynamo_compile(olmoe(), datasets(), hessian_memory_bytes=1, **QUIET)
    assert windowed.moe_report.effective_bits == compiled.moe_report.effective_bits
    first = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(windowed.state_dict()[first], compiled.state_dict()[first])


def test_the_same_seed_gives_the_same_codes(compiled: Any) -> None:
    again = dynamo_compile(olmoe(), datasets(), **QUIET).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in compiled.state_dict().items())


def test_experts_that_never_fire_are_quantized_and_named() -> None:
    model = olmoe()
    with torch.no_grad():  # two pairs of opposite routers: two of those four always beat a logit of zero
        for layer in model.model.layers:
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[3] = -layer.mlp.gate.weight[2]
            layer.mlp.gate.weight[4:] = 0
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        dynamo_compile(model, datasets(), **QUIET)
        error = (model(input_ids=ids).logits - expected).norm() / expected.norm()
    assert error < 1
    blended = model.moe_report.blended["model.layers.0.mlp"]["down_proj"]
    assert set(blended) >= {4, 5, 6, 7}


def test_text_calibrates_through_a_tokenizer() -> None:
    text = " ".join(f"w{i}" for i in tokens(1, 400)[0].tolist())
    model = dynamo_compile(olmoe(), {"words": [text]}, tokenizer=tokenizer(), **QUIET)
    report = model.runtime.adapt([text], name="words again")
    assert report.tokens == 400


def test_generate_pipeline_and_copies_work(compiled: Any) -> None:
    ids = tokens(1, 6)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = compiled.generate(ids, **options)
    assert expected.shape == (1, 14)
    static = compiled.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, expected)
    assert torch.equal(copy.deepcopy(compiled).generate(ids, **options), expected)
    compiled.generation_config = GenerationConfig(pad_token_id=0)
    generate = pipeline("text-generation", model=compiled, tokenizer=tokenizer())
    text = generate("w3 w4 w5", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w3 w4 w5")


@pytest.mark.parametrize("name", ["deepseek_v1", *(n for n in ("gemma4", "gpt_oss") if n in architecture_names())])
def test_other_forms_of_experts_go_all_the_way(name: str) -> None:
    model = deepseek_v1.build() if name == "deepseek_v1" else build(name)
    ids = tokens(6, 24, high=90)
    dynamo_compile(
        model,
        {"some": ids},
        strategy="dynamo",
        target_bits=None,
        pool_fraction=0.05,
        cache_fraction=0.5,
        progress=False,
    )
    with torch.no_grad():
        before = model(input_ids=ids[:2], use_cache=False).logits
        report = model.runtime.adapt(tokens(4, 24, 5, high=30), name="others")
        assert sum(change.used for layer in report.layers for change in layer.linears) > 0
        assert not torch.equal(model(input_ids=ids[:2], use_cache=False).logits, before)
        model.runtime.revert()
        assert torch.equal(model(input_ids=ids[:2], use_cache=False).logits, before)
    assert all("packed_expert" in readable(graph) for graph in model.moe_graphs.values())
    moe_compiler.explain(model, console=Console(file=io.StringIO()))


def test_router_logits_are_still_recorded(compiled: Any) -> None:
    with torch.no_grad():
        output = compiled(input_ids=tokens(2, 5), output_router_logits=True, use_cache=False)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(10, 8), (10, 8)]


def test_perplexity_is_that_of_the_logits(compiled: Any) -> None:
    windows = [*tokens(3, 12), *tokens(1, 7)]
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logs = compiled(input_ids=window[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logs.gather(1, window[1:, None]).sum())
            count += window.numel() - 1
    assert perplexity(compiled, windows) == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-5)


def with_nan(model: Any) -> Any:
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = torch.nan
    return model


def with_infinite_activations(model: Any) -> Any:
    model.model.layers[0].mlp.experts.gate_up_proj.data.mul_(1e25)
    return model


def on_meta(model: Any) -> Any:
    return model.to("meta")


def offloaded(model: Any) -> Any:
    class AlignDevicesHook:
        offload = True

    model.model.layers[1]._hf_hook = AlignDevicesHook()
    return model


def already_compiled(model: Any) -> Any:
    return dynamo_compile(model, datasets(), **QUIET)


def dense(_: Any) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


BAD: list[tuple[Callable[[Any], Any], dict[str, Any], type[Exception], str]] = [
    (lambda m: m, {"calibration": {}}, ValueError, "`calibration` must name at least one dataset, but is empty"),
    (lambda m: m, {"calibration": {"a": []}}, ValueError, "dataset 'a' must hold at least one sample, but is empty"),
    (lambda m: m, {"calibration": {"a": ["x"]}}, ValueError, "`tokenizer` is needed because dataset 'a' holds text"),
    (lambda m: m, {"calibration": {"a": [[1]]}}, ValueError, "every sample must have at least 2 tokens"),
    (lambda m: m, {"calibration": {"a": [[1, VOCABULARY]]}}, ValueError, f"token ids must lie in [0, {VOCABULARY})"),
    (lambda m: m, {"widths": (2, 5)}, ValueError, "`widths` must be some of (2, 4, 6, 8), but is (2, 5)"),
    (lambda m: m, {"target_bits": 2.1}, ValueError, "`target_bits` must be at least"),
    (lambda m: m, {"strategy": "best"}, ValueError, "`strategy` must be one of 'dynamo'"),
    (lambda m: m, {"strategy": "budget", "target_bits": None}, ValueError, "`target_bits` is required by the strategy 'budget'"),
    (lambda m: m, {"bits": 3}, TypeError, "`bits` is not an option of CompileConfig"),
    (lambda m: "olmoe", {}, TypeError, "`model` must be an nn.Module, but is a str"),
    (torch.compile, {}, TypeError, "`model` must be the model itself, but is what torch.compile returned"),
    (dense, {}, ValueError, "no MoE block"),
    (already_compiled, {}, ValueError, "`model` (OlmoeForCausalLM) is compiled already"),
    (with_nan, {}, ValueError, "parameter `model.layers.1.mlp.experts.down_proj` holds NaN or infinity"),
    (with_infinite_activations, {}, FloatingPointError, "inputs of `down_proj` in MoE block `model.layers.0.mlp` held NaN or infinity on dataset 'low'"),
    (on_meta, {}, ValueError, "`model.embed_tokens.weight` is on the meta device"),
    (offloaded, {}, ValueError, "must not have offload hooks, but `model.layers.1` has a AlignDevicesHook"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "arguments", "error", "message"), BAD, ids=[case[-1][:40] for case in BAD])
def test_bad_input_is_refused_before_anything_changes(
    change: Callable[[Any], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = change(olmoe())
    before, modules = _snapshot(model)
    with pytest.raises(error, match=re.escape(message)):
        dynamo_compile(model, **({"calibration": datasets(), "progress": False} | arguments))
    after, same = _snapshot(model)
    assert modules == same
    assert all(after[name] is tensor for name, tensor in before.items())


def _snapshot(model: Any) -> tuple[dict[str, Any], list[int]]:
    if not isinstance(model, nn.Module):
        return {}, []
    return dict(model.named_parameters()), [id(module) for module in model.modules()]


def test_an_interruption_stays_an_interruption(monkeypatch: Any) -> None:
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        raise KeyboardInterrupt if len(calls) == 1 else AssertionError

    monkeypatch.setattr(api, "compile_layer", interrupted)
    model = olmoe().train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        dynamo_compile(model, datasets(), **QUIET)
    assert flags == [module.training for module in model.modules()]


def test_a_failure_halfway_says_that_the_model_is_lost(monkeypatch: Any) -> None:
    real, calls = api.compile_layer, []

    def fails_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        return real(*arguments)

    monkeypatch.setattr(api, "compile_layer", fails_second)
    with pytest.raises(RuntimeError, match="failed after 1 of 2 MoE blocks had been replaced"):
        dynamo_compile(olmoe(), datasets(), **QUIET)


def test_the_training_flag_comes_back_when_a_model_is_refused() -> None:
    model = olmoe().train()
    with pytest.raises(ValueError, match="`target_bits` must be at least"):
        dynamo_compile(model, datasets(), target_bits=2.1, progress=False)
    assert model.training


def test_a_configuration_and_overrides_go_together() -> None:
    config = CompileConfig(strategy="uniform", uniform_bits=4, target_bits=None)
    model = dynamo_compile(olmoe(), datasets(), config, uniform_bits=6, progress=False)
    assert model.moe_report.config == config.with_overrides(uniform_bits=6)
    assert model.moe_report.code_bits == 6


def test_the_public_names() -> None:
    assert set(moe_compiler.__all__) <= set(dir(moe_compiler))
    with pytest.raises(AttributeError, match="module 'moe_compiler' has no attribute 'compile'"):
        _ = moe_compiler.compile
