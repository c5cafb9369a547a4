"""Reading Hugging Face safetensors folders into `Weights`.

`RULES` joins checkpoint names to fields. Before a tensor is read, the names in the files and the names in the rules
must cover each other exactly, and every shape and dtype must be one that was declared. Pickled checkpoints are not
read.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mllm.config import Config
from mllm.errors import CheckpointError
from mllm.files import check_inside
from mllm.weights import AFTER_NORM, Weights, bias_after_norm, build, paired, room, weight_after_norm

# Field (layer numbers as #) -> the stored tensors that are stacked along its first axis; for AFTER_NORM the arguments of
# `_folded`. `{text}` and `{vision}` are the prefixes of the family, below. A stored tensor has the shape of its field,
# unless sizes follow its name.
RULES = {
    "text.embed": ("{text}embed_tokens.weight",),
    "text.norm": ("{text}norm.weight",),
    "text.head": ("lm_head.weight",),
    "text.layers.#.norm_in": ("{text}layers.#.input_layernorm.weight",),
    "text.layers.#.qkv": (
        "{text}layers.#.self_attn.q_proj.weight H*D E",
        "{text}layers.#.self_attn.k_proj.weight K*D E",
        "{text}layers.#.self_attn.v_proj.weight K*D E",
    ),
    "text.layers.#.q_norm": ("{text}layers.#.self_attn.q_norm.weight",),
    "text.layers.#.k_norm": ("{text}layers.#.self_attn.k_norm.weight",),
    "text.layers.#.out": ("{text}layers.#.self_attn.o_proj.weight",),
    "text.layers.#.norm_mlp": ("{text}layers.#.post_attention_layernorm.weight",),
    "text.layers.#.gate_up": ("{text}layers.#.mlp.gate_proj.weight F E", "{text}layers.#.mlp.up_proj.weight F E"),
    "text.layers.#.down": ("{text}layers.#.mlp.down_proj.weight",),
    "vision.patch": ("{vision}patch_embed.proj.weight Ev channels frames side side",),
    "vision.patch_bias": ("{vision}patch_embed.proj.bias",),
    "vision.position": ("{vision}pos_embed.weight",),
    "vision.blocks.#.qkv": ("{vision}blocks.#.attn.qkv.weight", "{vision}blocks.#.norm1.weight Ev"),
    "vision.blocks.#.qkv_bias": (
        "{vision}blocks.#.attn.qkv.bias",
        "{vision}blocks.#.attn.qkv.weight Cv Ev",
        "{vision}blocks.#.norm1.bias Ev",
    ),
    "vision.blocks.#.out": ("{vision}blocks.#.attn.proj.weight",),
    "vision.blocks.#.out_bias": ("{vision}blocks.#.attn.proj.bias",),
    "vision.blocks.#.up": ("{vision}blocks.#.mlp.linear_fc1.weight", "{vision}blocks.#.norm2.weight Ev"),
    "vision.blocks.#.up_bias": (
        "{vision}blocks.#.mlp.linear_fc1.bias",
        "{vision}blocks.#.mlp.linear_fc1.weight Fv Ev",
        "{vision}blocks.#.norm2.bias Ev",
    ),
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
HEAD = "lm_head.weight"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Part(NamedTuple):
    """One tensor of the files, found before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    reader: Any

    def read(self) -> Tensor:
        """The numbers, on the host."""
        try:
            value: Tensor = self.reader.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be read ({error})") from None
        return value

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `CheckpointError` unless this is a weight of `shape`."""
        if self.shape != shape:
            raise CheckpointError(f"{self.file}: {self.name} is {list(self.shape)}, config.json makes it {list(shape)}")
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file}: {self.name} is {self.dtype}; weights are {', '.join(DTYPES)}")


def load(
    folder: str | os.PathLike[str],
    config: Config,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Weights:
    """Read the weights of `config` from the safetensors files of `folder`.

    `dtype` None takes that of the stored embedding for all. `progress` None shows a bar on a terminal only. Raises
    `CheckpointError` with the file and the tensor for anything that is broken, missing, extra or of the wrong shape.
    """
    with ExitStack() as stack:
        parts = _open(Path(folder), stack)
        joined = _join(config, parts, Path(folder))
        if config.text.tie_word_embeddings and HEAD in parts:
            _check_tied(parts[HEAD], joined["text.embed"][0])
        kind = dtype or DTYPES[joined["text.embed"][0].dtype]
        hidden = None if progress is None else not progress  # tqdm's None: where there is no terminal
        nowhere = sys.stderr is None  # as in a service, where tqdm would write to it all the same
        bar = stack.enter_context(tqdm(total=len(joined), desc="weights", disable=nowhere or hidden))

        empty = room(config, device=device, dtype=kind)

        @lru_cache(maxsize=3)  # a weight is wanted again for its bias
        def wide(part: Part) -> Tensor:
            """On the device, and only there in f32; a copy, as sums depend on where in memory a product's factors begin."""
            return part.read().to(device).to(torch.float32, copy=True)

        def make(path: str, shape: tuple[int, ...]) -> Tensor:
            bar.update()
            out = empty(path, shape)
            field = AFTER_NORM.fullmatch(path)
            if not (field and config.vision):
                return _stack(joined[path], out)
            value = _folded(kind, *map(wide, joined[path]))
            return out.copy_(paired(value, config.vision.num_heads) if field[1] == "qkv" else value)

        return build(config, make)


