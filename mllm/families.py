"""Model families: how the `config.json` of each becomes a `Config`.

The file is read closed-world. Every key is one of three things: a field of the configuration, required to hold
the one value that this runtime computes, or known to change nothing at inference. Any other key is refused by
name, because a key that is skipped in silence is a model that is computed wrongly.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import attrs

from mllm.config import Config, TextConfig, VisionConfig
from mllm.errors import ConfigError
from mllm.files import read_object, read_optional

PRESETS = (
    "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b",
)  # fmt: skip

Json = Mapping[str, Any]

# Keys that change nothing at inference, or that are read where they count and only echoed elsewhere.
_HARMLESS = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder",
    "label2id", "max_window_layers", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "return_dict", "sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache", "vision_end_token_id", "vision_start_token_id",
})  # fmt: skip
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
_TEXT_FIXED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}
_VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh"}


def preset(name: str) -> Config:
    """The configuration of a public model, by a name of `PRESETS`. The files ship with the package."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    file = resources.files("mllm") / "presets" / f"{name}.json"
    return parse(json.loads(file.read_text(encoding="utf-8")), source=name)


def read(folder: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> Config:
    """Read `config.json`, and the end tokens of `generation_config.json`, of a model folder.

    Keys named in `ignore` are passed over. Raises `ConfigError` with the file and the key.
    """
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    data = read_object(path, ConfigError)
    if (end := read_optional(generation, ConfigError).get("eos_token_id")) is not None:
        data["eos_token_id"] = end
    return parse(data, source=str(path), ignore=ignore)


def parse(data: Json, *, source: str = "config", ignore: Collection[str] = ()) -> Config:
    """The configuration that `data`, the contents of a `config.json`, describes; `source` names it in errors."""
    if isinstance(ignore, str):
        raise TypeError(f"ignore_config: expected a collection of keys, got {ignore!r}; pass ({ignore!r},)")
    kind = data.get("model_type")
    try:
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ConfigError(f"model_type {reprlib.repr(kind)} is not supported; supported are {', '.join(FAMILIES)}")
        return FAMILIES[kind](data, frozenset(ignore))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _qwen3(data: Json, ignore: frozenset[str]) -> Config:
    text = _text(data, data, ignore, more={"layer_types"}, sections=None)
    full = ["full_attention"] * text.num_hidden_layers
    _require_fixed(data, {"layer_types": full}, ignore, where="")
    return Config(text=text, end_tokens=_end_tokens(data), dtype=_dtype(data))


def _qwen3_vl(data: Json, ignore: frozenset[str]) -> Config:
    parts = {"text_config": {"qwen3_vl_text"}, "vision_config": {"qwen3_vl", "qwen3_vl_vision"}}
    _refuse_unknown(data, {*parts, "image_token_id", "video_token_id"}, ignore, where="")
    for part, kinds in parts.items():
        if not isinstance(data.get(part), Mapping):
            raise ConfigError(f"{part}: expected an object, got {reprlib.repr(data.get(part))}")
        if (kind := data[part].get("model_type")) is not None and kind not in sorted(kinds):
            raise ConfigError(f"{part}.model_type: expected {' or '.join(sorted(kinds))}, got {reprlib.repr(kind)}")
    text, vision = data["text_config"], data["vision_config"]
    return Config(
        text=_text(text, data, ignore, more=set(), sections=(24, 20, 20), where="text_config."),
        vision=_vision(vision, ignore),
        image_token_id=data.get("image_token_id"),
        video_token_id=data.get("video_token_id"),
        end_tokens=_end_tokens(data) or _end_tokens(text),
        dtype=_dtype(data) or _dtype(text),
    )


FAMILIES = {"qwen3": _qwen3, "qwen3_vl": _qwen3_vl}


def _text(
    data: Json,
    top: Json,
    ignore: frozenset[str],
    *,
    more: set[str],
    sections: tuple[int, int, int] | None,
    where: str = "",
) -> TextConfig:
    """The decoder; `sections` is the M-RoPE layout where the file names none, None for plain rotary embedding."""
    names = {f.name for f in attrs.fields(TextConfig)} - {"mrope_section", "rope_theta", "tie_word_embeddings"}
    _refuse_unknown(data, names | _ROPE | set(_TEXT_FIXED) | more, ignore, where=where)
    _require_fixed(data, _TEXT_FIXED, ignore, where=where)
    _require(data, names - {"rms_norm_eps"}, where=where)
    rope = _rope(data, ignore, kinds=("default", "mrope") if sections else ("default",), where=where)
    if "rope_theta" not in rope:
        raise ConfigError(f"{where}rope_theta: missing")
    half = data["head_dim"] // 2 if isinstance(data["head_dim"], int) else 0
    tied = top.get("tie_word_embeddings", data.get("tie_word_embeddings", False))
    return _build(TextConfig, data, names, where=where, rope_theta=rope["rope_theta"],
                  mrope_section=rope.get("mrope_section", sections) if sections else (half, 0, 0),
                  tie_word_embeddings=tied)  # fmt: skip


def _vision(data: Json, ignore: frozenset[str]) -> VisionConfig:
    where = "vision_config."
    names = {f.name for f in attrs.fields(VisionConfig)} - {"rope_theta"}
    _refuse_unknown(data, names | {"rope_parameters"} | set(_VISION_FIXED), ignore, where=where)
    _require_fixed(data, _VISION_FIXED, ignore, where=where)
    _require(data, names - {"in_channels"}, where=where)
    rope = _rope(data, ignore, kinds=("axial", "default"), where=where)
    return _build(VisionConfig, data, names, where=where, rope_theta=rope.get("rope_theta", 10_000.0))


def _rope(data: Json, ignore: frozenset[str], *, kinds: tuple[str, ...], where: str) -> dict[str, Any]:
    """Rotary settings in either spelling: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    places = {key: data.get(key) for key in ("rope_scaling", "rope_parameters")}
    places["rope_theta"] = {"rope_theta": data.get("rope_theta")}
    rope: dict[str, Any] = {}
    for place, settings in places.items():
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f"{where}{place}: expected an object, got {reprlib.repr(settings)}")
        for key, value in (settings or {}).items():
            if value is not None and key in rope and rope[key] != value:
                here, there = reprlib.repr(value), reprlib.repr(rope[key])
                raise ConfigError(f"{where}{place}: {key} is {here} here, {there} in another spelling")
            if value is not None:
                rope[key] = value
    for kind in (rope.pop("rope_type", kinds[0]), rope.pop("type", kinds[0])):
        if kind not in kinds and "rope_type" not in ignore:
            raise ConfigError(f"{where}rope_type: only {kinds[0]!r} is supported, got {reprlib.repr(kind)}")
    _require_fixed(rope, {"partial_rotary_factor": 1.0, "mrope_interleaved": True}, ignore, where=where)
    known = {"rope_theta", "partial_rotary_factor"}
    if "mrope" in kinds:
        known |= {"mrope_section", "mrope_interleaved"}
    _refuse_unknown(rope, known, ignore, where=f"{where}rope_parameters.")
    return rope


def _build(cls: type, data: Json, names: Collection[str], *, where: str, **more: Any) -> Any:
    try:
        return cls(**{name: data[name] for name in names if data.get(name) is not None}, **more)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _refuse_unknown(data: Json, known: set[str], ignore: frozenset[str], *, where: str) -> None:
    if unknown := sorted(data.keys() - known - _HARMLESS - ignore):
        keys = ", ".join(where + key for key in unknown)
        raise ConfigError(
            f"unknown keys: {keys}. They may change what the model computes; if you know that they do not, "
            f"pass ignore_config={tuple(unknown)}"
        )


def _require(data: Json, names: set[str], *, where: str) -> None:
    if missing := sorted(name for name in names if data.get(name) is None):
        raise ConfigError(f"missing keys: {', '.join(where + key for key in missing)}")


def _require_fixed(data: Json, fixed: Json, ignore: frozenset[str], *, where: str) -> None:
    for key, value in fixed.items():
        if data.get(key, value) not in (value, None) and key not in ignore:
            raise ConfigError(f"{where}{key}: only {value!r} is supported, got {reprlib.repr(data[key])}")


def _end_tokens(data: Json) -> tuple[int, ...]:
    end = data.get("eos_token_id")
    if end is None:
        return ()
    return tuple(end) if isinstance(end, list) else (end,)


def _dtype(data: Json) -> str | None:
    name = data.get("dtype", data.get("torch_dtype"))
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype: expected float32, bfloat16 or float16, got {reprlib.repr(name)}")
    return name
