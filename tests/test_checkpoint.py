"""Weight files: whatever is broken is a CheckpointError that names the file and the tensor, before anything is made."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Tiny, make_tiny, words

import mllm
from mllm import checkpoint, families, weights
from mllm.errors import CheckpointError, ConfigError
from mllm.state import leaves

SINGLE, INDEX = checkpoint.SINGLE, checkpoint.INDEX
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.language_model.norm.weight"
QUERY = "model.language_model.layers.1.self_attn.q_proj.weight"
PATCH = "model.visual.patch_embed.proj.weight"

Break = Callable[[Path], object]


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite(file: Path, head: dict[str, Any] | bytes, body: bytes, size: int | None = None) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    """Change the tensors of the one file."""

    def run(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return run


def edit_header(change: Callable[[dict[str, Any]], Any], body: bytes = b"") -> Break:
    """Change the header of the one file and append `body` to its numbers."""

    def run(folder: Path) -> None:
        head, numbers = header(folder / SINGLE)
        change(head)
        rewrite(folder / SINGLE, head, numbers + body)

    return run


def shard(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda index: None) -> None:
    """Cut the one file in two with an index, and change the index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file)
    (folder / SINGLE).unlink()
    index = {"weight_map": {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}}
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def shards(change: Callable[[dict[str, Any]], Any]) -> Break:
    return lambda folder: shard(folder, change)


def rename(to: Any) -> Break:
    """Say in the index that the second shard is called `to`."""

    def change(index: dict[str, Any]) -> None:
        index["weight_map"] = {k: to if v == SHARDS[1] else v for k, v in index["weight_map"].items()}

    return shards(change)


def link_out(folder: Path) -> None:
    (folder / SINGLE).rename(folder.parent / "elsewhere.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "elsewhere.safetensors")


def link_to_itself(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(folder / SINGLE)


def twice(folder: Path) -> None:
    shard(folder)
    tensors = load_file(folder / SHARDS[1])
    save_file({**tensors, **dict([next(iter(load_file(folder / SHARDS[0]).items()))])}, folder / SHARDS[1])


def write(name: str, content: bytes) -> Break:
    def run(folder: Path) -> None:
        (folder / SINGLE).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return run


def cut(keep: int) -> Break:
    return lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:keep])


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / SHARDS[1]).unlink()


def shard_is_a_folder(folder: Path) -> None:
    rename("sub")(folder)
    (folder / "sub").mkdir()


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.zeros(33)


