"""`DynamoConfig`: JSON both ways, compiling while a model is loaded, and how transformers comes to know of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import logits
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_cases import OPTIONS, load, same, small, tensors
from tiny import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

import moe_compiler
from moe_compiler import registration
from moe_compiler.config import CompileConfig
from moe_compiler.dynamo_config import METHOD, DynamoConfig
from moe_compiler.huggingface import DynamoQuantizer

CHOICES = {name: value for name, value in OPTIONS.items() if name != "progress"}
TEXT = " ".join(f"w{number}" for number in range(3, 90)) + "\n"
CALIBRATIONS = st.dictionaries(st.text(), st.none() | st.text() | st.just([[1, 2]]), min_size=1)


@settings(deadline=None, max_examples=30)
@given(st.none() | CALIBRATIONS, st.none() | st.text(), st.none() | st.integers(2, 9999), st.sampled_from([32, 64]))
def test_the_config_survives_json(
    calibration: dict[str, Any] | None, tokenizer: str | None, max_tokens: int | None, group_size: int
) -> None:
    config = DynamoConfig(
        calibration=calibration, tokenizer=tokenizer, max_tokens=max_tokens, group_size=group_size, widths=(2, 8)
    )
    again = DynamoConfig.from_dict(json.loads(config.to_json_string()))
    assert isinstance(again, DynamoConfig)
    assert again.compile_config == config.compile_config == CompileConfig(group_size=group_size, widths=(2, 8))
    assert (again.tokenizer, again.max_tokens) == (tokenizer, max_tokens)
    assert again.calibration == config.calibration_sources()
    assert again.to_dict() == config.to_dict()


def test_it_is_what_transformers_takes() -> None:
    assert moe_compiler.DynamoConfig is DynamoConfig
    assert issubclass(DynamoConfig, QuantizationConfigMixin)
    assert DynamoConfig().quant_method == METHOD == "moe_compiler"
    config, rest = DynamoConfig.from_dict({"group_size": 32}, return_unused_kwargs=True, seed=3, other=4)
    assert (config.group_size, config.seed, rest) == (32, 3, {"other": 4})


def test_bad_choices_are_named() -> None:
    with pytest.raises(ValueError, match="`group_size` must be one of"):
        DynamoConfig(group_size=5)
    with pytest.raises(TypeError, match="`calibration` must be a mapping from a dataset's name to its source"):
        DynamoConfig(calibration="wikitext2")
    with pytest.raises(ValueError, match="`max_tokens` must be at least 2, but is 1"):
        DynamoConfig(max_tokens=1)
    with pytest.raises(ValueError, match="`quant_method` must be 'moe_compiler', but is 'gptq'"):
        DynamoConfig.from_dict({"quant_method": "gptq"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that is not compiled, with a tokenizer of words."""
    path = tmp_path_factory.mktemp("base")
    small().save_pretrained(path)
    vocabulary = {f"w{number}": number for number in range(96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    return path


def test_samples_are_compiled_as_by_the_function(base: Path) -> None:
    config = DynamoConfig(**CHOICES, calibration=datasets())
    model = load(base, quantization_config=config, dtype=torch.float32)
    other = moe_compiler.dynamo_compile(load(base, dtype=torch.float32), datasets(), **OPTIONS)
    assert same(tensors(model), tensors(other))
    assert torch.equal(logits(model), logits(other))
    assert model.moe_report.config == config.compile_config
    assert model.hf_quantizer.pre_quantized
    assert model.config.quantization_config.calibration == {"low": None, "high": None}
    assert not model.runtime.is_detached


def test_sources_are_read_and_noted(base: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(TEXT * 9)
    source = str(tmp_path / "words.txt")
    config = DynamoConfig(**CHOICES, calibration={"words": source}, max_tokens=200, sequence_length=40)
    model = load(base, quantization_config=config)
    assert model.moe_report.datasets == {"words": 200}
    model.save_pretrained(tmp_path / "saved")
    assert f"| words | 200 | {source} |" in (tmp_path / "saved" / "README.md").read_text()
    loaded = load(tmp_path / "saved")
    noted = loaded.config.quantization_config
    assert (noted.calibration, noted.max_tokens, noted.datasets) == ({"words": source}, 200, {"words": 200})
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"`tokenizer` is needed for text, since .*saved has none"):
        loaded.runtime.adapt(TEXT, name="no tokenizer")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "saved")
    assert loaded.runtime.adapt(TEXT, name="text").tokens == 87


def test_a_model_without_calibration_data_is_not_loaded(base: Path) -> None:
    with pytest.raises(ValueError, match="names no dataset"):
        load(base, quantization_config=DynamoConfig())
    with pytest.raises(ValueError, match="but has none for 'a', 'b'"):
        load(base, quantization_config=DynamoConfig(calibration={"a": None, "b": None, "c": "wikitext2"}))


def test_transformers_knows_the_method() -> None:
    assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is DynamoQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is DynamoConfig
    before = list(sys.meta_path)
    registration.register()
    assert sys.meta_path == before


def test_an_import_that_comes_later_registers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, auto.__name__)
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        for _ in range(2):
            registration.register()
        (finder,) = (one for one in sys.meta_path if isinstance(one, registration._AfterImport))
        assert finder.find_spec("transformers.quantizers.base", None) is None
        assert finder.find_spec(auto.__name__, []) is None
        spec = importlib.util.find_spec(auto.__name__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        assert finder in sys.meta_path  # who only looks for the module takes nothing away
        spec.loader.exec_module(module)
        assert finder not in sys.meta_path
    assert module is not auto
    assert module.AUTO_QUANTIZER_MAPPING[METHOD] is DynamoQuantizer


def test_the_import_alone_loads_nothing_large() -> None:
    code = "import sys, moe_compiler; print(sorted({'torch', 'transformers', 'triton', 'numpy'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"


def test_a_config_is_not_copied(base: Path) -> None:
    config = DynamoConfig(**CHOICES, calibration={"stream": iter([list(range(1, 60))])})
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    assert model.moe_report.datasets == {"stream": 59}
