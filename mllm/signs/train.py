"""Train the embedded model: `python -m mllm.signs.train --out FOLDER`.

The model is transformers' Qwen3-VL at a small size. It learns from drawn pictures (`mllm.signs.pictures`) and the
answers to questions about them, in bf16 autocast over float32 weights. Batches are numbered and seeded, so the same
command sees the same batches in the same order, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mllm.signs import packed, tokens
from mllm.signs.data import IMAGES, Batch, HeldOut, Stream
from mllm.signs.pictures import KINDS

VOCABULARY = 704  # 700 tokens, rounded up to a multiple of 64
SCORING = 60  # seconds of `--minutes` that are kept for saving and scoring, or a quarter of them if that is less
AHEAD = 16  # batches that are drawn before they are wanted
ABLATIONS = {"whole": {}, "no deepstack": {"taps": False}, "1-D positions": {"flat": True}}


def config() -> Qwen3VLConfig:
    """The shipped architecture: 7.7 million parameters."""
    ids = {token: tokens.build().token_to_id(token) for token in tokens.SPECIAL}
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 5,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 7, "hidden_size": 160, "intermediate_size": 640, "num_heads": 5, "patch_size": IMAGES.patch,
        "spatial_merge_size": IMAGES.merge, "temporal_patch_size": 2, "out_hidden_size": 256,
        "num_position_embeddings": 256, "deepstack_visual_indexes": [1, 3, 5],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def fresh_model(seed: int) -> Qwen3VLForConditionalGeneration:
    """New weights, scaled by fan-in; what writes to the residual stream starts smaller by the depth."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config())
    depths = {"visual.blocks": 7, "language_model.layers": 5}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)) and name != "lm_head":
            scale = module.weight[0].numel() ** -0.5
            if name.endswith(("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")):
                scale *= next((2 * d) ** -0.5 for part, d in depths.items() if part in name)
            nn.init.normal_(module.weight, std=scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
    return model


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim > 1 and "embed" not in n)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=torch.cuda.is_available())


