"""Arguments of every op of `mllm.kernels.ops.Ops` at the shapes of a model, and what each has to read and compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from benchmarks import points
from benchmarks.figures import Work
from mllm import stages, state
from mllm.batch import ForwardBatch
from mllm.cache import PAGE_SIZE
from mllm.kernels.ops import Ops
from mllm.model import Model
from mllm.sampling import Sampling, sampling_batch

CONTEXT = 256  # tokens of each row's context, for attention
GRID = (16, 16)  # patches, for the encoder's ops


@frozen(kw_only=True)
class OpCase:
    """One call of an op. `args` are built for every round where the op writes into them (`writes`: which ones)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    work: Work
    writes: tuple[int, ...] = ()


def linear_work(x: Tensor, weight: Tensor) -> Work:
    """A projection: the weight once, and two flops for each of its elements and each row of x."""
    return Work(weight.nbytes, 2 * weight.numel() * len(x))


class Arguments:
    """Random inputs for the ops of one model at `rows` rows of decode."""

    def __init__(self, model: Model, rows: int) -> None:
        self.model, self.rows = model, rows
        self.text, self.sizes = model.config.text, model.config.text.sizes
        self.generator = torch.Generator().manual_seed(rows)

    def noise(self, *shape: int) -> Tensor:
        made = torch.randn(*shape, generator=self.generator)
        return made.to(self.model.device, self.model.dtype)

    def batch(self) -> ForwardBatch:
        """A decode batch of `rows` rows with contexts of `CONTEXT` tokens."""
        _, table, admitted = points.memory(self.model, self.rows, CONTEXT + 1)
        table = stages.commit(table, admitted, [CONTEXT] * self.rows)
        return points.carry(self.model, table, admitted, [7] * self.rows, [0] * self.rows, CONTEXT + 1)

    def table(self, op: str) -> Ops:
        """The table that `generate` would take the op from: of a decode step of so many rows, or of the encoder."""
        model = self.model
        if op in _EITHER:
            return model.ops
        if op in _VISION:
            return model.vision_ops or model.ops
        return model.step_ops(self.rows)

    def plan(self, batch: ForwardBatch) -> Any:
        size = PAGE_SIZE[self.model.device.type]
        return self.table("plan").plan(batch, config=self.text, page_size=size, dtype=self.model.dtype)

    def of(self, op: str) -> OpCase:
        """The case of one op. Raises `points.TooLargeError` for an op of the encoder where the model has none."""
        build = _TEXT.get(op) or _VISION.get(op)
        if build is None:
            raise KeyError(f"no case for op {op!r}: add one to benchmarks/op_cases.py")
        if op in _VISION and self.model.weights.vision is None:
            raise points.TooLargeError(f"{self.model.name} reads no pictures")
        return build(self)


def _embed(a: Arguments) -> OpCase:
    tokens = a.batch().tokens
    read = len(tokens) * a.text.hidden_size * a.model.dtype.itemsize
    return OpCase(args=(tokens, a.model.weights.text.embed), kwargs={}, work=Work(read, 0))


def _plan(a: Arguments) -> OpCase:
    batch = a.batch()
    size = PAGE_SIZE[a.model.device.type]
    kwargs = {"config": a.text, "page_size": size, "dtype": a.model.dtype}
    return OpCase(args=(batch,), kwargs=kwargs, work=Work(sum(t.nbytes for t in state.leaves(batch)), 0))


def _norm_linear(a: Arguments) -> OpCase:
    x, layer = a.noise(a.rows, a.sizes["E"]), a.model.weights.text.layers[0]
    return OpCase(args=(x, layer.norm_in, layer.qkv), kwargs={"eps": a.text.rms_norm_eps},
                  work=linear_work(x, layer.qkv))  # fmt: skip


def _attend(a: Arguments) -> OpCase:
    layer, batch, s = a.model.weights.text.layers[0], a.batch(), a.sizes
    pool, _, _ = points.memory(a.model, a.rows, CONTEXT + 1)
    keys, values = (a.noise(*pool.keys.shape[1:]) for _ in range(2))
    qkv, tokens = a.noise(a.rows, s["C"]), a.rows * (CONTEXT + 1)
    read = 2 * tokens * s["K"] * s["D"] * keys.itemsize
    return OpCase(args=(qkv, layer.q_norm, layer.k_norm, a.plan(batch), keys, values),
                  kwargs={"eps": a.text.rms_norm_eps}, work=Work(read, 4 * s["A"] * tokens), writes=(4, 5))  # fmt: skip


def _linear_add(a: Arguments) -> OpCase:
    down = a.model.weights.text.layers[0].down
    y, x = a.noise(a.rows, a.sizes["F"]), a.noise(a.rows, a.sizes["E"])
    return OpCase(args=(y, down, x), kwargs={}, work=linear_work(y, down))


def _norm_gate(a: Arguments) -> OpCase:
    x, layer = a.noise(a.rows, a.sizes["E"]), a.model.weights.text.layers[0]
    return OpCase(args=(x, layer.norm_mlp, layer.gate_up), kwargs={"eps": a.text.rms_norm_eps},
                  work=linear_work(x, layer.gate_up))  # fmt: skip


def _head(a: Arguments) -> OpCase:
    x, text = a.noise(a.rows, a.sizes["E"]), a.model.weights.text
    last = torch.arange(a.rows, device=x.device)
    return OpCase(args=(x, last, text.norm, text.head), kwargs={"eps": a.text.rms_norm_eps},
                  work=linear_work(x, text.head))  # fmt: skip


