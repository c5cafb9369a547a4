"""Model configuration: what the stages need to know of a model. `families` reads it from a `config.json`."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from attrs import Converter, field, frozen
from attrs.validators import optional

from mllm.errors import ConfigError


def _int(low: int = 1, high: int = 2**24, **kwargs: Any) -> Any:
    """An attrs field for a whole number from `low` to `high`."""
    return field(validator=_range(int, low, high), **kwargs)


def _float(low: float, high: float, **kwargs: Any) -> Any:
    """An attrs field for a number from `low` to `high`."""
    return field(validator=_range((int, float), low, high), **kwargs)


def _range(kind: Any, low: float, high: float) -> Any:
    def validate(instance: object, attribute: Any, value: Any) -> None:
        # bool is an int to isinstance, and NaN fails every comparison
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{attribute.name}: expected {name} from {low:g} to {high:g}, got {reprlib.repr(value)}")

    return validate


def _optional_token() -> Any:
    """An attrs field for a token id, or None."""
    return field(default=None, validator=optional(_range(int, 0, 2**31 - 1)))


def _bool(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name}: expected true or false, got {reprlib.repr(value)}")


def _ints(**kwargs: Any) -> Any:
    """An attrs field for a tuple of whole numbers, made from any sequence of them."""

    def convert(value: Any, attribute: Any) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not all(type(x) is int for x in value):
            raise ConfigError(f"{attribute.name}: expected a list of whole numbers, got {reprlib.repr(value)}")
        return tuple(value)

    return field(converter=Converter(convert, takes_field=True), **kwargs)


@frozen(kw_only=True)
class TextConfig:
    """The decoder: a dense Qwen3. Field names are those of `config.json`.

    `mrope_section` are the three (temporal, height, width) counts of interleaved M-RoPE frequencies; for a
    model of text alone they are (head_dim / 2, 0, 0), which is ordinary rotary embedding.
    """

    hidden_size: int = _int()
    intermediate_size: int = _int()
    num_hidden_layers: int = _int(high=1024)
    num_attention_heads: int = _int(high=1024)
    num_key_value_heads: int = _int(high=1024)
    head_dim: int = _int(high=1024)
    vocab_size: int = _int()
    max_position_embeddings: int = _int(high=2**31 - 1)
    rope_theta: float = _float(1.0, 1e12)
    rms_norm_eps: float = _float(0.0, 1.0, default=1e-6)
    mrope_section: tuple[int, ...] = _ints()
    tie_word_embeddings: bool = field(default=False, validator=_bool)

    def __attrs_post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} query heads over {self.num_key_value_heads} key/value heads"
            raise ConfigError(f"num_attention_heads: {heads} do not divide evenly")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: rotary embedding needs an even size, got {self.head_dim}")
        if len(self.mrope_section) != 3 or not all(0 <= count <= self.head_dim for count in self.mrope_section):
            got = reprlib.repr(self.mrope_section)
            raise ConfigError(f"mrope_section: expected three counts from 0 to {self.head_dim}, got {got}")

    @property
    def sizes(self) -> dict[str, int]:
        """The size letters of `mllm.state.LEGEND` that this model fixes."""
        heads, kv_heads, head = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        return {
            "L": self.num_hidden_layers, "H": heads, "K": kv_heads, "D": head, "E": self.hidden_size,
            "F": self.intermediate_size, "V": self.vocab_size, "A": heads * head, "C": (heads + 2 * kv_heads) * head,
            "G": 2 * self.intermediate_size,
        }  # fmt: skip


@frozen(kw_only=True)
class VisionConfig:
    """The vision encoder of Qwen3-VL. Field names are those of `config.json`."""

    depth: int = _int(high=1024)
    hidden_size: int = _int()
    intermediate_size: int = _int()
    num_heads: int = _int(high=1024)
    out_hidden_size: int = _int()
    num_position_embeddings: int = _int()
    deepstack_visual_indexes: tuple[int, ...] = _ints()
    patch_size: int = _int(high=256)
    spatial_merge_size: int = _int(high=16)
    temporal_patch_size: int = _int(high=16)
    in_channels: int = _int(3, 3, default=3)
    rope_theta: float = _float(1.0, 1e12, default=10_000.0)

    def __attrs_post_init__(self) -> None:
        taps = self.deepstack_visual_indexes
        if any(not 0 <= tap < self.depth for tap in taps) or len(set(taps)) < len(taps):
            raise ConfigError(
                f"deepstack_visual_indexes: expected different layers from 0 to {self.depth - 1}, got {reprlib.repr(taps)}"
            )
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"hidden_size: 2-D rotary embedding needs heads of a multiple of 4, got {self.hidden_size} in "
                f"{self.num_heads} heads"
            )
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ConfigError(f"num_position_embeddings: expected a square, got {self.num_position_embeddings}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def sizes(self) -> dict[str, int]:
        """The size letters of `mllm.state.LEGEND` that this encoder fixes."""
        return {
            "Ev": self.hidden_size, "Fv": self.intermediate_size, "Cv": 3 * self.hidden_size,
            "Mv": self.spatial_merge_size**2 * self.hidden_size, "W": self.num_position_embeddings,
            "J": len(self.deepstack_visual_indexes), "U": self.in_channels * self.patch_size**2, "Lv": self.depth,
        }  # fmt: skip


@frozen(kw_only=True)
class Config:
    """A whole model. `vision` is None for a model of text alone; `end_tokens` end a completion.

    `dtype` is the one the checkpoint was made for ("bfloat16"), or None where its config.json does not say.
    """

    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = _optional_token()
    video_token_id: int | None = _optional_token()
    end_tokens: tuple[int, ...] = _ints(default=())
    dtype: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.vision is None:
            return
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"out_hidden_size: the encoder gives {self.vision.out_hidden_size} features, the decoder takes "
                f"{self.text.hidden_size}"
            )
        if self.image_token_id is None or self.image_token_id >= self.text.vocab_size:
            raise ConfigError(
                f"image_token_id: expected a token below {self.text.vocab_size}, got {self.image_token_id}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        return self.text.sizes | (self.vision.sizes if self.vision else {})
