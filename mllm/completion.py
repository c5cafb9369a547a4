"""What a call gives back: a completion for each prompt, or a piece for each token as it is made."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen


@frozen(kw_only=True)
class Completion:
    """What became of one prompt.

    `tokens` are the new ones, an end token included; `text` is what they spell (empty without a tokenizer).
    `finish_reason`: "stop" (an end token), "length" (`max_new_tokens`, or the model's context is full), "capacity"
    (the KV pool cannot hold more of it), or "error", and then `error` says why.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    error: str | None = None


@frozen(kw_only=True)
class Piece:
    """One new token of prompt `index` and the text that it completes: possibly none, never half a character.

    The last piece of a prompt carries its `finish_reason`. Where that is "error", `token` is -1.
    """

    index: int
    token: int
    text: str
    finish_reason: str | None = None
    error: str | None = None


def join(pieces: Sequence[Piece], prompt_tokens: int) -> Completion:
    """All pieces of one prompt as its completion."""
    last = pieces[-1]
    return Completion(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.token for piece in pieces if piece.token >= 0),
        finish_reason=last.finish_reason or "",
        prompt_tokens=prompt_tokens,
        error=last.error,
    )
