"""The models that are measured: a folder, a public model's shapes with random weights, or one of two small ones."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor

import mllm
from mllm import families, signs, state
from mllm.checkpoint import RULES
from mllm.model import Model
from mllm.weights import AFTER_NORM, paired

_TEXT = {
    "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 768,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 8, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "vocab_size": 8192,
}  # fmt: skip
_VISION = {
    "deepstack_visual_indexes": [1, 2, 3], "depth": 6, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 192,
    "in_channels": 3, "intermediate_size": 512, "model_type": "qwen3_vl", "num_heads": 3,
    "num_position_embeddings": 256, "out_hidden_size": 256, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "small-text": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "eos_token_id": 1, **_TEXT},
    "small-vl": {
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 5,
        "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4, "tie_word_embeddings": True,
        "text_config": {
            **_TEXT, "model_type": "qwen3_vl_text", "eos_token_id": 1,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"},
        },
        "vision_config": _VISION,
    },
}  # fmt: skip
"""About 10 million parameters each, so that a run on two CPU cores takes seconds a point."""
EMBEDDED = "signs"  # the model that ships with the package


def _folder_of(name: str) -> Path | None:
    """The folder that a name stands for: a path, or the embedded model; None for random weights."""
    folder = signs.FOLDER if name == EMBEDDED else Path(name)
    return folder if folder.is_dir() else None


def config_json(name: str) -> dict[str, Any]:
    """The `config.json` of a small or public model."""
    if name in SMALL:
        return SMALL[name]
    file = resources.files("mllm") / "presets" / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def get(name: str, **options: Any) -> Model:
    """A model by folder or name; `options` are those of `mllm.load` and `mllm.dummy`. Raises `ValueError` for neither."""
    if (path := _folder_of(name)) is not None:
        return attrs.evolve(mllm.load(path, **options), name=Path(name).name)
    if name not in SMALL and name not in families.PRESETS:
        raise ValueError(f"no folder and no model is called {name!r}; names are {', '.join(known())}")
    if name in families.PRESETS:
        return mllm.dummy(name, **options)
    return attrs.evolve(mllm.dummy(families.parse(SMALL[name], source=name), **options), name=name)


def known() -> tuple[str, ...]:
    return (EMBEDDED, *SMALL, *families.PRESETS)


def folder(name: str, model: Model, into: Path) -> Path:
    """A Hugging Face folder with the weights of `model`: what `name` is, or else one written to `into`.

    transformers and `mllm.load` both read it, so a comparison runs on the same numbers.
    """
    if (path := _folder_of(name)) is not None:
        return path
    config = config_json(name)
    save_file(checkpoint_tensors(model), into / "model.safetensors", metadata={"format": "pt"})
    kind = str(model.dtype).removeprefix("torch.")
    (into / "config.json").write_text(json.dumps({**config, "dtype": kind}))
    return into


def checkpoint_tensors(model: Model) -> dict[str, Tensor]:
    """The weights under the names that checkpoints use: `mllm.checkpoint.RULES` backwards."""
    vl = model.config.vision is not None
    prefixes = {"text": "model.language_model." if vl else "model.", "vision": "model.visual."}
    found: dict[str, Tensor] = {}
    for path, tensor in _paths(model.weights.text, "text").items():
        if not (path == "text.head" and model.config.text.tie_word_embeddings):
            found |= _named(path, tensor, model, prefixes)
    if model.weights.vision is not None:
        for path, tensor in _paths(model.weights.vision, "vision").items():
            found |= _named(path, tensor, model, prefixes)
    return found


def _paths(tree: state.State, prefix: str) -> dict[str, Tensor]:
    """Every tensor of a weight tree by its path, like text.layers.3.qkv."""
    found: dict[str, Tensor] = {}
    for name in tree.__names__:
        value = getattr(tree, name)
        if isinstance(value, Tensor):
            found[f"{prefix}.{name}"] = value
        elif isinstance(value, tuple):
            for index, part in enumerate(value):
                found |= _paths(part, f"{prefix}.{name}.{index}")
        else:
            found |= _paths(value, f"{prefix}.{name}")
    return found


def _named(path: str, tensor: Tensor, model: Model, prefixes: dict[str, str]) -> dict[str, Tensor]:
    """One field as the tensors that a checkpoint stores it in."""
    number = next((part for part in path.split(".") if part.isdecimal()), "")
    rule = RULES[path.replace(f".{number}.", ".#.") if number else path]
    keys = [name.split(" ")[0].format(**prefixes).replace("#", number) for name in rule]  # sizes may follow
    text, vision = model.config.text, model.config.vision
    if path == "vision.patch" and vision is not None:  # a checkpoint has a kernel for each frame; they sum to ours
        frames, side = vision.temporal_patch_size, vision.patch_size
        kernel = (tensor / frames).view(-1, 3, 1, side, side).expand(-1, -1, frames, -1, -1)
        return {keys[0]: kernel.contiguous().cpu()}
    if vision is not None and (field := AFTER_NORM.fullmatch(path)):  # after a norm that does nothing
        if field[1] == "qkv":
            order = paired(torch.arange(len(tensor)), vision.num_heads)
            tensor = torch.empty_like(tensor).index_copy_(0, order.to(tensor.device), tensor)
        norm = torch.full((vision.hidden_size,), 0.0 if field[2] else 1.0, dtype=tensor.dtype)
        return {keys[0]: tensor.contiguous().clone().cpu(), keys[-1]: norm}
    heads, kv_heads = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    sizes = {3: (heads, kv_heads, kv_heads), 2: (text.intermediate_size,) * 2, 1: (len(tensor),)}[len(keys)]
    parts = tensor.split(sizes) if len(keys) > 1 else (tensor,)
    return {key: part.contiguous().clone().cpu() for key, part in zip(keys, parts, strict=True)}
