"""Reading the small JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm.errors import MllmError


def read_object(path: Path, error: type[MllmError]) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error`, naming the file, for anything else; nothing but a file is read."""
    try:
        if not path.is_file():  # a pipe would be read for ever
            raise error(f"{path}: no such file; a model folder holds config.json and *.safetensors")
        content = json.loads(path.read_bytes())
    except error:  # a ValueError, too
        raise
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: not readable as JSON ({reason})") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def read_optional(path: Path, error: type[MllmError]) -> dict[str, Any]:
    """As `read_object`, and empty where there is no such file."""
    return read_object(path, error) if path.is_file() else {}
