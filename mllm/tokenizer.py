"""Text to token ids and back, for byte-level BPE (what every Qwen checkpoint ships).

`tokenizer.json` is read by the `tokenizers` library, which is what transformers' fast tokenizers run on: it imports
in 10 ms instead of 800, and never asks the network.
"""

import codecs
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from mllm.chat_template import read_template, render
from mllm.errors import CheckpointError, PromptError
from mllm.files import read_object, read_optional

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

# Without tokenizer.json, one of these means an incomplete tokenizer rather than none.
LEFTOVERS = ("tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")  # what a chat template may refer to by name


def _byte_letters() -> dict[str, int]:
    """The letter with which byte-level BPE writes each of the 256 bytes, inverted: letter -> byte.

    GPT-2's table: printable Latin-1 stands for itself; the other 68 bytes take the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_letters()


class TextStream:
    """Ids in, text out, one at a time: a UTF-8 decoder that holds back the bytes of an unfinished character.

    The pieces and the flush, joined, are `Tokenizer.decode` of all ids. At most three bytes are kept, so a token
    costs the same however long the text is. One stream serves one sequence.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty inside a character and for special tokens."""
        return self._utf8.decode(self._tokenizer.bytes_of(token))

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


@frozen(eq=False, kw_only=True)
class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    fast: the `tokenizers.Tokenizer`.
    special: text of the special tokens, which `decode` leaves out.
    template: the chat template (Jinja), or None.
    names: special tokens that the template may use by name (`eos_token`).
    source: the folder, for messages.
    """

    fast: "FastTokenizer"
    special: frozenset[str]
    template: str | None
    names: Mapping[str, str]
    source: str

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer | None":
        """The tokenizer in a checkpoint folder; None if the folder has none.

        Raises `CheckpointError` naming the file that is broken, missing, or of another kind than byte-level BPE.
        """
        root = Path(folder)
        if not (root / "tokenizer.json").is_file():
            found = [name for name in LEFTOVERS if (root / name).exists()]
            if found:
                raise CheckpointError(
                    f"{root} has {', '.join(found)} but no tokenizer.json, which holds the vocabulary"
                )
            return None
        config = read_optional(root / "tokenizer_config.json", CheckpointError)
        fast = _read_fast(root / "tokenizer.json")
        _add_tokens(fast, config, root / "tokenizer_config.json")
        return cls(
            fast=fast,
            special=frozenset(t.content for t in fast.get_added_tokens_decoder().values() if t.special),
            template=read_template(root, config),
            names={name: text for name in NAMED if (text := _content(config.get(name))) is not None},
            source=str(root),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens spelled in it become their ids.

        Raises `PromptError` if it is not Unicode, or where the tokenizer, which is the checkpoint's, fails on it.
        """
        try:
            text.encode()  # a lone surrogate has no UTF-8 form, and the tokenizer's own message does not say so
        except UnicodeEncodeError as error:
            raise PromptError(f"text is not valid Unicode: {error.reason} at character {error.start}") from error
        try:
            return list(self.fast.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if not _failed(error):
                raise
            raise PromptError(f"{self.source}: the tokenizer failed: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one by one."""
        return TextStream(self)

    def token(self, id: int) -> str | None:
        """How the vocabulary spells `id`, or None if it does not hold it."""
        return self.fast.id_to_token(id)

    def bytes_of(self, id: int) -> bytes:
        """The bytes that `id` contributes to a text: none for special tokens and ids outside the vocabulary."""
        text = self.fast.id_to_token(int(id))
        if text is None or text in self.special:
            return b""
        try:
            return bytes([BYTE_OF[letter] for letter in text])
        except KeyError:  # an added token, which is spelled in plain text
            return text.encode()

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of the conversation in the checkpoint's own layout, up to where the assistant is to answer.

        `messages` may hold only dicts, lists and strings: the template can call methods of whatever it is given.
        Raises `CheckpointError` if there is no template, `PromptError` if it fails on or refuses these messages.
        """
        if self.template is None:
            raise CheckpointError(f"{self.source} has no chat template; pass token ids instead: Prompt(tokens=...)")
        return self.encode(render(self.template, messages, self.names, self.source))


def _failed(error: BaseException) -> bool:
    """Whether the library raised it: `Exception`, nothing more specific, or a panic of its Rust code, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _read_fast(path: Path) -> "FastTokenizer":
    from tokenizers import Tokenizer as FastTokenizer

    content = read_object(path, CheckpointError)
    model, decoder = (part if isinstance(part := content.get(name), dict) else {} for name in ("model", "decoder"))
    kinds = model.get("type", "BPE"), decoder.get("type")
    if kinds != ("BPE", "ByteLevel"):
        raise CheckpointError(f"{path}: expected a byte-level BPE, got model and decoder {reprlib.repr(kinds)}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):  # never in byte-level BPE, and the library cuts merges there without looking: an abort
            raise CheckpointError(f"{path}: {key} must be empty in byte-level BPE, got {reprlib.repr(model[key])}")
    try:
        fast = FastTokenizer.from_file(str(path))
    except BaseException as error:
        if not _failed(error):
            raise
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    fast.no_truncation()
    fast.no_padding()
    return fast


def _content(token: object) -> str | None:
    """The text of a special token, which files spell as a string or as an object with a `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_tokens(fast: "FastTokenizer", config: dict[str, Any], path: Path) -> None:
    """Tokens that only `tokenizer_config.json` lists. Their ids follow from their order and must come out right."""
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict) or not all(_is_listed(id, entry) for id, entry in listed.items()):
        raise CheckpointError(f"{path}: added_tokens_decoder must map ids to objects with a content")
    entries = [listed[id] for id in sorted(listed, key=int)]
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    new = [
        AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in flags if flag in entry})
        for entry in entries
        if fast.token_to_id(entry["content"]) is None
    ]
    fast.add_tokens(new)  # in one call: each goes over all that were added before
    for id, entry in listed.items():
        if (found := fast.token_to_id(entry["content"])) != int(id):
            shown = reprlib.repr(entry["content"])
            raise CheckpointError(f"{path}: {shown} should be {id}, tokenizer.json has {found}")


def _is_listed(id: str, entry: Any) -> bool:
    """Whether this is the id of a token, of 32 bits, and an object with what it spells, in Unicode."""
    content = entry.get("content") if isinstance(entry, dict) else None
    spelled = isinstance(content, str) and content.encode(errors="replace").decode() == content
    return spelled and id.isdecimal() and len(id) <= 10
