"""Tiny models, written by transformers and read by `mllm`, and what transformers computes with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from hypothesis import settings
from PIL import Image
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import mllm

try:  # transformers 5.4 and later
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
except ImportError:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor

VOCAB = 96
IMAGE, VIDEO, START, END = VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 4
WORDS = VOCAB - 4  # ids below it are ordinary tokens

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2], "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MROPE = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}


@frozen(eq=False, kw_only=True)
class Tiny:
    """One checkpoint, and both readers of it. `processor` is None for a model of text alone."""

    folder: Path
    theirs: Any
    ours: mllm.Model
    processor: Any


def make_tiny(
    folder: Path,
    *,
    vision: Mapping[str, Any] | bool | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    max_tokens: int = 64,
    **text: Any,
) -> Tiny:
    """Have transformers write a checkpoint and `mllm` read it. `text` and `vision` change `TEXT` and `VISION`."""
    theirs = random_model(text, vision, seed=seed).to(dtype)
    theirs.save_pretrained(folder, max_shard_size=shard)
    processor = None
    if vision:
        side = theirs.config.vision_config.patch_size * theirs.config.vision_config.spatial_merge_size
        processor = Processor(
            size={"shortest_edge": side**2, "longest_edge": max_tokens * side**2},
            patch_size=theirs.config.vision_config.patch_size,
            merge_size=theirs.config.vision_config.spatial_merge_size,
            temporal_patch_size=theirs.config.vision_config.temporal_patch_size,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.5, 0.6, 0.7],
        )
        processor.save_pretrained(folder)
    return Tiny(folder=folder, theirs=theirs, ours=mllm.load(folder, progress=False), processor=processor)


def config_of(text: Mapping[str, Any], vision: Mapping[str, Any] | bool | None) -> Any:
    """transformers' configuration of a tiny model."""
    if not vision:
        return Qwen3Config(**{**TEXT, "rope_parameters": ROPE, **text}, attn_implementation="eager")
    inner = {**TEXT, "rope_parameters": MROPE, **text}
    tower = {**VISION, "out_hidden_size": inner["hidden_size"], **(vision if isinstance(vision, Mapping) else {})}
    return Qwen3VLConfig(
        text_config=inner, vision_config=tower, tie_word_embeddings=inner["tie_word_embeddings"],
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        attn_implementation="eager",
    )  # fmt: skip


def random_model(text: Mapping[str, Any], vision: Mapping[str, Any] | bool | None, *, seed: int) -> Any:
    """A random model of transformers whose next tokens are clear cut.

    Its own initialisation (deviation 0.02) makes the logits of a tiny model nearly equal, and every argmax a tie.
    Here a matrix keeps the size of what it multiplies, so attention, gates and deepstack all have a say, and logits
    spread over several units: an error that could turn an argmax over is one that a tolerance shows.
    """
    config = config_of(text, vision)
    model = (Qwen3VLForConditionalGeneration if vision else Qwen3ForCausalLM)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.2 * noise)
            elif "embed_tokens" in name or "pos_embed" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * (1.5 / p[0].numel() ** 0.5))
        if not config.tie_word_embeddings:
            model.lm_head.weight.mul_(2)
        if vision:  # logits 0, so that no model answers with a placeholder, which no prompt could then repeat
            model.get_input_embeddings().weight[[IMAGE, VIDEO]] = 0
            model.get_output_embeddings().weight[[IMAGE, VIDEO]] = 0
    # transformers' generate stops at these; the tests say themselves how long to go on
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def their_logits(model: Tiny, tokens: Sequence[int], images: Sequence[Image.Image] = ()) -> Tensor:
    """transformers' logits [n V] at every position; `tokens` hold every image token."""
    with torch.no_grad():
        return model.theirs(**their_inputs(model, tokens, images)).logits[0]


def their_inputs(model: Tiny, tokens: Sequence[int], images: Sequence[Image.Image] = ()) -> dict[str, Tensor]:
    """What transformers' processor makes of a prompt, by way of its PIL image processor."""
    ids = torch.tensor([list(tokens)])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        out = model.processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        given |= {"pixel_values": out["pixel_values"].to(model.theirs.dtype), "image_grid_thw": out["image_grid_thw"]}
        if "mm_token_type_ids" in inspect.signature(model.theirs.forward).parameters:
            given["mm_token_type_ids"] = (ids == IMAGE).int()
    return given


def examples(count: int, **more: Any) -> settings:
    """`hypothesis.settings` for `count` drawn examples; ten times as many with --thorough."""
    profile = settings.default or settings()
    return settings(max_examples=count * profile.max_examples // 100, **more)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise over a slope: every patch differs, and so does every place."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, height)[:, None, None] * np.linspace(0.2, 1, width)[:, None]
    return Image.fromarray((noise + slope).astype(np.uint8))


class Broken(Image.Image):
    """A picture of 16 x 8 whose header is fine and whose pixels are not, as of a file that is cut short."""

    def __init__(self, reason: str = "image file is truncated") -> None:
        super().__init__()
        self._mode, self._size, self.reason = "RGB", (16, 8), reason

    def load(self) -> Any:
        raise OSError(self.reason)


def words(count: int, seed: int = 0) -> list[int]:
    """Ordinary tokens."""
    return np.random.default_rng(seed).integers(0, WORDS, count).tolist()


def expanded(model: Tiny, prompt: mllm.Prompt) -> list[int]:
    """The tokens of a prompt with every image token in its place, counted by transformers."""
    if not prompt.images:
        return list(prompt.tokens)
    grids = model.processor(images=list(prompt.images), input_data_format="channels_last")["image_grid_thw"]
    counts = iter(np.asarray(grids).prod(-1) // model.processor.merge_size**2)
    return [t for token in prompt.tokens for t in ([IMAGE] * int(next(counts)) if token == IMAGE else [token])]


def four_prompts(model: Tiny, seed: int = 0) -> list[mllm.Prompt]:
    """Text, one image, three images of different sizes between text, and text again; text only for a text model."""
    text = [mllm.Prompt(words(11, seed)), mllm.Prompt(words(3, seed + 1))]
    if model.processor is None:
        return [*text, mllm.Prompt(words(1, seed + 2)), mllm.Prompt(words(17, seed + 3))]
    side = model.theirs.config.vision_config.patch_size * model.theirs.config.vision_config.spatial_merge_size
    sizes = ((3, 2), (1, 1), (2, 5))
    pictures = [picture(w * side, h * side + 1, seed + i) for i, (w, h) in enumerate(sizes)]
    a, b, c, d = (words(n, seed + 7 + n) for n in (4, 1, 6, 3))
    one = mllm.Prompt([*a, IMAGE, *b], pictures[:1])
    three = mllm.Prompt([*b, IMAGE, *c, IMAGE, END, START, IMAGE, *d], [pictures[2], pictures[1], pictures[0]])
    return [text[0], one, three, text[1]]


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Every row of `got` within `tolerance` of `want`, relative to the row's largest number."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} for {tuple(want.shape)}"
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = (got - want).abs().amax(-1) / want.abs().amax(-1).clamp(min=1e-30)
    assert bool((error <= tolerance).all()), (  # a NaN fails, too
        f"{what}: relative error {error.max():.3g} at row {error.argmax()}, allowed {tolerance:g}"
    )