def offsets(name: str, begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    """Move where the numbers of a tensor begin and end, in bytes."""

    def change(head: dict[str, Any]) -> None:
        first, last = head[name]["data_offsets"]
        head[name]["data_offsets"] = [first + begin, last + end]

    return change


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 1503300328\n"

# name -> how to break the folder, and what the error says
BROKEN: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no file": (lambda f: (f / SINGLE).unlink(), (SINGLE, INDEX)),
    "empty": (write(SINGLE, b""), (SINGLE, "empty")),
    "garbage": (write(SINGLE, b"PK\x03\x04" + bytes(range(256)) * 9), (SINGLE,)),
    "a pickle": (write("pytorch_model.bin", b"\x80\x04."), (SINGLE, INDEX)),
    "a Git LFS pointer": (write(SINGLE, LFS), (SINGLE, "git lfs pull")),
    "7 bytes": (cut(7), (SINGLE,)),
    "header cut": (cut(100), (SINGLE,)),
    "numbers cut": (cut(-1), (SINGLE,)),
    "trailing bytes": (edit_header(lambda h: None, body=b"\0"), (SINGLE,)),
    "a header of 2^63 bytes": (lambda f: rewrite(f / SINGLE, b"{}", b"", size=2**63), (SINGLE,)),
    "a header of 200 MB": (lambda f: rewrite(f / SINGLE, b"{}", b"", size=200 * 10**6), (SINGLE,)),
    "a header that is no JSON": (lambda f: rewrite(f / SINGLE, b"{'a'", b""), (SINGLE,)),
    "a header that is a list": (lambda f: rewrite(f / SINGLE, b"[]", b""), (SINGLE,)),
    "a header that is not UTF-8": (lambda f: rewrite(f / SINGLE, b'{"\xff":1}', b""), (SINGLE,)),
    "overlap": (edit_header(offsets(NORM, -4, -4)), (SINGLE,)),
    "hole": (edit_header(lambda h: h.pop(NORM)), (SINGLE,)),
    "backwards": (edit_header(offsets(NORM, 128, -128)), (SINGLE,)),
    "beyond the end": (edit_header(offsets(NORM, 2**40, 2**40)), (SINGLE,)),
    "unknown dtype": (edit_header(lambda h: h[NORM].update(dtype="F33")), (SINGLE,)),
    "another dtype of the same size": (edit_header(lambda h: h[NORM].update(dtype="I32")), (SINGLE, NORM, "I32")),
    "a shape of too many numbers": (edit_header(lambda h: h[NORM].update(shape=[2**62, 2**62])), (SINGLE,)),
    "a negative shape": (edit_header(lambda h: h[NORM].update(shape=[-32])), (SINGLE,)),
    "another shape of the same size": (edit_header(lambda h: h[QUERY].update(shape=[16, 64])), (SINGLE, QUERY, "[16, 64]")),
    "integers": (edit(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)})), (SINGLE, NORM, "I64")),
    "8-bit floats": (edit(lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})), (SINGLE, NORM, "F8")),
    "doubles": (edit(lambda t: t.update({NORM: torch.ones(32).double()})), (SINGLE, NORM, "F64")),
    "wrong shape": (edit(grow), (SINGLE, NORM, "[33]", "[32]")),
    "a scalar": (edit(lambda t: t.update({NORM: torch.tensor(1.0)})), (SINGLE, NORM, "[]")),
    "wrong part of a fused field": (edit(lambda t: t.update({QUERY: t[QUERY][:-8].clone()})), (SINGLE, QUERY, "[24, 32]")),
    "wrong patch kernel": (edit(lambda t: t.update({PATCH: t[PATCH][:, :, :1].clone()})), (SINGLE, PATCH, "3, 1, 4, 4")),
    "missing tensor": (edit(lambda t: t.pop(QUERY)), ("1 missing", QUERY)),
    "extra tensor": (edit(lambda t: t.update(extra=torch.zeros(1))), ("1 unknown", "extra")),
    "no tensors": (lambda f: rewrite(f / SINGLE, b"{}", b""), ("missing",)),
    "an untied head in the name of a tied one": (edit(lambda t: t.pop("lm_head.weight")), ("lm_head.weight",)),
    "missing shard": (lose_a_shard, (SHARDS[1], "missing")),
    "a tensor in two shards": (twice, (SHARDS[1], "lm_head.weight", SHARDS[0])),
    "shard above the folder": (rename("../x.safetensors"), (INDEX, "../x.safetensors")),
    "absolute shard": (rename("/etc/passwd"), (INDEX, "/etc/passwd")),
    "shard in a folder": (rename("a/b.safetensors"), (INDEX, "a/b")),
    "shard called ..": (rename(".."), (INDEX, "'..'")),
    "shard without a name": (rename(""), (INDEX,)),
    "shard with a null byte": (rename("a\0b"), ("missing",)),
    "shard with a name too long": (rename("x" * 5000), ("missing",)),
    "shard that is a number": (rename(3), (INDEX,)),
    "shard that is a folder": (shard_is_a_folder, ("sub", "missing")),
    "link out of the folder": (link_out, (SINGLE, "link out")),
    "link to itself": (link_to_itself, (SINGLE,)),
    "index that is no JSON": (write(INDEX, b"{"), (INDEX,)),
    "index that is a list": (write(INDEX, b"[]"), (INDEX, "weight_map")),
    "index without a map": (write(INDEX, b'{"metadata": {}}'), (INDEX, "weight_map")),
    "index with a list for a map": (write(INDEX, b'{"weight_map": ["a"]}'), (INDEX, "weight_map")),
    "index with lists for names": (write(INDEX, b'{"weight_map": {"a": ["b"]}}'), (INDEX,)),
    "index of deep lists": (write(INDEX, b"[" * 100_000), (INDEX,)),
    "index of nothing": (write(INDEX, b'{"weight_map": {}}'), ("missing",)),
}  # fmt: skip


def open_files() -> list[str]:
    """What this process holds open; nothing where the system does not say."""
    folder = Path("/proc/self/fd")
    return sorted(str(link.resolve()) for link in folder.iterdir() if link.exists()) if folder.is_dir() else []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_a_checkpoint_error_that_names_its_place(folder: Path, name: str) -> None:
    break_it, said = BROKEN[name]
    break_it(folder)
    before = {file.name: file.lstat().st_size for file in folder.iterdir()}
    opened = open_files()
    with pytest.raises(CheckpointError) as caught:
        mllm.load(folder, progress=False)
    text = str(caught.value)
    for part in (str(folder), *said):
        assert part in text, text
    assert not re.search(r"0x[0-9a-f]{4}", text)
    assert {file.name: file.lstat().st_size for file in folder.iterdir()} == before
    assert open_files() == opened


