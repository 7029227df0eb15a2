"""Writing a small file whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name beside `path` and renames it, so that `path` is never half written.

    Raises:
        OSError: the file could not be written. Whatever `path` held before is still there, and nothing is beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
