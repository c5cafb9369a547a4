"""config.json is read closed-world: what is known is computed exactly, and anything else is refused by name."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from tiny import examples

import mllm
from mllm import families
from mllm.errors import ConfigError

# What transformers 5.3.0, 5.8.1, 5.12.1, 5.17.0 and 5.23.0 all write for a Qwen3, but for `transformers_version`.
QWEN3 = """{
"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": null,
"dtype": "bfloat16", "eos_token_id": 5, "head_dim": 8, "hidden_act": "silu", "hidden_size": 32,
"initializer_range": 0.02, "intermediate_size": 48, "layer_types": ["full_attention", "full_attention"],
"max_position_embeddings": 512, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 4,
"num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": null, "rms_norm_eps": 1e-06,
"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "sliding_window": null,
"tie_word_embeddings": true, "transformers_version": "5.23.0", "use_cache": true, "use_sliding_window": false,
"vocab_size": 96}"""

# What transformers 5.17.0 and 5.23.0 write for a Qwen3-VL.
QWEN3_VL = """{
"architectures": ["Qwen3VLForConditionalGeneration"], "dtype": "bfloat16", "image_token_id": 90,
"model_type": "qwen3_vl", "text_config": {"attention_bias": false, "attention_dropout": 0.0, "eos_token_id": 5,
"head_dim": 8, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
"max_position_embeddings": 512, "model_type": "qwen3_vl_text", "num_attention_heads": 4, "num_hidden_layers": 2,
"num_key_value_heads": 2, "pad_token_id": null, "rms_norm_eps": 1e-06, "rope_parameters":
{"mrope_interleaved": true, "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "rope_type": "default"},
"tie_word_embeddings": true, "use_cache": true, "vocab_size": 96}, "tie_word_embeddings": true,
"transformers_version": "5.23.0", "video_token_id": 91, "vision_config": {"deepstack_visual_indexes": [0, 2],
"depth": 3, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 24, "in_channels": 3, "initializer_range": 0.02,
"intermediate_size": 40, "model_type": "qwen3_vl_vision", "num_heads": 2, "num_position_embeddings": 25,
"out_hidden_size": 32, "patch_size": 4, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
"spatial_merge_size": 2, "temporal_patch_size": 2}, "vision_end_token_id": 93, "vision_start_token_id": 92}"""
# The vision part of 5.8.1 and 5.12.1 has no rope_parameters, and that of 5.3.0 another model_type, too.
NO_ROPE = QWEN3_VL.replace('"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},', "")
OLD_TYPE = NO_ROPE.replace('"qwen3_vl_vision"', '"qwen3_vl"')

Json = dict[str, Any]


def qwen3(**changes: Any) -> Json:
    data: Json = json.loads(QWEN3)
    return data | changes


def qwen3_vl(*, text: Json | None = None, vision: Json | None = None, **changes: Any) -> Json:
    data: Json = json.loads(QWEN3_VL) | changes
    if text:
        data["text_config"] |= text
    if vision:
        data["vision_config"] |= vision
    return data


def refusal(data: Any, *, ignore: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        families.parse(data, ignore=ignore)
    return str(caught.value)


def test_what_every_transformers_writes_is_read_alike() -> None:
    assert families.parse(qwen3()) == mllm.Config(
        text=mllm.TextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=96, max_position_embeddings=512, rope_theta=10_000.0, rms_norm_eps=1e-6,
            mrope_section=(4, 0, 0), tie_word_embeddings=True,
        ),
        end_tokens=(5,), dtype="bfloat16",
    )  # fmt: skip
    text = evolve(families.parse(qwen3()).text, mrope_section=(2, 1, 1))
    want = mllm.Config(
        text=text,
        vision=mllm.VisionConfig(
            depth=3, hidden_size=24, intermediate_size=40, num_heads=2, out_hidden_size=32,
            num_position_embeddings=25, deepstack_visual_indexes=(0, 2), patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        image_token_id=90, video_token_id=91, end_tokens=(5,), dtype="bfloat16",
    )  # fmt: skip
    assert (NO_ROPE != QWEN3_VL, OLD_TYPE != NO_ROPE) == (True, True)
    for written in (QWEN3_VL, NO_ROPE, OLD_TYPE):
        assert families.parse(json.loads(written)) == want


def test_both_spellings_of_the_rope_settings_are_read_alike() -> None:
    old = qwen3(rope_theta=10000, rope_scaling=None)
    del old["rope_parameters"]
    assert families.parse(old) == families.parse(qwen3())
    sections = {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    for kind in ({"rope_type": "default"}, {"type": "mrope"}, {"type": "mrope", "rope_type": "default"}, {}):
        old = qwen3_vl(text={"rope_theta": 10000, "rope_scaling": {**sections, **kind}})
        del old["text_config"]["rope_parameters"]
        assert families.parse(old) == families.parse(qwen3_vl()), kind


def test_two_spellings_that_contradict_each_other_are_refused() -> None:
    assert "rope_theta is 20000 here, 10000.0 in another" in refusal(qwen3(rope_theta=20000))
    assert families.parse(qwen3(rope_theta=10000)) == families.parse(qwen3())
    scaling = {"mrope_section": [1, 2, 1]}
    assert "text_config.rope_parameters: mrope_section" in refusal(qwen3_vl(text={"rope_scaling": scaling}))


def test_the_older_name_of_dtype_is_read() -> None:
    data = qwen3(torch_dtype="float16")
    del data["dtype"]
    assert families.parse(data).dtype == "float16"
    del data["torch_dtype"]
    assert families.parse(data).dtype is None


def test_the_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(QWEN3)
    assert families.read(tmp_path).end_tokens == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    assert families.read(tmp_path).end_tokens == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"transformers_version": "5.23.0"}')
    assert families.read(tmp_path).end_tokens == (5,)


@pytest.mark.parametrize("name", families.PRESETS)
def test_presets_are_the_public_models(name: str) -> None:
    config = families.preset(name)
    assert config.text.head_dim == 128
    assert config.text.vocab_size == 151936
    assert config.dtype == "bfloat16"
    assert (config.vision is not None) == ("vl" in name)
    if config.vision:
        assert (config.image_token_id, config.text.mrope_section) == (151655, (24, 20, 20))
        assert config.vision.out_hidden_size == config.text.hidden_size
    # the parameters in a model's name, in billions; 0.6b has 0.596, 8b has 8.19, and -vl- counts no encoder of 0.4
    size = float(name.rpartition("-")[2].removesuffix("b"))
    text = config.text
    layer = text.hidden_size * (text.sizes["C"] + text.sizes["A"] + 3 * text.intermediate_size)
    embed = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    assert 0.85 < (text.num_hidden_layers * layer + embed) / 1e9 / size < 1.05


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"qwen3-vl-8b"):
        families.preset("qwen4")
    with pytest.raises(ConfigError):
        families.preset("../qwen3-0.6b")


def test_an_unknown_key_is_refused_by_name_with_the_way_on() -> None:
    text = refusal(qwen3(attention_sinks=4, zoom=1))
    assert "attention_sinks, zoom" in text
    assert "ignore_config=('attention_sinks', 'zoom')" in text
    assert families.parse(qwen3(attention_sinks=4), ignore=("attention_sinks",)) == families.parse(qwen3())
    assert "zoom" in refusal(qwen3(attention_sinks=4, zoom=1), ignore=("attention_sinks",))
    assert "text_config.zoom" in refusal(qwen3_vl(text={"zoom": 1}))
    assert "vision_config.zoom" in refusal(qwen3_vl(vision={"zoom": 1}))
    assert "text_config.rope_parameters.factor" in refusal(
        qwen3_vl(text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}})
    )
    assert "quantization_config" in refusal(qwen3(quantization_config={"quant_method": "fp8"}))
    assert "mrope_section" in refusal(qwen3(rope_parameters={"rope_theta": 1e4, "mrope_section": [2, 1, 1]}))


def test_keys_to_ignore_are_a_collection_and_not_one_name() -> None:
    with pytest.raises(TypeError, match=r"\('zoom',\)"):
        families.parse(qwen3(zoom=1), ignore="zoom")


def test_load_passes_the_ignored_keys_on(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"zoom": 1}))
    with pytest.raises(ConfigError, match="zoom"):
        mllm.load(folder)
    assert mllm.load(folder, ignore_config=("zoom",)).config.vision is not None


# change -> a word that the refusal names
FIXED: list[tuple[Json, str]] = [
    (qwen3(attention_bias=True), "attention_bias"),
    (qwen3(hidden_act="gelu"), "hidden_act"),
    (qwen3(use_sliding_window=True), "use_sliding_window"),
    (qwen3(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (qwen3(layer_types=["full_attention"]), "layer_types"),
    (qwen3(layer_types=3), "layer_types"),
    (qwen3(layer_types=[{}, []]), "layer_types"),
    (qwen3(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type"),
    (qwen3(rope_parameters={"type": "linear", "rope_theta": 1e4}), "rope_type"),
    (qwen3(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (qwen3(rope_parameters={"rope_type": "default"}), "rope_theta"),
    (qwen3(rope_parameters=[1]), "rope_parameters"),
    (qwen3(dtype="float64"), "dtype"),
    (qwen3(dtype=["bfloat16"]), "dtype"),
    (qwen3_vl(vision={"hidden_act": "gelu"}), "vision_config.hidden_act"),
    (qwen3_vl(vision={"model_type": "siglip"}), "vision_config.model_type"),
    (qwen3_vl(text={"model_type": ["qwen3_vl_text"]}), "text_config.model_type"),
    (qwen3_vl(text={"rope_parameters": {"rope_theta": 1e4, "mrope_interleaved": False}}), "mrope_interleaved"),
    (qwen3_vl(vision={"rope_parameters": {"rope_type": "mrope"}}), "vision_config.rope_type"),
]


@pytest.mark.parametrize(("data", "word"), FIXED)
def test_a_setting_that_would_compute_something_else_is_refused(data: Json, word: str) -> None:
    assert word in refusal(data)


# what makes no sense -> a word that the refusal names
NONSENSE: list[tuple[Json, str]] = [
    *((qwen3(**{key: value}), key) for value in (0, -1, 10**9 + 7, 10**400, 2.5, "32", True, float("nan"), [8], {"a": 1})
      for key in ("num_attention_heads", "num_hidden_layers", "head_dim", "hidden_size", "vocab_size")),
    *((qwen3(**{key: None}), key) for key in ("num_attention_heads", "num_hidden_layers", "head_dim", "vocab_size")),
    *((qwen3(rms_norm_eps=value), "rms_norm_eps") for value in (-1e-6, float("nan"), float("inf"), "1e-6", 2)),
    *((qwen3(rope_parameters={"rope_theta": v}), "rope_theta") for v in (0, -1.0, float("nan"), float("inf"), "x")),
    (qwen3(head_dim=7), "head_dim"),
    (qwen3(num_attention_heads=5), "num_attention_heads"),
    (qwen3(num_key_value_heads=8), "num_attention_heads"),
    (qwen3(tie_word_embeddings="false"), "tie_word_embeddings"),
    (qwen3(tie_word_embeddings=0), "tie_word_embeddings"),
    (qwen3(max_position_embeddings=2**31), "max_position_embeddings"),
    *((qwen3(eos_token_id=value), "end_tokens") for value in ("5", 5.0, ["5"], [True], {"a": 1})),
    *((qwen3_vl(vision={"patch_size": value}), "vision_config.patch_size") for value in (0, -1, 10**9, [4, 4], "4")),
    *((qwen3_vl(vision={"depth": value}), "vision_config.depth") for value in (0, 10**9, None)),
    *((qwen3_vl(vision={"deepstack_visual_indexes": value}), "deepstack_visual_indexes")
      for value in ([3], [-1], [0, 0], ["0"], [True], 1, "01", [10**30], [9] * 10**5)),
    (qwen3_vl(vision={"num_heads": 5}), "hidden_size"),
    (qwen3_vl(vision={"num_heads": 0}), "num_heads"),
    (qwen3_vl(vision={"num_position_embeddings": 24}), "num_position_embeddings"),
    (qwen3_vl(vision={"out_hidden_size": 33}), "out_hidden_size"),
    (qwen3_vl(vision={"in_channels": 1}), "in_channels"),
    (qwen3_vl(text_config=None, vision_config={}), "text_config"),
    *((qwen3_vl(image_token_id=value), "image_token_id") for value in (None, -1, 96, "90", 90.0, True, [90])),
    *((qwen3_vl(video_token_id=value), "video_token_id") for value in (-1, "91", [91], 10**40)),
    *((qwen3_vl(text={"rope_parameters": {"rope_theta": 1e4, "mrope_section": value}}), "mrope_section")
      for value in ([2, 1], [2, 1, 1, 1], [-1, 1, 1], ["2", 1, 1], [10**30, 1, 1], 4, "211", {"t": 2})),
    *((qwen3(model_type=value), "model_type") for value in (None, "llama", "qwen3_vl_moe", "", 3, ["qwen3"], {"a": 1})),
]  # fmt: skip


def test_what_makes_no_sense_is_refused_by_name_and_at_once() -> None:
    began = time.perf_counter()
    for data, word in NONSENSE:
        text = refusal(data)
        assert word in text, text
        assert len(text) < 600, text[:80]
        assert "0x" not in text
    assert time.perf_counter() - began < 1
    assert len(NONSENSE) > 100


def nest(depth: int, kind: str) -> str:
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth


BROKEN: dict[str, bytes] = {
    "empty": b"", "a list": b"[1]", "a number": b"3", "null": b"null", "text": b'"qwen3"', "cut off": b'{"model_type": ',
    "not UTF-8": b'{"model_type": "\xff"}', "an endless number": b'{"model_type": ' + b"9" * 10_000 + b"}",
    "NaN alone": b"NaN", "a null byte": b"\x00", "UTF-16": QWEN3.encode("utf-16")[:-1], "no keys": b"{}",
    "a million letters": json.dumps({"model_type": "q" * 10**6}).encode(),
    **{f"{kind} of depth {depth}": nest(depth, kind).encode() for kind in ("list", "object")
       for depth in (500, 900, 990, 100_000)},
    **{f"rope settings of depth {depth}": QWEN3.replace('{"rope_theta": 10000.0, "rope_type": "default"}',
                                                        nest(depth, "list")).encode() for depth in (10, 900, 980)},
    **{f"a head size of depth {depth}": QWEN3.replace('"head_dim": 8', '"head_dim": ' + nest(depth, "object")).encode()
       for depth in (10, 900, 980)},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_file_is_a_config_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_bytes(BROKEN[name])
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        mllm.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert time.perf_counter() - began < 1


def test_a_folder_without_a_config_or_with_a_pipe_for_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        mllm.load(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="no such file"):
        mllm.load(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@examples(300)
@given(data=st.data(), value=json_values, make=st.sampled_from([qwen3, qwen3_vl]))
def test_any_value_of_any_key_is_read_or_is_a_config_error(
    data: st.DataObject, value: Any, make: Callable[[], Json]
) -> None:
    whole = make()
    part = whole
    while True:
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = value
    before = copy.deepcopy(whole)
    with contextlib.suppress(ConfigError):
        assert isinstance(families.parse(whole), mllm.Config)
    assert repr(whole) == repr(before)  # NaN is not equal to itself
