"""Profiles in the folder of a saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_compiler.replace_file import replace_file
from moe_compiler.saving import PROFILES, REPORT, profile_file


def check_profile_name(folder: Path, name: str) -> None:
    """Refuses a profile that the folder cannot take.

    Raises:
        FileNotFoundError: the folder has no list of profiles: it holds no saved model, or the hub's.
        ValueError: the profile of that name is the one in the saved model's pools.
    """
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(
            f"`DIR` must be the folder of a saved model to keep a profile in, but {folder} has no {REPORT}: "
            "give `--output` to keep it in a file elsewhere"
        )
    if _contents(folder)["active"] == name:
        raise ValueError(f"`--name` must not be {name!r}, the profile that the saved model has in its pools")


def add_profile(folder: Path, model: Any, name: str) -> Path:
    """Saves a profile beside a model, so that the model has it when it is loaded again.

    The file comes first and then, by a rename, the list that names it: a process that dies in between leaves a model
    that loads, with or without the profile.

    Args:
        folder: where the model was saved.
        model: the model, loaded from there.
        name: the profile; one of that name is replaced.

    Returns:
        The profile's file.
    """
    contents = _contents(folder)
    known: dict[str, str] = contents["profiles"]
    file = known.get(name) or profile_file(name, known.values())
    (folder / PROFILES).mkdir(exist_ok=True)
    model.runtime.save(name, folder / file)
    known[name] = file
    replace_file(folder / REPORT, json.dumps(contents, indent=1).encode("utf-8"))
    return folder / file


def _contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return found
