"""Exact-match accuracy through transformers: `python -m mllm.signs.evaluate --each 60`.

Greedy answers of transformers' own model, tokenizer, chat template and Pillow image processor, in float32, to held-out
examples, one at a time. `--ablate` breaks one thing on purpose, to see that the accuracy depends on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mllm.signs import FOLDER
from mllm.signs.pictures import KINDS, Example, held_out, messages

ABLATIONS = ("deepstack", "mrope", "swap")


class Reference:
    """The model as transformers runs it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def inputs(self, item: Example) -> dict[str, torch.Tensor]:
        """What the model's forward pass takes for the question."""
        text = self.tokenizer.apply_chat_template(messages(item), tokenize=False, add_generation_prompt=True)
        inputs: dict[str, torch.Tensor] = {}
        pad = "<|image_pad|>"
        if item.images:
            pixels = self.processor(list(item.images), return_tensors="pt")
            grids = pixels["image_grid_thw"]
            parts = text.split(pad)
            counts = (grids.prod(1) // self.processor.merge_size**2).tolist()
            text = parts[0] + "".join(pad * n + part for n, part in zip(counts, parts[1:], strict=True))
            inputs |= {"pixel_values": pixels["pixel_values"].to(self.model.dtype), "image_grid_thw": grids}
        ids = torch.tensor([self.tokenizer.encode(text)])
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if item.images:
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        return {key: value.to(self.model.device) for key, value in inputs.items()}

    @torch.no_grad()
    def answer(self, item: Example, limit: int = 96) -> str:
        inputs = self.inputs(item)
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=limit)
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def break_deepstack(reference: Reference) -> None:
    """The decoder no longer gets the features of the encoder's taps."""
    reference.model.model.language_model._deepstack_process = lambda hidden, *_: hidden


def break_mrope(reference: Reference) -> None:
    """Every token's three positions are its place in the sequence."""

    def flat(input_ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, len(input_ids), -1)
        return places, torch.zeros(len(input_ids), 1, dtype=torch.long, device=input_ids.device)

    reference.model.model.get_rope_index = flat


def accuracy(reference: Reference, kind: str, each: int, *, swap: bool = False, show: bool = False) -> float:
    """Percent of the first `each` held-out examples that are answered exactly right."""
    right = 0
    for index in range(each):
        item = held_out(kind, index)
        answer = reference.answer(evolve(item, images=item.images[::-1]) if swap else item)
        right += answer == item.answer
        if show and answer != item.answer:
            print(f"  {kind} {index}: {item.question} {item.answer!r}, not {answer!r}")
    return 100 * right / each


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm.signs.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="a model folder (the shipped one)")
    parser.add_argument("--each", type=int, default=60, help="held-out examples of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ablate", choices=ABLATIONS, help="leave out the deepstack taps, flatten M-RoPE, swap images")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    args = parser.parse_args()
    reference = Reference(args.model, getattr(torch, args.dtype), args.device)
    if args.ablate in ("deepstack", "mrope"):
        {"deepstack": break_deepstack, "mrope": break_mrope}[args.ablate](reference)
    for kind in args.kinds:
        right = accuracy(reference, kind, args.each, swap=args.ablate == "swap", show=args.show)
        print(f"{kind:8} {right:5.1f} %", flush=True)


if __name__ == "__main__":
    main()
