"""Small files are written whole or not at all; profiles' files have names of their own that every system can have."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_compiler.replace_file import replace_file
from moe_compiler.saving import profile_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for data in (b"old", b"new and longer"):
        replace_file(path, data)
        assert path.read_bytes() == data

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [path]


@given(st.lists(st.text() | st.sampled_from(["A b", "a-b", "a/b", ""]), max_size=6))
def test_names_of_profiles_files(names: list[str]) -> None:
    taken: list[str] = []
    for name in names:
        taken.append(profile_file(name, taken))
    assert len(set(taken)) == len(names)
    assert all(re.fullmatch(r"profiles/[a-z0-9][a-z0-9-]{0,70}\.safetensors", file) for file in taken)
