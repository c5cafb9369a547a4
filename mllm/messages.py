"""A conversation in Hugging Face's form, checked and taken apart before the chat template sees it."""

from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from mllm.errors import PromptError
from mllm.images import check_image

ROLES = ("system", "user", "assistant")
SOURCES = ("image", "url", "path", "base64")  # where Hugging Face looks for an image; only PIL images pass here
MARKERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")  # besides the placeholders, which have ids


def split(messages: object) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Messages that hold only text and a mark where each image goes, and the images in that order.

    messages: a list of `{"role": ..., "content": ...}`; a content is a string or a list of parts,
    `{"type": "text", "text": ...}` or `{"type": "image", "image": <PIL image>}`.

    Raises `TypeError` for a value of the wrong type and `PromptError` for one that makes no sense, naming its place.
    """
    if not isinstance(messages, list | tuple):
        raise TypeError(f"messages must be a list, got {type(messages).__name__}")
    if not messages:
        raise PromptError("messages is empty")
    images: list[Image.Image] = []
    return [_message(message, f"messages[{i}]", images) for i, message in enumerate(messages)], images


def refuse_markers(messages: list[dict[str, Any]], markers: Iterable[str]) -> None:
    """Text must not spell what only an image may put there, not even in pieces that the template joins."""
    for i, message in enumerate(messages):
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        for marker in sorted({*MARKERS, *markers}):
            if marker in text:
                raise PromptError(f"messages[{i}] spells {marker} in its text; pass the image as a part instead")


def _object(value: object, where: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """`value` as a mapping that holds keys[0] and nothing beyond `keys`."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a dict, got {type(value).__name__}")
    if keys[0] not in value:
        raise PromptError(f"{where} has no {keys[0]!r}")
    if unknown := [key for key in value if key not in keys]:
        raise PromptError(f"{where} has unknown keys {unknown}; known are {list(keys)}")
    return value


def _message(message: object, where: str, images: list[Image.Image]) -> dict[str, Any]:
    """The message without its pictures, which are appended to `images`: a template never gets hold of an object."""
    entry = _object(message, where, ("role", "content"))
    if entry["role"] not in ROLES:
        raise PromptError(f"{where}: role must be one of {list(ROLES)}, got {entry['role']!r}")
    if "content" not in entry:
        raise PromptError(f"{where} has no 'content'")
    content = entry["content"]
    if isinstance(content, str):
        return {"role": entry["role"], "content": content}
    if not isinstance(content, list | tuple):
        raise TypeError(f"{where}: content must be a string or a list of parts, got {type(content).__name__}")
    parts = [_part(part, f"{where}.content[{i}]", images) for i, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):  # text-only templates read nothing but strings
        return {"role": entry["role"], "content": "".join(part["text"] for part in parts)}
    return {"role": entry["role"], "content": parts}


def _part(part: object, where: str, images: list[Image.Image]) -> dict[str, Any]:
    entry = _object(part, where, ("type", "text", *SOURCES))
    if entry["type"] == "text":
        if not isinstance(entry.get("text"), str):
            raise TypeError(f"{where}: text must be a string, got {type(entry.get('text')).__name__}")
        return {"type": "text", "text": entry["text"]}
    if entry["type"] != "image":
        raise PromptError(f"{where}: type must be 'text' or 'image', got {entry['type']!r}")
    given = [entry[key] for key in SOURCES if key in entry]
    if len(given) != 1:
        raise PromptError(f"{where}: an image part needs one picture under 'image', got {len(given)}")
    images.append(check_image(given[0]))
    return {"type": "image"}
