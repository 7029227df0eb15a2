"""The embedded model: its files, its text, what it learned, and the script that made it."""

import ast
import json
import re
import sysconfig
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from moe_compiler import embedded
from moe_compiler.embedded import DOMAINS, MODEL_FOLDER, load_model, load_samples, load_text
from moe_compiler.embedded.corpus import module_key, strip_documentation
from moe_compiler.embedded.evaluate import divergence_by_pair, jensen_shannon, measure_text, sample_text
from moe_compiler.embedded.generators import GENERATED_DOMAINS, generate_documents, held_out
from moe_compiler.embedded.train import balance_loss, learning_rate_scale, main

SIZE_LIMIT_BYTES = 12_000_000
FOLDER_LIMIT_BYTES = 12_500_000


@pytest.fixture(scope="module")
def loaded():
    return load_model()


@pytest.fixture(scope="module")
def measured(loaded):
    model, tokenizer = loaded
    return {name: measure_text(model, tokenizer, load_text(name, "evaluation", 8_000)) for name in DOMAINS}


@pytest.fixture(scope="module")
def figures():
    return json.loads((MODEL_FOLDER / "metrics.json").read_text(encoding="utf-8"))


def test_files_are_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in MODEL_FOLDER.iterdir()}
    assert sizes["model.safetensors"] <= SIZE_LIMIT_BYTES
    assert sum(sizes.values()) <= FOLDER_LIMIT_BYTES
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "metrics.json",
    } <= sizes.keys()


def test_model_is_a_plain_olmoe(loaded):
    model, tokenizer = loaded
    assert type(model) is OlmoeForCausalLM
    assert model.dtype == torch.float32
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert all(weight.isfinite().all() for weight in model.parameters())
    # groups of 128 inputs divide every expert linear
    assert model.config.hidden_size % 128 == model.config.intermediate_size % 128 == 0


