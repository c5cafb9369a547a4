"""Reading Hugging Face safetensors folders into `Weights`.

`RULES` joins checkpoint names to fields. Before a tensor is read, the names in the files and the names in the
rules must cover each other exactly, and every shape must be the declared one. Pickled checkpoints are not read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mllm.config import Config
from mllm.errors import CheckpointError
from mllm.weights import Weights, build

# Field (layer numbers as #) -> the tensors that are stacked along its first axis. `{text}` and `{vision}` are the
# prefixes of the family, below.
RULES = {
    "text.embed": ("{text}embed_tokens.weight",),
    "text.norm": ("{text}norm.weight",),
    "text.head": ("lm_head.weight",),
    "text.layers.#.norm_in": ("{text}layers.#.input_layernorm.weight",),
    "text.layers.#.qkv": tuple(f"{{text}}layers.#.self_attn.{x}_proj.weight" for x in "qkv"),
    "text.layers.#.q_norm": ("{text}layers.#.self_attn.q_norm.weight",),
    "text.layers.#.k_norm": ("{text}layers.#.self_attn.k_norm.weight",),
    "text.layers.#.out": ("{text}layers.#.self_attn.o_proj.weight",),
    "text.layers.#.norm_mlp": ("{text}layers.#.post_attention_layernorm.weight",),
    "text.layers.#.gate_up": ("{text}layers.#.mlp.gate_proj.weight", "{text}layers.#.mlp.up_proj.weight"),
    "text.layers.#.down": ("{text}layers.#.mlp.down_proj.weight",),
    "vision.patch": ("{vision}patch_embed.proj.weight",),
    "vision.patch_bias": ("{vision}patch_embed.proj.bias",),
    "vision.position": ("{vision}pos_embed.weight",),
    "vision.blocks.#.norm_in": ("{vision}blocks.#.norm1.weight",),
    "vision.blocks.#.norm_in_bias": ("{vision}blocks.#.norm1.bias",),
    "vision.blocks.#.qkv": ("{vision}blocks.#.attn.qkv.weight",),
    "vision.blocks.#.qkv_bias": ("{vision}blocks.#.attn.qkv.bias",),
    "vision.blocks.#.out": ("{vision}blocks.#.attn.proj.weight",),
    "vision.blocks.#.out_bias": ("{vision}blocks.#.attn.proj.bias",),
    "vision.blocks.#.norm_mlp": ("{vision}blocks.#.norm2.weight",),
    "vision.blocks.#.norm_mlp_bias": ("{vision}blocks.#.norm2.bias",),
    "vision.blocks.#.up": ("{vision}blocks.#.mlp.linear_fc1.weight",),
    "vision.blocks.#.up_bias": ("{vision}blocks.#.mlp.linear_fc1.bias",),
    "vision.blocks.#.down": ("{vision}blocks.#.mlp.linear_fc2.weight",),
    "vision.blocks.#.down_bias": ("{vision}blocks.#.mlp.linear_fc2.bias",),
}
_MERGER = {"norm": "norm", "up": "linear_fc1", "down": "linear_fc2"}
for _field, _name in _MERGER.items():
    for _suffix, _kind in (("", "weight"), ("_bias", "bias")):
        RULES[f"vision.merger.{_field}{_suffix}"] = (f"{{vision}}merger.{_name}.{_kind}",)
        RULES[f"vision.taps.#.{_field}{_suffix}"] = (f"{{vision}}deepstack_merger_list.#.{_name}.{_kind}",)

_PREFIXES = {"text": "model.", "vision": ""}
_PREFIXES_VISION = {"text": "model.language_model.", "vision": "model.visual."}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Part(NamedTuple):
    """One tensor of the files, found before it is read."""

    shape: tuple[int, ...]
    file: Path
    reader: Any


def load(
    folder: str | os.PathLike[str],
    config: Config,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Weights:
    """Read the weights of `config` from the safetensors files of `folder`.

    `dtype` None keeps the stored one. `progress` None shows a bar on a terminal only. Raises `CheckpointError`
    with the file and the tensor for anything that is broken, missing, extra or of the wrong shape.
    """
    with ExitStack() as stack:
        parts = _open(Path(folder), stack)
        joined = _join(config, parts, Path(folder))
        bar = stack.enter_context(
            tqdm(total=len(joined), desc="weights", disable=not progress if progress is not None else None)
        )

        def make(path: str, shape: tuple[int, ...]) -> Tensor:
            bar.update()
            return _read(joined[path], shape, device, dtype)

        return build(config, make)


def _join(config: Config, parts: Mapping[str, Part], folder: Path) -> dict[str, list[tuple[str, Part]]]:
    """The parts of every field, after the names and the shapes of both sides were compared."""
    prefixes = _PREFIXES_VISION if config.vision else _PREFIXES
    joined: dict[str, list[tuple[str, Part]]] = {}
    missing: list[str] = []

    def make(path: str, shape: tuple[int, ...]) -> Tensor:
        numbers = iter(re.findall(r"\d+", path))
        names = [rule.format(**prefixes) for rule in RULES[re.sub(r"\d+", "#", path)]]
        number = next(numbers, "")
        names = [name.replace("#", number) for name in names]
        missing.extend(name for name in names if name not in parts)
        joined[path] = [(name, parts[name]) for name in names if name in parts]
        if len(joined[path]) == len(names):
            _check_shapes(path, shape, joined[path], config)
        return torch.empty(shape, device="meta")

    build(config, make)
    used = {name for group in joined.values() for name, _ in group}
    extra = sorted(parts.keys() - used - _redundant(config))
    if missing or extra:
        lines = [f"  missing: {name}" for name in missing[:8]] + [f"  unknown: {name}" for name in extra[:8]]
        raise CheckpointError(
            f"{folder}: the tensors are not those of this config.json "
            f"({len(missing)} missing, {len(extra)} unknown):\n" + "\n".join(lines)
        )
    return joined


def _redundant(config: Config) -> set[str]:
    """Tensors that some writers store although they follow from others: a tied head."""
    return {"lm_head.weight"} if config.text.tie_word_embeddings else set()


def _check_shapes(path: str, shape: tuple[int, ...], group: list[tuple[str, Part]], config: Config) -> None:
    sizes, vision = config.sizes, config.vision
    rows = [shape[0]]
    if path.endswith(".qkv") and path.startswith("text."):
        rows = [sizes["A"], sizes["K"] * sizes["D"], sizes["K"] * sizes["D"]]
    elif path.endswith(".gate_up"):
        rows = [sizes["F"], sizes["F"]]
    for (name, part), count in zip(group, rows, strict=True):
        expected = (count, *shape[1:])
        if vision and path == "vision.patch":
            patch = (vision.patch_size, vision.patch_size)
            expected = (shape[0], vision.in_channels, vision.temporal_patch_size, *patch)
        if part.shape != expected:
            raise CheckpointError(f"{part.file}: {name} is {list(part.shape)}, config.json makes it {list(expected)}")


def _read(
    group: list[tuple[str, Part]], shape: tuple[int, ...], device: str | torch.device, dtype: torch.dtype | None
) -> Tensor:
    """The tensor of one field. Parts are copied into place one by one, so the peak is one part above the result."""
    out: Tensor | None = None
    row = 0
    for name, part in group:
        try:
            value = part.reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{part.file}: {name} cannot be read ({error})") from None
        if not value.is_floating_point():
            raise CheckpointError(f"{part.file}: {name} is {value.dtype}; weights are float32, bfloat16 or float16")
        if value.dim() == 5:  # the patch embedding: [Ev, channels, frames, rows, columns], see VisionWeights
            value = value.float().sum(2).flatten(1).to(value.dtype)
        if out is None:
            out = torch.empty(shape, dtype=dtype or value.dtype, device=device)
        out[row : row + len(value)].copy_(value)
        row += len(value)
    if out is None:
        raise CheckpointError("a rule without parts")
    return out


def _open(folder: Path, stack: ExitStack) -> dict[str, Part]:
    """The header of every safetensors file of the folder: tensor name -> where it is."""
    parts: dict[str, Part] = {}
    for file in _files(folder):
        try:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            shapes = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {_why_unreadable(file) or error}") from None
        for name, shape in shapes.items():
            if name in parts:
                raise CheckpointError(f"{file}: {name} is also in {parts[name].file.name}")
            parts[name] = Part(shape, file, reader)
    return parts


def _files(folder: Path) -> Iterator[Path]:
    """The weight files of a folder: the one, or the shards that the index names."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        names = [SINGLE]
    else:
        names = _shards(index)
    root = folder.resolve()
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: {name!r} is not the plain name of a file in this folder")
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.resolve().parent != root and not _same_repository(file.resolve(), root):
            raise CheckpointError(f"{file}: a link out of the model folder")
        yield file


def _same_repository(target: Path, root: Path) -> bool:
    """Whether a link stays in one hub download, whose snapshots/<commit>/ link into the blobs/ beside them."""
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"


def _shards(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
        return sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map ({error})") from None


def _why_unreadable(file: Path) -> str | None:
    """A better reason than the parser's, where the first bytes give one away."""
    with file.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull` in the folder it came from"
    return "empty" if not head else None