def _join(config: Config, parts: Mapping[str, Part], folder: Path) -> dict[str, list[Part]]:
    """The parts of every field, after the names, shapes and dtypes of both sides were compared."""
    prefixes = _PREFIXES_VISION if config.vision else _PREFIXES
    sizes = config.sizes
    if vision := config.vision:
        sizes |= {"channels": vision.in_channels, "frames": vision.temporal_patch_size, "side": vision.patch_size}
    joined: dict[str, list[Part]] = {}
    missing: dict[str, None] = {}  # in order; one may be wanted twice

    def make(path: str, shape: tuple[int, ...]) -> Tensor:
        number = re.search(r"\d+", path)
        joined[path] = []
        for rule in RULES[re.sub(r"\d+", "#", path)]:
            stored, *dims = rule.split()
            name = stored.format(**prefixes).replace("#", number[0] if number else "")
            if name not in parts:
                missing[name] = None
                continue
            parts[name].check(tuple(math.prod(sizes[x] for x in dim.split("*")) for dim in dims) or shape)
            joined[path].append(parts[name])
        return torch.empty(shape, device="meta")

    build(config, make)
    used = {part.name for group in joined.values() for part in group}
    redundant = {HEAD} if config.text.tie_word_embeddings else set()
    extra = sorted(parts.keys() - used - redundant)
    if missing or extra:
        lines = [f"  missing: {name}" for name in list(missing)[:8]] + [f"  unknown: {name}" for name in extra[:8]]
        raise CheckpointError(
            f"{folder}: the tensors are not those of this config.json "
            f"({len(missing)} missing, {len(extra)} unknown):\n" + "\n".join(lines)
        )
    return joined


def _stack(group: list[Part], out: Tensor) -> Tensor:
    """Fill the tensor of one field. Parts are read one by one, so the peak is one part above the result."""
    row = 0
    for part in group:
        value = part.read()
        if value.dim() == 5:  # the patch embedding: [Ev, channels, frames, rows, columns], see VisionWeights
            value = value.float().sum(2).flatten(1)
        out[row : row + len(value)].copy_(value)
        row += len(value)
    return out


def _folded(dtype: torch.dtype, stored: Tensor, other: Tensor, norm_bias: Tensor | None = None) -> Tensor:
    """A weight, of what is stored and the norm's; or a bias, of what is stored, the stored weight and the norm's bias."""
    if norm_bias is None:
        return weight_after_norm(stored, other, dtype=dtype)
    return bias_after_norm(stored, other, norm_bias)


def _check_tied(head: Part, embed: Part) -> None:
    """Some writers store a tied head, too. One that differs would be used by transformers, whatever the config says."""
    head.check(embed.shape)
    if head.dtype != embed.dtype or not torch.equal(head.read(), embed.read()):
        raise CheckpointError(
            f"{head.file}: {head.name} differs from {embed.name}, but config.json ties them; set tie_word_embeddings "
            "to false to use both"
        )


def _open(folder: Path, stack: ExitStack) -> dict[str, Part]:
    """The header of every safetensors file of the folder: tensor name -> where it is."""
    parts: dict[str, Part] = {}
    for file in _files(folder):
        try:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {_why_unreadable(file) or error}") from None
        for name, part in slices.items():
            if name in parts:
                raise CheckpointError(f"{file}: {name} is also in {parts[name].file.name}")
            parts[name] = Part(name, tuple(part.get_shape()), part.get_dtype(), file, reader)
    return parts


def _files(folder: Path) -> Iterator[Path]:
    """The weight files of a folder: the one, which transformers prefers, too, or the shards that the index names."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif index.is_file():
        names = _shards(index)
    else:
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: {name!r} is not the plain name of a file in this folder")
        file = folder / name
        if not os.path.isfile(file):  # Path.is_file raises for a name that is too long
            raise CheckpointError(f"{file}: missing")
        check_inside(file, CheckpointError)
        yield file


def _shards(index: Path) -> list[str]:
    check_inside(index, CheckpointError)
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
        return sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map ({error})") from None


def _why_unreadable(file: Path) -> str | None:
    """A better reason than the parser's, where the first bytes give one away."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        return error.strerror
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull` in the folder it came from"
    return "empty" if not head else None