def _at_rows(a: Arguments) -> OpCase:
    count = 64
    x, new = a.noise(4 * count, a.sizes["E"]), a.noise(count, a.sizes["E"])
    at = torch.arange(count, 2 * count, device=x.device)
    return OpCase(args=(x, at, new), kwargs={}, work=Work(2 * new.nbytes, new.numel()), writes=(0,))


def _sample(a: Arguments) -> OpCase:
    logits = a.noise(a.rows, a.sizes["V"]).float()
    settings = sampling_batch([Sampling(temperature=1.0, top_p=0.9)] * a.rows, size=a.rows, device=a.model.device)
    return OpCase(args=(logits, settings, a.batch().lengths), kwargs={}, work=Work(logits.nbytes, logits.numel()))


def _advance(a: Arguments) -> OpCase:
    batch = a.batch()
    tokens = torch.ones(a.rows, dtype=torch.int32, device=a.model.device)
    kwargs = {"page_size": PAGE_SIZE[a.model.device.type]}
    return OpCase(args=(batch, tokens), kwargs=kwargs, work=Work(sum(t.nbytes for t in state.leaves(batch)), 0),
                  writes=(0,))  # fmt: skip


def _patches(a: Arguments) -> Any:
    return points.random_patches(a.model, GRID)


def _block(a: Arguments) -> tuple[Tensor, Any]:
    weights = a.model.weights.vision
    return a.noise(GRID[0] * GRID[1], weights.blocks[0].qkv.shape[1]), weights.blocks[0]


def _picture(a: Arguments, height: int, width: int) -> Tensor:
    return torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=a.generator).to(a.model.device)


def _resize(a: Arguments) -> OpCase:
    height, width = (side * a.model.config.vision.patch_size for side in GRID)
    pixels = _picture(a, height - 10, width + 20)
    return OpCase(args=(pixels, height, width), kwargs={}, work=Work(2 * pixels.nbytes, 0))


def _cut(a: Arguments) -> OpCase:
    config = a.model.config.vision
    pixels = _picture(a, *(side * config.patch_size for side in GRID))
    kwargs = {"patch": config.patch_size, "merge": config.spatial_merge_size}
    return OpCase(args=(pixels,), kwargs=kwargs, work=Work(2 * pixels.nbytes, 0))


def _patch_embed(a: Arguments) -> OpCase:
    patches, weights = _patches(a), a.model.weights.vision
    work = Work(weights.patch.nbytes + patches.patches.nbytes, 2 * weights.patch.numel() * len(patches.patches))
    return OpCase(args=(patches, weights), kwargs={"config": a.model.config.vision}, work=work)


def _vision_plan(a: Arguments) -> OpCase:
    patches = _patches(a)
    return OpCase(args=(patches,), kwargs={"config": a.model.config.vision}, work=Work(patches.coords.nbytes, 0))


def _layer_norm_linear(a: Arguments) -> OpCase:
    x, w = _block(a)
    return OpCase(args=(x, w.qkv, w.qkv_bias), kwargs={}, work=linear_work(x, w.qkv))


def _attend_images(a: Arguments) -> OpCase:
    _, w = _block(a)
    count = GRID[0] * GRID[1]
    qkv = a.noise(count, len(w.qkv))
    plan = a.table("vision_plan").vision_plan(_patches(a), config=a.model.config.vision)
    return OpCase(args=(qkv, plan), kwargs={}, work=Work(qkv.nbytes, 4 * len(w.out) * count**2))


def _linear_bias_add(a: Arguments) -> OpCase:
    x, w = _block(a)
    y = a.noise(len(x), w.down.shape[1])
    return OpCase(args=(y, w.down, w.down_bias, x), kwargs={}, work=linear_work(y, w.down))


def _layer_norm_gelu(a: Arguments) -> OpCase:
    x, w = _block(a)
    return OpCase(args=(x, w.up, w.up_bias), kwargs={}, work=linear_work(x, w.up))


def _merge(a: Arguments) -> OpCase:
    x, _ = _block(a)
    merger = a.model.weights.vision.merger
    rows = x.numel() // merger.up.shape[1]
    elements = merger.up.numel() + merger.down.numel()
    return OpCase(args=(x, merger), kwargs={}, work=Work(elements * x.itemsize, 2 * elements * rows))


def _features(a: Arguments) -> OpCase:
    """Of features that are made: those that a table leaves to this op are `_merge`'s."""
    x, _ = _block(a)
    weights = a.model.weights.vision
    rows, width = x.numel() // weights.merger.up.shape[1], len(weights.merger.down)
    made = [a.noise(rows, width) for _ in range(1 + len(weights.taps))]
    return OpCase(args=(made,), kwargs={}, work=Work(2 * sum(t.nbytes for t in made), 0))


_TEXT: dict[str, Callable[[Arguments], OpCase]] = {
    "embed": _embed, "plan": _plan, "norm_linear": _norm_linear, "attend_": _attend, "linear_add": _linear_add,
    "norm_gate": _norm_gate, "head": _head, "put_": _at_rows, "add_": _at_rows, "sample": _sample,
    "advance_": _advance,
}  # fmt: skip
_VISION: dict[str, Callable[[Arguments], OpCase]] = {
    "resize": _resize, "cut": _cut, "patch_embed": _patch_embed, "vision_plan": _vision_plan,
    "layer_norm_linear": _layer_norm_linear, "attend_images": _attend_images, "linear_bias_add": _linear_bias_add,
    "layer_norm_gelu": _layer_norm_gelu, "merge": _merge, "features": _features,
}  # fmt: skip
_EITHER = ("put_", "add_", "resize", "cut")  # what is done to prompts and pictures before anything is captured