def test_model_loads_in_the_type_of_its_file():
    model, _ = load_model(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_load_model_wants_a_floating_point_type():
    with pytest.raises(ValueError, match=r"`dtype` must be a floating-point type, but is torch\.int8"):
        load_model(torch.int8)


def test_load_model_names_the_missing_files(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "MODEL_FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=f"{re.escape(str(tmp_path))} has no model.safetensors"):
        load_model()


@pytest.mark.parametrize("domain", DOMAINS)
def test_tokenizer_gives_the_text_back(loaded, domain):
    text = load_text(domain, "evaluation", 4_000)
    tokens = loaded[1](text, add_special_tokens=False, verbose=False)["input_ids"]
    assert loaded[1].decode(tokens) == text
    assert len(tokens) < 0.8 * len(text)


@pytest.mark.parametrize("domain", DOMAINS)
def test_perplexity_is_the_one_of_the_card(measured, figures, domain):
    # a slice, on another Python perhaps, against all of the text that the card was measured on
    claim = figures["evaluation"]["domains"][domain]
    assert measured[domain].perplexity == pytest.approx(claim["perplexity"], rel=0.35)
    assert measured[domain].accuracy == pytest.approx(claim["accuracy"], abs=0.1)


def test_card_has_the_figures(figures):
    card = (MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{figures['training']['tokens']:,} tokens" in card
    for domain in DOMAINS:
        assert f"{figures['evaluation']['domains'][domain]['perplexity']:.2f}" in card


def test_domains_use_different_experts(measured):
    use = {domain: result.expert_use for domain, result in measured.items()}
    assert min(divergence_by_pair(use).values()) > 0.05


def test_no_expert_is_dead(measured):
    best_share = torch.stack([result.expert_use for result in measured.values()]).amax(dim=0)
    assert best_share.min() > 0.01


def test_samples_are_repeatable_and_leave_the_random_state(loaded):
    model, tokenizer = loaded
    state = torch.get_rng_state()
    texts = [sample_text(model, tokenizer, "3 + 4 = ", new_tokens=6) for _ in range(2)]
    assert texts[0] == texts[1] != ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_text_is_repeatable_and_has_the_length_asked_for(domain, split):
    text = load_text(domain, split, 9_000)
    assert len(text) == 9_000
    assert load_text(domain, split, 3_000) == text[:3_000]
    assert "".join(load_samples(domain, split, 9_000)) == text


@pytest.mark.parametrize("domain", GENERATED_DOMAINS)
def test_generated_splits_share_no_item(domain):
    train, evaluation = (set(generated_items(domain, split)) for split in ("train", "evaluation"))
    assert len(train) > 100
    assert len(evaluation) > 100
    assert not train & evaluation
    assert all(map(held_out, evaluation))
    assert not any(map(held_out, train))


def generated_items(domain, split):
    """The items of 60 documents: all lines, or, where an item has several lines, the outer elements."""
    for document in islice(generate_documents(domain, split), 60):
        if domain == "markup":
            yield from re.findall(r"^  <(?!title|h1|tr><th)\S.*?(?=\n  <[^/]|\n</)", document, re.M | re.S)
        else:
            yield from document.splitlines()[document.startswith(("date,", "sku;")) :]


def test_generated_text_follows_its_seed():
    first, again, other = (next(generate_documents("records", "train", seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_sums_are_right():
    text = load_text("arithmetic", "evaluation", 40_000)
    tasks = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text)
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    assert len(tasks) > 100
    assert all(results[sign](int(a), int(b)) == int(c) for a, sign, b, c in tasks[:-1])


def test_records_are_json():
    lines = [line for line in load_text("records", "evaluation", 20_000).splitlines()[:-1] if line[0] == "{"]
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_held_out_code_shares_no_long_line_block_with_the_training_text():
    train, evaluation = (load_samples("code", split, 80_000) for split in ("train", "evaluation"))
    blocks = [set(), set()]
    for texts, found in zip((train, evaluation), blocks, strict=True):
        for text in texts:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            found.update(tuple(lines[start : start + 8]) for start in range(len(lines) - 7))
    assert not blocks[0] & blocks[1]


def test_paragraphs_of_held_out_topics_are_not_trained_on():
    withheld = {" ".join(part.split()) for name in topics if held_out(name) for part in topics[name].split("\n\n")}
    parts = [" ".join(part.split()) for part in load_text("docs", "train", 150_000).split("\n\n")]
    assert not {part for part in parts if len(part) > 200} & withheld


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("pathlib._local", "pathlib"),
        ("_pydatetime", "datetime"),
        ("_strptime", "strptime"),
        ("asyncio", "asyncio"),
    ],
)
def test_module_key_joins_modules_that_moved(module, key):
    assert module_key(module) == key


def test_strip_documentation_leaves_the_code():
    source = '"""Doc."""\n# note\nA = "# kept"\n\n\n\ndef f():\n    """Doc\n    more."""\n\n'
    source += 'def g():\n    \'doc\'\n    return """\n# kept\n"""\n'
    stripped = strip_documentation(source, ast.parse(source))
    assert stripped == 'A = "# kept"\n\ndef f():\n    ...\n\ndef g():\n    return """\n# kept\n"""\n'
    ast.parse(stripped)


def test_unknown_domain_and_split():
    with pytest.raises(ValueError, match=r"`domain` must be one of code, docs, .*; got 'poems'"):
        load_text("poems", "train")
    with pytest.raises(ValueError, match="`split` must be 'train' or 'evaluation'; got 'test'"):
        load_text("code", "test")
    with pytest.raises(ValueError, match="`max_characters` must be at least 1 or None; got 0"):
        load_text("code", "train", 0)


def test_python_without_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match=r"need the source of the standard library, but .* has no Python files"):
        load_text("code", "train", 100)
    assert load_text("arithmetic", "train", 100)


def test_measure_text_wants_a_window(loaded):
    with pytest.raises(ValueError, match=r"`text` must have at least 256 tokens \(`window_tokens`\); got 1"):
        measure_text(*loaded, "=")


def test_divergence_is_a_share_of_one_bit():
    same, left, right = (
        torch.tensor([0.5, 0.5, 0, 0]),
        torch.tensor([1.0, 0, 0, 0]),
        torch.tensor([0, 0, 0.3, 0.7]),
    )
    assert jensen_shannon(same, same) == 0
    assert jensen_shannon(left, right) == pytest.approx(1)
    assert jensen_shannon(same, left) == pytest.approx(0.311278, abs=1e-5)  # h(1/4) - 1/2


def test_balance_loss_is_least_when_experts_share_the_tokens():
    even = torch.eye(4).repeat(3, 1) * 9
    assert balance_loss([even], top_k=1) == pytest.approx(1)
    assert balance_loss([even[:1].repeat(12, 1)], top_k=1) > 3.9


def test_learning_rate_goes_up_and_then_to_zero():
    scales = [learning_rate_scale(share / 100) for share in range(101)]
    peak = scales.index(max(scales))
    assert 0 < peak < 10
    assert max(scales) == pytest.approx(1)
    assert scales[peak:] == sorted(scales[peak:], reverse=True)
    assert scales[-1] == pytest.approx(0, abs=1e-9)


def test_training_script_makes_a_model_that_loads(tmp_path: Path, capsys):
    sizes = {"layers": 1, "hidden-size": 128, "experts": 4, "vocabulary": 300, "characters": 9_000}
    options = SimpleNamespace(**{"steps": 10, "evaluation-characters": 2_000}, **sizes)
    main([f"--output={tmp_path}", *(f"--{name}={value}" for name, value in vars(options).items())])
    assert re.search(r"step 10 .* loss \d\.\d+ \d+ tokens/s", capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 300
    facts = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert facts["training"]["tokens"] == 10 * 12 * 256
    assert facts["evaluation"]["domains"]["arithmetic"]["perplexity"] < 300
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("⟨here⟩") == len(DOMAINS) + 1
