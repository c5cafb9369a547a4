"""Reading the files of a model folder: links, and small JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm.errors import MllmError


def check_inside(path: Path, error: type[MllmError]) -> None:
    """Raise `error` for a file of a model folder that is a link out of it: whoever made the folder chose what it names.

    Links stay inside in a hub download, too, whose snapshots/<commit>/ link into the blobs/ beside them.
    """
    root, target = path.parent.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if target.parent not in (root, blobs):
        raise error(f"{path}: a link out of the model folder")


def read_object(path: Path, error: type[MllmError]) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error`, naming the file, for anything else; nothing but a file is read."""
    try:
        if not path.is_file():  # a pipe would be read for ever
            raise error(f"{path}: no such file; a model folder holds config.json and *.safetensors")
        check_inside(path, error)
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
