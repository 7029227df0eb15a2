"""`save_pretrained` of a compiled model: transformers' own files and ours beside them, all or nothing.

transformers writes `config.json` first and each file of weights in place, so that a process that dies in between leaves
a folder that may load, with old weights or with none. Here everything is first written to a folder inside the target
and then renamed into place, `config.json` last; an old `config.json` goes before anything else is touched. A folder
without it does not load.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Collection
from itertools import chain, count
from pathlib import Path
from typing import Any

from moe_compiler.coverage import CompileReport
from moe_compiler.model_card import CARD, is_card, write_card
from moe_compiler.runtime.saved import write_layers

REPORT = "moe_report.json"
ANALYSIS = "moe_analysis.safetensors"
RUNTIME = "moe_runtime.safetensors"
PROFILES = "profiles"
FORMAT_VERSION = 1
_STAGING = ".moe_compiler-saving"
_CONFIG = "config.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_ELSEWHERE = ("state_dict", "distributed_checkpoint")


class SavePretrained:
    """`save_pretrained` of a compiled model. Copying or pickling a model takes this along, bound to the copy."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves the model so that `from_pretrained` loads it once `moe_compiler` has been imported.

        Args:
            save_directory: the folder; made if it does not exist.
            *args: as transformers takes them.
            **kwargs: as transformers takes them.

        Raises:
            ValueError: `save_directory` is a file or holds the original weights, or an argument is not supported.
            OSError: the files could not be written. A model that was in the folder is still there, or, if that failed
                while files were renamed, the folder does not load.
        """
        options = dict(self.__signature__.bind(save_directory, *args, **kwargs).arguments)
        hub = options.pop("kwargs", {}) | {
            name: options[name] for name in ("token", "max_shard_size") if name in options
        }
        for name in _ELSEWHERE:
            if options.get(name):
                raise ValueError(f"`{name}` is not supported for a compiled model")
        target = Path(options.pop("save_directory"))
        if target.exists() and not target.is_dir():
            raise ValueError(f"`save_directory` must be a folder, but {target} is a file")
        if str(target.resolve()) == self.model.runtime.base_model:
            raise ValueError(
                f"`save_directory` must not be {target}, the folder of the model that was compiled: `adapt` needs its "
                "original weights"
            )
        push = options.pop("push_to_hub", False)
        if options.get("is_main_process", True):
            self._save(target, options)
        if push:
            self.model.push_to_hub(hub.pop("repo_id", None) or target.name, **hub)

    def _save(self, target: Path, options: dict[str, Any]) -> None:
        staging = target / _STAGING
        shutil.rmtree(staging, ignore_errors=True)  # of a process that died
        staging.mkdir(parents=True)
        try:
            with self.model.runtime.hold():
                self._write(staging, options)
            keep_card = (target / CARD).is_file() and not is_card(target / CARD)
            if not keep_card:
                write_card(staging / CARD, self.model)
            _flush(staging)
            _move(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _write(self, folder: Path, options: dict[str, Any]) -> None:
        model, runtime = self.model, self.model.runtime
        fingerprint = runtime.fingerprint
        config = model.config.quantization_config
        model.config.quantization_config = config.with_fingerprint(fingerprint)
        model.hf_quantizer.quantization_config = model.config.quantization_config
        type(model).save_pretrained(model, folder, **options)
        write_layers(runtime.layers, folder / RUNTIME, fingerprint)
        (folder / PROFILES).mkdir()
        profiles: dict[str, str] = {}
        for name in runtime.profiles:
            file = profile_file(name, profiles.values())
            runtime.save(name, folder / file)
            profiles[name] = file
        report: CompileReport = model.moe_report
        if report.analysis is not None:
            report.analysis.save(folder / ANALYSIS)
        contents = {
            "format_version": FORMAT_VERSION,
            "report": report.to_dict(),
            "analysis": None if report.analysis is None else ANALYSIS,
            "profiles": profiles,
            "active": runtime.active,
            **_stages(model),
        }
        (folder / REPORT).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def _stages(model: Any) -> dict[str, Any]:
    """The graphs before lowering as text: each text once, and by block and stage its number."""
    texts: dict[str, int] = {}
    blocks = {
        path: {stage: texts.setdefault(text, len(texts)) for stage, text in graph.meta.get("stages", {}).items()}
        for path, graph in model.moe_graphs.items()
    }
    return {"graphs": list(texts), "stages": blocks}


def profile_file(name: str, taken: Collection[str]) -> str:
    """A path in a saved model's folder for the file of a profile, with a name that every system can have.

    Args:
        name: of the profile.
        taken: the paths of other profiles' files.
    """
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "profile"
    names = (f"{PROFILES}/{stem}{end}.safetensors" for end in chain([""], (f"-{n}" for n in count(2))))
    return next(one for one in names if one not in taken)


def _move(staging: Path, target: Path) -> None:
    """Renames everything into place, `config.json` last."""
    (target / _CONFIG).unlink(missing_ok=True)
    new = {path.name for path in staging.iterdir()}
    for old in target.iterdir():
        if _WEIGHTS.fullmatch(old.name) or old.name in (ANALYSIS, PROFILES, RUNTIME, REPORT):
            _remove(old)
    for name in sorted(new - {_CONFIG}):
        if (target / name).is_dir():
            _remove(target / name)
        os.replace(staging / name, target / name)
    os.replace(staging / _CONFIG, target / _CONFIG)
    _sync(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(folder: Path) -> None:
    """Makes the contents of a folder last before they are renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