def test_a_folder_that_is_cut_in_two_by_hand_loads_as_before(folder: Path, vision_model: Tiny) -> None:
    shard(folder)
    for got, want in zip(leaves(mllm.load(folder).weights), leaves(vision_model.ours.weights), strict=True):
        assert torch.equal(got, want)


def test_the_one_file_wins_over_an_index_as_it_does_in_transformers(folder: Path) -> None:
    (folder / INDEX).write_text("{")
    assert mllm.load(folder, progress=False).config.vision is not None


def test_no_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", "Qwen/Qwen3-0.6B"):
        with pytest.raises(CheckpointError, match="nothing is downloaded"):
            mllm.load(path)


def test_links_inside_a_hub_download_are_followed_and_no_others(folder: Path, tmp_path: Path) -> None:
    """The hub keeps snapshots/<commit>/model.safetensors as a link to blobs/<hash>."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert mllm.load(snapshot, progress=False).config.vision is not None
    (blobs / SINGLE).rename(tmp_path / "hub" / SINGLE)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(Path("../..") / SINGLE)
    with pytest.raises(CheckpointError, match="link out"):
        mllm.load(snapshot, progress=False)


def test_a_tied_head_that_is_stored_too_is_passed_over(tmp_path: Path) -> None:
    tied = make_tiny(tmp_path, tie_word_embeddings=True)
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    edit(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path)
    again = mllm.load(tmp_path, progress=False)
    assert again.weights.text.head is again.weights.text.embed
    prompt = [mllm.Prompt(words(5))]
    assert torch.equal(mllm.score(again, prompt)[0], mllm.score(tied.ours, prompt)[0])


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may read everything, so the system's answer is made up."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    config = families.read(folder)
    monkeypatch.setattr(checkpoint, "safe_open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: Permission denied"):
        checkpoint.load(folder, config)
    monkeypatch.setattr(Path, "is_file", refuse)  # as in a folder that may not be searched
    with pytest.raises(ConfigError, match=r"config\.json: .*Permission denied"):
        families.read(folder)


def test_a_broken_tokenizer_is_found_before_a_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.Part, "read", lambda part: pytest.fail(f"{part.name} was read"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        mllm.load(folder, progress=False)


def test_a_path_that_no_folder_can_have_is_none() -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        mllm.load("x" * 5000)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    """transformers would use it, with a warning, and answer differently."""
    make_tiny(tmp_path, tie_word_embeddings=True)
    for head in (torch.zeros(96, 32), torch.zeros(96, 32).bfloat16(), torch.zeros(95, 32)):
        edit(lambda t, head=head: t.update({"lm_head.weight": head}))(tmp_path)  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=r"lm_head\.weight") as caught:
            mllm.load(tmp_path, progress=False)
        assert SINGLE in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_config_or_the_one_asked_for(folder: Path, dtype: str) -> None:
    for tensor in leaves(mllm.load(folder, dtype=dtype).weights):
        assert tensor.dtype == getattr(torch, dtype)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    assert mllm.load(folder).dtype == getattr(torch, dtype)


def test_where_config_names_no_dtype_all_weights_take_that_of_the_embedding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    edit(lambda t: t.update({k: v.bfloat16() for k, v in t.items() if "norm" not in k}))(folder)
    model = mllm.load(folder)
    assert {tensor.dtype for tensor in leaves(model.weights)} == {torch.bfloat16}
    assert len(mllm.generate(model, [mllm.Prompt(words(5))], max_new_tokens=3)[0].tokens) == 3


def test_the_rules_and_the_fields_are_the_same_set(vision_model: Tiny, text_model: Tiny) -> None:
    seen = set()

    def make(path: str, shape: tuple[int, ...]) -> torch.Tensor:
        seen.add(re.sub(r"\d+", "#", path))
        return torch.empty(shape, device="meta")

    weights.build(vision_model.ours.config, make)
    assert seen == set(checkpoint.RULES)


def test_random_weights_are_a_function_of_the_seed(vision_model: Tiny) -> None:
    a, b, c = (mllm.dummy(vision_model.ours.config, seed=s, dtype="float32").weights for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(leaves(a), leaves(c), strict=True))
    assert {x.shape for x in leaves(a)} == {x.shape for x in leaves(vision_model.ours.weights)}


def test_the_folder_can_be_changed_after_it_was_loaded(folder: Path, vision_model: Tiny) -> None:
    """Weights are copies: a file that is written over must not show through a memory map."""
    model = mllm.load(folder)
    data = (folder / SINGLE).read_bytes()
    with (folder / SINGLE).open("r+b") as file:
        file.write(bytes(len(data)))
    for got, want in zip(leaves(model.weights), leaves(vision_model.ours.weights), strict=True):
        assert torch.equal(got, want)