def rate_at(step: int, warmup: int, share: float) -> float:
    """The part of the peak learning rate: linear warm-up, and a cosine to zero over the `share` done of the run."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _stand_back(_: int) -> None:
    """Leave the processor to the process that feeds the GPU."""
    os.nice(10)


def batches(args: argparse.Namespace, done: int, device: str) -> Iterator[Batch]:
    """The batch of each step from `done` on.

    Drawing is slower than learning, so batches are used again later, picked at random out of the last few hundred: each
    `replay` times on average, or with a `replay` of 0 whenever no new batch is ready. Raises what drawing raises.
    """
    fresh, rounds = done // max(args.replay, 1), max(args.replay, 1)
    stream = Stream(args.seed, args.batch, fresh, math.ceil(args.steps / rounds) + 1)
    loader = DataLoader(stream, batch_size=None, num_workers=args.workers, pin_memory=device == "cuda",
                        prefetch_factor=8 if args.workers else None,
                        worker_init_fn=_stand_back)  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed + done)
    kept: list[Batch] = []
    drawn, drawing = iter(loader), ThreadPoolExecutor(1)
    ready = deque(drawing.submit(next, drawn) for _ in range(AHEAD))
    try:
        for step in range(args.steps - done):
            wanted = step % rounds == 0 if args.replay else not kept or ready[0].done()
            if not wanted:
                yield kept[int(torch.randint(len(kept), (), generator=generator))]
                continue
            ready.append(drawing.submit(next, drawn))
            found = ready.popleft().result()
            kept.append({k: v if k == "longest" else v.to(device, non_blocking=True) for k, v in found.items()})
            if len(kept) > args.keep:
                kept.pop(0)
            yield kept[-1]
    finally:
        drawing.shutdown(cancel_futures=True)


def loss_of(model: Qwen3VLForConditionalGeneration, batch: Batch, device: str, noise: float) -> torch.Tensor:
    """Cross-entropy; a token weighs less in a long answer, so that a count or a place is heard beside a description."""
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = packed.decode(model, batch, packed.encode(model, batch, noise))
    losses = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
    owner = batch["owner"]
    lengths = torch.zeros(len(batch["starts"]) - 1, device=owner.device).index_add(0, owner, torch.ones_like(losses))
    weights = lengths[owner].rsqrt()
    return (losses * weights).sum() / weights.sum()


def held_out_batches(each: int, workers: int, device: str, *, swap: bool = False) -> list[tuple[str, Batch]]:
    loader = DataLoader(HeldOut(each, swap=swap), batch_size=None, num_workers=workers)
    return [(kind, {k: v if k == "longest" else v.to(device) for k, v in batch.items()}) for kind, batch in loader]


def scores(model: Qwen3VLForConditionalGeneration, tests: list[tuple[str, Batch]], device: str, *, half: bool = True,
           **ablation: bool) -> dict[str, float]:  # fmt: skip
    """Percent of right answers of each kind; `half` computes in bf16."""
    right: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    with torch.autocast(device, torch.bfloat16, enabled=half):
        for kind, batch in tests:
            right[kind].append(packed.right_answers(model, batch, **ablation))
    return {kind: round(100 * torch.cat(r).float().mean().item(), 1) for kind, r in right.items() if r}


def save(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """An ordinary Hugging Face folder, weights in bf16. The model itself stays as it is.

    It replaces an older folder once it is complete, so that whoever looks finds a whole model.
    """
    whole, folder = folder, folder.with_name(f"{folder.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    half = Qwen3VLForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    end = model.config.text_config.eos_token_id
    pad = tokens.build().token_to_id("<|endoftext|>")
    half.generation_config = GenerationConfig(do_sample=False, eos_token_id=[end, pad], pad_token_id=pad)
    half.to(torch.bfloat16).save_pretrained(folder)
    tokens.save(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": IMAGES.patch, "temporal_patch_size": 2,
        "merge_size": IMAGES.merge, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": IMAGES.min_pixels, "longest_edge": IMAGES.max_pixels}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    shutil.rmtree(whole, ignore_errors=True)
    folder.replace(whole)


def train(args: argparse.Namespace, say: Callable[[str], None]) -> Qwen3VLForConditionalGeneration:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fresh_model(args.seed)
    if args.start:
        model.load_state_dict(
            Qwen3VLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32).state_dict()
        )
    model.to(device)
    if args.compile:
        packed.compile_parts()
    optimizer, done = optimizer_of(model, args.rate), 0
    state = args.out / "state.pt"
    if args.resume and state.exists():
        saved = torch.load(state, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    say(f"{sum(p.numel() for p in model.parameters())} parameters on {device}, from step {done} to {args.steps}")
    tests = held_out_batches(args.each, args.workers, device)
    if args.start and tests:
        say(f"step {done}: {scores(model, tests, device, half=device == 'cuda')}")
    limit = 60 * args.minutes
    end = args.since + limit - min(SCORING, limit / 4)
    total, since, start, began = torch.zeros((), device=device), 0, time.perf_counter(), time.time()
    for step, batch in enumerate(batches(args, done, device), done):
        share = (time.time() - began) / max(end - began, 1e-9) if args.minutes else step / args.steps
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate_at(step, args.warmup, share)
        # The noise on top of the drawn one differs each time that a batch is seen
        loss = _learn(model, optimizer, loss_of(model, batch, device, noise=0.06 * (step % 7) / 6))
        total, since = total + loss, since + 1
        if (step + 1) % args.report == 0:
            say(f"step {step + 1} loss {total.item() / since:.4f} {since / (time.perf_counter() - start):.2f} steps/s")
            total, since, start = torch.zeros((), device=device), 0, time.perf_counter()
        if (step + 1) % args.check == 0 and step + 1 < args.steps:
            say(f"step {step + 1}: {scores(model, tests, device, half=device == 'cuda')}")
            keep = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(keep, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
            save(model, args.out / "model")
            start = time.perf_counter()
    save(model, args.out / "model")
    say(f"saved {args.out / 'model'}")
    finish(args, tests, device, say)
    return model


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """One step of the optimizer; the loss, without its graph."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def finish(args: argparse.Namespace, tests: list[tuple[str, Batch]], device: str, say: Callable[[str], None]) -> None:
    """Scores of the saved folder, as it will be used, in float32 and bf16, and with each ablation.

    Each is printed and written as soon as it is known, those of the whole model first.
    """
    if not tests:
        return
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.out / "model", dtype=torch.float32).to(device)
    results: dict[str, Any] = {}

    def note(name: str, result: dict[str, float]) -> None:
        results[name] = result
        say(f"final, {name}: {result}")
        (args.out / "scores.json").write_text(json.dumps(results, indent=2) + "\n")

    for name, how in ABLATIONS.items():
        note(name, scores(model, tests, device, half=False, **how))
    swapped = held_out_batches(args.each, args.workers, device, swap=True)
    note("swapped pictures", scores(model, swapped, device, half=False))
    if device == "cuda":
        note("whole, bf16", scores(model.to(torch.bfloat16).float(), tests, device))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm.signs.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; the model goes to OUT/model")
    parser.add_argument("--start", type=Path, help="a model folder to go on from, rather than new weights")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--minutes", type=float, default=0, help="end after so long, scores included")
    parser.add_argument("--since", type=float, default=time.time(), help="when that began, in seconds since 1970")
    parser.add_argument("--compile", action="store_true", help="fuse operations with torch.compile")
    parser.add_argument("--batch", type=int, default=256, help="drawn pictures, or pairs of them, in a batch")
    parser.add_argument("--replay", type=int, default=2, help="how often each drawn batch is used; 0: as needed")
    parser.add_argument("--keep", type=int, default=400, help="drawn batches kept for that")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=600, help="steps")
    parser.add_argument("--seed", type=int, default=1, help="0 to 63")
    parser.add_argument("--workers", type=int, default=15, help="processes that draw pictures")
    parser.add_argument("--report", type=int, default=200, help="print the loss every so many steps")
    parser.add_argument("--check", type=int, default=2000, help="save and score every so many steps")
    parser.add_argument("--each", type=int, default=500, help="held-out examples of each kind; 0 for none")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt if it is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    train(args, lambda line: print(f"{time.perf_counter() - start:7.1f}s {line}", flush=True))


if __name__ == "__main__":
    main()
