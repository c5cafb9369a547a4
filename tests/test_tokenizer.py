"""Text: equal to transformers' tokenizer, streamed without splitting a character, and checked when it is loaded."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import ADDED, SPECIAL, TEMPLATE, write_tokenizer
from transformers import AutoTokenizer

from mllm.errors import CheckpointError, PromptError
from mllm.tokenizer import BYTE_OF, Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Was ist das? 你好 🙂"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (path / "config.json").write_text('{"model_type": "qwen3_vl"}')  # transformers asks which model it is for
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return loaded(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def loaded(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


texts = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(
    st.sampled_from([*SPECIAL, *ADDED, " ", "\n", "é", "e\u0301", "你", "🙂", "a", "\u200d", "\ufffd"]), max_size=20
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_encode_equals_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text) == theirs(text).input_ids


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 430), max_size=40))
def test_decode_of_any_ids_equals_transformers(ours: Tokenizer, theirs: Any, ids: list[int]) -> None:
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 430), max_size=40))
def test_stream_pieces_of_any_ids_join_to_decode(ours: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(ours, ids)) == ours.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_stream_of_valid_text_never_shows_half_a_character(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    pieces = streamed(ours, ids)
    whole = ours.decode(ids)
    assert "".join(pieces) == whole
    assert pieces[-1] == ""
    assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd") == text.count("\ufffd")


def test_stream_holds_an_emoji_until_its_last_byte(ours: Tokenizer) -> None:
    letters = {byte: letter for letter, byte in BYTE_OF.items()}
    ids = [ours.fast.token_to_id(letters[byte]) for byte in "a🙂b".encode()]
    assert streamed(ours, ids) == ["a", "", "", "", "🙂", "b", ""]
    assert streamed(ours, ids[:4]) == ["a", "", "", "", "\ufffd"]
    assert streamed(ours, [*ids[:4], ids[0]]) == ["a", "", "", "", "\ufffda", ""]


def test_a_stream_keeps_no_more_than_the_bytes_of_a_character(ours: Tokenizer) -> None:
    letters = {byte: letter for letter, byte in BYTE_OF.items()}
    stream = ours.stream()
    lead, follow = (ours.fast.token_to_id(letters[byte]) for byte in (0xF0, 0x9F))
    for _ in range(1000):  # bytes that never become a character
        stream.push(lead)
        assert len(stream._utf8.getstate()[0]) <= 3
        stream.push(follow)
        assert len(stream._utf8.getstate()[0]) <= 3


def test_special_tokens_are_silent_and_added_ones_are_not(ours: Tokenizer) -> None:
    assert ours.decode(ours.encode("a<|im_end|>b<think>c")) == "ab<think>c"
    assert ours.decode([10**6]) == ""  # models have more logits than their tokenizers have tokens
    assert ours.token(ours.encode("<|image_pad|>")[0]) == "<|image_pad|>"
    assert ours.token(10**6) is None


def test_the_byte_letters_are_those_of_the_tokenizers_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(BYTE_OF) == set(ByteLevel.alphabet())
    assert sorted(BYTE_OF.values()) == list(range(256))
    for text in ("".join(map(chr, range(256))), "你🙂"):
        ((letters, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(BYTE_OF[letter] for letter in letters) == text.encode()


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_chat_equals_transformers_wherever_the_template_is(tmp_path: Path, theirs: Any, where: str) -> None:
    want = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False, chat_template=TEMPLATE)
    ours = loaded(write_tokenizer(tmp_path, where=where))
    assert ours.chat(CHAT) == theirs(want, add_special_tokens=False).input_ids
    assert want.endswith("<|im_start|>assistant\n")


def test_the_jinja_file_wins_and_a_default_among_named_templates_counts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template="old", where="tokenizer_config.json")
    assert loaded(tmp_path).template == "old"
    (tmp_path / "chat_template.json").write_text('{"chat_template": [{"name": "default", "template": "named"}]}')
    assert loaded(tmp_path).template == "named"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert loaded(tmp_path).template == "new"


def test_a_template_may_name_special_tokens(tmp_path: Path) -> None:
    ours = loaded(write_tokenizer(tmp_path, template="{{ messages[0].content }}{{ eos_token }}{{ bos_token }}"))
    assert ours.chat([{"role": "user", "content": "hi"}]) == ours.encode("hi<|im_end|>")


def test_a_folder_without_a_tokenizer_is_none_and_one_without_a_template_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer.load(tmp_path) is None
    ours = loaded(write_tokenizer(tmp_path, template=None))
    assert ours.decode(ours.encode("hello")) == "hello"
    with pytest.raises(CheckpointError, match="has no chat template"):
        ours.chat(CHAT)


def test_half_a_tokenizer_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"vocab\.json but no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": "a special token"}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {"content": "\\ud800"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"%s": {"content": "a"}}}' % (b"9" * 5000)),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("chat_template.json", b"{"),
        ("chat_template.json", b'{"chat_template": {"default": "x"}}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_tokenizer(tmp_path, template=None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


def changed(folder: Path, **parts: Any) -> Path:
    """A folder with a tokenizer.json in which `parts` are replaced."""
    path = write_tokenizer(folder) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


@pytest.mark.parametrize(
    "part",
    [
        {"decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"decoder": "ByteLevel" * 10**6},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
    ],
)
def test_another_kind_of_tokenizer_is_refused(tmp_path: Path, part: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="byte-level BPE") as caught:
        Tokenizer.load(changed(tmp_path, **part))
    assert len(str(caught.value)) < 500


def test_what_the_library_cannot_load_is_a_checkpoint_error_be_it_a_panic(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Tokenizer.load(changed(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}))


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "^"}, "content": "x"}},
        {"model": {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "<unk>"}},
    ],
)
def test_what_the_library_cannot_encode_is_a_prompt_error_be_it_a_panic(tmp_path: Path, part: dict[str, Any]) -> None:
    ours = loaded(changed(tmp_path, **part))
    with pytest.raises(PromptError, match="the tokenizer failed: "):
        ours.encode("hello")


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_a_file_that_would_abort_the_library_is_refused_before_it_is_read(tmp_path: Path, key: str) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"][key] = "("  # merges are cut at its length, in the middle of a letter
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{key} must be empty"):
        Tokenizer.load(tmp_path)


def test_tokens_that_only_the_config_lists_are_added_with_their_ids(tmp_path: Path, ours: Tokenizer) -> None:
    write_tokenizer(tmp_path)
    size = ours.fast.get_vocab_size()
    listed = {
        str(size + 1): {"content": "<second>", "special": True, "normalized": False},
        str(size): {"content": "<first>", "special": False, "normalized": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    more = loaded(tmp_path)
    assert more.encode("<first><second>") == [size, size + 1]
    assert more.decode([size, size + 1]) == "<first>"


def test_thousands_of_tokens_of_the_config_are_added_in_no_time(tmp_path: Path, ours: Tokenizer) -> None:
    write_tokenizer(tmp_path)
    size = ours.fast.get_vocab_size()
    listed = {str(size + i): {"content": f"<{i}>", "special": True} for i in range(4000)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    start = time.perf_counter()
    more = loaded(tmp_path)
    assert time.perf_counter() - start < 2  # one by one it takes seconds, and four times as long for twice as many
    assert more.encode("<3999><0>") == [size + 3999, size]


def test_settings_for_padding_and_truncation_do_not_reach_the_ids(tmp_path: Path, ours: Tokenizer) -> None:
    fast = loaded(write_tokenizer(tmp_path)).fast
    fast.enable_truncation(3)
    fast.enable_padding(length=50)
    fast.save(str(tmp_path / "tokenizer.json"))
    text = "a rather long line of text " * 5
    assert loaded(tmp_path).encode(text) == ours.encode(text)


def test_text_that_is_no_unicode_is_a_prompt_error(ours: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode: surrogates not allowed at character 2"):
        ours.encode("ab\ud800")


ESCAPES = {
    "dunder": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "attr filter": "{{ (messages | attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__}'.format(messages) }}{{ 1 / 0 }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "memory": "{{ 'x' * 10 ** 15 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for %}",
    "Python's syntax": "{% for m in messages %}" * 30 + "{% endfor %}" * 30,
    "Python's names": "{{ 1e999 | int }}",
    "undefined": "{{ messages[0].a.b.c }}",
    "unknown filter": "{{ 1 | nothing }}",
    "wrong types": "{{ 1 + 'a' }}",
    "its own refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("name", list(ESCAPES))
def test_a_hostile_or_broken_template_is_a_prompt_error(tmp_path: Path, name: str) -> None:
    ours = loaded(write_tokenizer(tmp_path, template=ESCAPES[name]))
    with pytest.raises(PromptError, match="the chat template failed: "):
        ours.chat(CHAT)


def test_loading_and_decoding_import_no_transformers(folder: Path) -> None:
    script = f"""
import sys
from mllm.tokenizer import Tokenizer
tokenizer = Tokenizer.load({str(folder)!r})
print(tokenizer.decode(tokenizer.encode("hello")), "transformers" in sys.modules)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.split() == ["hello", "False"]
