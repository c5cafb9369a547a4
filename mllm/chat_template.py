"""The chat template of a checkpoint: a Jinja program that lays a conversation out as the model was trained on it.

It is a program of whoever wrote the checkpoint, so it runs in transformers' sandbox and sees only plain data.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.errors import CheckpointError, PromptError
from mllm.files import check_inside, read_optional


def render(template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str], source: str) -> str:
    """The conversation as text, up to where the assistant is to answer.

    messages: dicts, lists and strings only; the template can call the methods of whatever it is given.
    names: special tokens that the template may use by name (`eos_token`).
    source: for messages. Raises `PromptError` if the template fails on or refuses these messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {"add_generation_prompt": True, **names}
    try:
        result = render_jinja_template([[dict(m) for m in messages]], chat_template=template, **variables)
    except Exception as error:  # it is a program; and Python's compiler may refuse what Jinja makes of it
        raise PromptError(f"{source}: the chat template failed: {type(error).__name__}: {error}") from error
    return str(result[0][0])  # (one text per conversation, unused token masks)


def read_template(root: Path, config: dict[str, Any]) -> str | None:
    """The chat template: `chat_template.jinja` (what is written today), `.json`, or in `tokenizer_config.json`.

    config: the content of `tokenizer_config.json`. Raises `CheckpointError` naming a file that is broken.
    """
    jinja = root / "chat_template.jinja"
    if jinja.is_file():
        check_inside(jinja, CheckpointError)
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{jinja} is not readable as text: {error}") from error
    path = root / "chat_template.json"
    if path.is_file():
        template = read_optional(path, CheckpointError).get("chat_template")
    else:
        path, template = root / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0] if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template must be text, got {type(template).__name__}")
    return template
