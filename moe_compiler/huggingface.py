"""The plug-in for transformers: what `from_pretrained` calls for models of the method `"moe_compiler"`.

It loads saved models, and compiles others when they have been loaded. Importing this file is cheap, since all who
import transformers' models after `moe_compiler` do it; what it needs is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer

from moe_compiler.dynamo_config import METHOD, DynamoConfig
from moe_compiler.registration import register

if TYPE_CHECKING:
    from moe_compiler.loading import Loading
    from moe_compiler.passes.base import Progress

__all__ = ["METHOD", "DynamoConfig", "DynamoQuantizer"]

MOST_TEXTS = 4096
"""Texts that are read of a source at most."""


class DynamoQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Loads compiled models and compiles others; see `moe_compiler.loading` and `moe_compiler.api.dynamo_compile`.

    Weights are saved and loaded under the names that they have in the model, not under those of the original files.
    """

    requires_calibration = False
    quantization_config: DynamoConfig

    def __init__(self, quantization_config: DynamoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading: Loading | None = None

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuses what cannot work, before anything is loaded.

        Raises:
            ValueError: `device_map` would offload, or a model is to be compiled without calibration data.
        """
        devices = {str(one) for one in device_map.values()} if isinstance(device_map, Mapping) else {str(device_map)}
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(f"`device_map` must not offload a compiled model to the CPU or disk, but is {device_map}")
        if self.pre_quantized:
            return
        calibration = self.quantization_config.calibration or {}
        missing = [repr(name) for name, source in calibration.items() if source is None]
        if missing or not calibration:
            raise ValueError(
                '`calibration` of DynamoConfig must have a source or samples for each dataset, as in {"wiki": '
                f'"wikitext2"}}, but {"has none for " + ", ".join(missing) if missing else "names no dataset"}'
            )

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """No conversion of names and shapes for a compiled model: its files have those of the model."""
        return [] if self.pre_quantized else list(weight_conversions)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        if self.pre_quantized:
            from moe_compiler.loading import begin

            self._loading = begin(model, self.quantization_config, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._loading is None:
            self._compile(model)
        else:
            from moe_compiler.checks import check_offload
            from moe_compiler.loading import finish

            loading, self._loading = self._loading, None
            check_offload(model)
            finish(model, loading, _progress())
        return model

    def _compile(self, model: Any) -> None:
        from moe_compiler.api import dynamo_compile
        from moe_compiler.attachment import describe_sources

        config = self.quantization_config
        self.remove_quantization_config(model)
        model.config._is_quantized = False
        tokenizer = _tokenizer(config, model)
        calibration = _samples(config, model, tokenizer)
        dynamo_compile(model, calibration, config.compile_config, tokenizer=tokenizer, progress=_progress())
        describe_sources(model, config)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Compiled models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """They cannot be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """They can be compiled by `torch.compile`."""
        return True

    def get_state_dict_and_metadata(self, model: Any, *_: Any, **__: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors to save, with those that refuse a plain loader, and in the files' headers whose they are."""
        from moe_compiler.loading import FINGERPRINT
        from moe_compiler.refusal import refusing_tensors

        compiled = self.quantization_config.compiled
        metadata = {} if compiled is None else {FINGERPRINT: compiled.fingerprint}
        refusing = refusing_tensors(layer.experts for layer in model.runtime.layers.values())
        return model.state_dict() | refusing, metadata


def _tokenizer(config: DynamoConfig, model: Any) -> Any:
    from moe_compiler.loading import FolderTokenizer

    if config.tokenizer is None or isinstance(config.tokenizer, str):
        return FolderTokenizer(config.tokenizer or str(model.config._name_or_path))
    return config.tokenizer


def _samples(config: DynamoConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    from moe_compiler.checks import vocabulary_size
    from moe_compiler.data import load_samples
    from moe_compiler.sources import read_texts

    samples = {}
    for name, source in (config.calibration or {}).items():
        samples[name] = load_samples(
            read_texts(source, max_texts=MOST_TEXTS, seed=config.seed) if isinstance(source, str) else source,
            name=name,
            tokenizer=tokenizer,
            sequence_length=config.sequence_length,
            vocab_size=vocabulary_size(model),
            max_tokens=config.max_tokens,
        )
    return samples


def _progress() -> Progress:
    """Progress bars where transformers draws its own."""
    from transformers.utils import logging

    from moe_compiler.passes.base import NoProgress
    from moe_compiler.progress import RichProgress

    return RichProgress() if logging.is_progress_bar_enabled() else NoProgress()


register()
