"""`DynamoConfig`: the choices of `dynamo_compile` in the form that transformers' `quantization_config` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_compiler.config import CompileConfig
from moe_compiler.saved_format import SavedFormat

METHOD = "moe_compiler"


@dataclass(frozen=True, repr=False)
class DynamoConfig(CompileConfig, QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """What `from_pretrained(..., quantization_config=...)` needs to compile a model when it has been loaded.

    The `config.json` of a saved model holds one, with `compiled`. All fields of `CompileConfig` are fields of it.

    Attributes:
        calibration: by dataset name, a source as `moe_compiler.sources.read_texts` takes it, such as `"wikitext2"` or
            the path of a file; or samples as `dynamo_compile` takes them, but no bare text. Samples are not kept in
            JSON: there they are `None`.
        tokenizer: for calibration data that are text: a tokenizer, or where `AutoTokenizer` finds it; that of the
            model's own folder if `None`.
        max_tokens: at most so many tokens of each dataset; all if `None`.
        datasets: by dataset name, the tokens that were used, where the model has been compiled.
        compiled: what the model's packed weights look like, where it has been compiled.
    """

    quant_method: ClassVar[str] = METHOD

    calibration: Mapping[str, Any] | None = None
    tokenizer: Any = None
    max_tokens: int | None = 65536
    datasets: Mapping[str, int] | None = None
    compiled: SavedFormat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is not None and not isinstance(self.calibration, Mapping):
            raise TypeError(
                "`calibration` must be a mapping from a dataset's name to its source, "
                f'such as {{"wiki": "wikitext2"}}, but is a {type(self.calibration).__name__}'
            )
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"`max_tokens` must be at least 2, but is {self.max_tokens}")

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamoConfig:
        """The same object: nothing in it changes, and samples cannot always be copied."""
        return self

    @classmethod
    def of(cls, config: CompileConfig, **values: Any) -> DynamoConfig:
        """The choices `config` with `values` for the other fields."""
        return cls(**{one.name: getattr(config, one.name) for one in fields(CompileConfig)}, **values)

    @property
    def compile_config(self) -> CompileConfig:
        """The choices alone."""
        return CompileConfig(**{one.name: getattr(self, one.name) for one in fields(CompileConfig)})

    def with_fingerprint(self, fingerprint: str) -> DynamoConfig:
        """The same for a model of that fingerprint."""
        compiled = self.compiled
        return self if compiled is None else replace(self, compiled=compiled.with_fingerprint(fingerprint))

    def to_dict(self) -> dict[str, Any]:
        """The choices as JSON types, as `config.json` holds them."""
        return {
            "quant_method": METHOD,
            **self.compile_config.to_dict(),
            "calibration": self.calibration_sources(),
            "tokenizer": self.tokenizer if isinstance(self.tokenizer, str) else None,
            "max_tokens": self.max_tokens,
            "datasets": None if self.datasets is None else dict(self.datasets),
            "compiled": None if self.compiled is None else self.compiled.to_dict(),
        }

    def calibration_sources(self) -> dict[str, str | None] | None:
        """The sources of the calibration data, `None` for a dataset that was given as samples."""
        if self.calibration is None:
            return None
        return {str(name): one if isinstance(one, str) else None for name, one in self.calibration.items()}

    @classmethod
    def from_dict(  # type: ignore[override]  # transformers' signature
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> DynamoConfig | tuple[DynamoConfig, dict[str, Any]]:
        """The inverse of `to_dict`; missing fields take their defaults.

        Args:
            config_dict: what `to_dict` gave.
            return_unused_kwargs: also return the `kwargs` that are no fields.
            **kwargs: fields to replace.

        Raises:
            ValueError: it is of another method or version, damaged, or a choice is not allowed.
        """
        known = {one.name for one in fields(cls)}
        values = {**config_dict, **{name: value for name, value in kwargs.items() if name in known}}
        try:
            method = values.pop("quant_method", METHOD)
            if method != METHOD:
                raise ValueError(f"`quant_method` must be {METHOD!r}, but is {method!r}")
            for name in values:
                if name not in known:
                    raise ValueError(f"`{name}` is not a field that this version of moe-compiler knows")
            if isinstance(values.get("compiled"), Mapping):
                values["compiled"] = SavedFormat.from_dict(values["compiled"])
            if not isinstance(values.get("compiled"), SavedFormat | None):
                raise ValueError(f"`compiled` must be an object, but is {values['compiled']!r}")
            config = cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"`quantization_config` of a compiled model cannot be read: {error}") from error
        unused = {name: value for name, value in kwargs.items() if name not in known}
        return (config, unused) if return_unused_kwargs else config
