"""Compile every Triton kernel for a GPU that is not here, and read what it needs: registers, stack, shared memory.

    python tests/compiled.py 90        # compute capability 9.0; prints one JSON record per kernel and shape

The kernels are launched by their own ops on meta tensors, with the launch replaced by a recorder, so a new kernel or
a new shape of an op needs no entry here, only a call in `CALLS`.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia import hopper
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mllm import families
from mllm.batch import ForwardBatch, PatchBatch
from mllm.kernels import cuda, cuda_prompts, cuda_vision, mrope, patches, resize, step
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE
from mllm.sampling import Sampling, sampling_batch
from mllm.weights import build, room

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
OPTIONS = {"num_warps", "num_stages", "maxnreg", "launch_pdl", "launch_cooperative_grid", "enable_fp_fusion"}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def decode(model: str, rows: int, *, wide: bool, hopper: bool) -> None:
    """Every op of the decode table once, at the shapes of a public model; of one row for short and long contexts."""
    ops = cuda.decode_ops(rows, pdl=wide, hopper=hopper)
    for listed in (4, 16, 32, 512) if rows == 1 else (32,):
        batch = forward(model, ops, rows, rows, listed)
        if rows == 1:
            whole(model, ops, batch)
    ops.advance_(batch, empty(rows, dtype=torch.int32), page_size=64)


def whole(model: str, ops: Ops, batch: ForwardBatch) -> None:
    """A step as one kernel, where the table has one."""
    config = families.preset(model)
    size = config.sizes
    weights = build(config, room(config, device="meta", dtype=torch.bfloat16)).text
    pool = empty(size["L"], 100, 64, size["K"], size["D"])
    plan = ops.plan(batch, config=config.text, page_size=64, dtype=torch.bfloat16)
    made = ops.whole_(empty(1, size["E"]), weights, pool, pool, plan, eps=1e-6)
    assert (made is None) == (plan.exchange is None)


def prompt(model: str, tokens: int, *, wide: bool, hopper: bool) -> None:
    """Every op of the prompt table once, for one row and for some."""
    ops = cuda_prompts.prompt_ops(tokens, wide=wide, hopper=hopper)
    for rows in (1, 4):
        forward(model, ops, tokens, rows)
    x, at = empty(tokens, 2048), empty(16, dtype=torch.int64)
    ops.put_(x, at, empty(16, 2048))
    ops.add_(x, at, empty(16, 2048))


def forward(model: str, ops: Ops, tokens: int, rows: int, listed: int = 32) -> ForwardBatch:
    config = families.preset(model).text
    size = config.sizes
    batch = ForwardBatch(
        tokens=empty(tokens, dtype=torch.int32), positions=empty(3, tokens, dtype=torch.int32),
        slots=empty(tokens, dtype=torch.int64), pages=empty(rows, listed, dtype=torch.int32),
        lengths=empty(rows, dtype=torch.int32), q_indptr=empty(rows + 1, dtype=torch.int32),
        last=empty(rows, dtype=torch.int64),
    )  # fmt: skip
    plan = ops.plan(batch, config=config, page_size=64, dtype=torch.bfloat16)
    x = ops.embed(batch.tokens, empty(size["V"], size["E"]))
    x, qkv = ops.norm_linear(x, empty(size["E"]), empty(size["C"], size["E"]), eps=1e-6)
    pool = empty(100, 64, size["K"], size["D"])
    y = ops.attend_(qkv, empty(size["D"]), empty(size["D"]), plan, pool, pool, eps=1e-6)
    x = ops.linear_add(y, empty(size["E"], size["A"]), x)
    x, gate = ops.norm_gate(x, empty(size["E"]), empty(size["G"], size["E"]), eps=1e-6)
    x = ops.linear_add(gate, empty(size["E"], size["F"]), x)
    logits = ops.head(x, batch.last, empty(size["E"]), empty(size["V"], size["E"]), eps=1e-6)
    for settings in (Sampling(), Sampling(temperature=1.0, top_k=20, top_p=0.9)):
        ops.sample(logits, sampling_batch([settings] * rows, size=rows, device="meta"), batch.lengths)
    return batch


def vision(model: str, count: int, *, wide: bool, hopper: bool) -> None:
    """Every op of the captured table of the encoder once."""
    config = families.preset(model)
    size = config.sizes
    ops = cuda_vision.vision_ops(REFERENCE, captured=True, wide=wide, hopper=hopper)
    weights = build(config, room(config, device="meta", dtype=torch.bfloat16)).vision
    picture = resize.resize(empty(500, 1000, 3, dtype=torch.uint8), 16 * 32, 16 * count // 32)
    pixels = patches.cut(picture, patch=16, merge=2)
    batch = PatchBatch(
        patches=pixels, coords=empty(4, count, dtype=torch.int32), indptr=empty(3, dtype=torch.int32),
        at=empty(count // 4, dtype=torch.int64), mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    one = attrs.evolve(batch, indptr=empty(2, dtype=torch.int32))  # type: ignore[misc]
    plans = [ops.vision_plan(b, config=config.vision) for b in (one, batch)]
    x, w = ops.patch_embed(batch, weights, config=config.vision), weights.blocks[0]
    x, qkv = ops.layer_norm_linear(x, w.qkv, w.qkv_bias)
    for plan in plans:
        y = ops.attend_images(qkv, plan)
    x = ops.linear_bias_add(y, w.out, w.out_bias, x)
    x, g = ops.layer_norm_gelu(x, w.up, w.up_bias)
    x = ops.linear_bias_add(g, w.down, w.down_bias, x)
    mergers = weights.merger, *weights.taps
    merged = []
    for merger in mergers:
        x, waiting = ops.merge(x, merger)
        merged.append(waiting)
    for some in (merged, merged[:1], merged[1:2]):
        assert ops.features(some).shape == (len(some), count // 4, size["E"])


def rotary(model: str, tokens: int, *, wide: bool, hopper: bool) -> None:
    """Tables of both layouts, and heads turned in place: whole, in part, and of a size that 16 does not divide."""
    size = families.preset(model).text.sizes
    heads, kv_heads = size["H"], size["K"]
    for head, half, interleaved in (
        (size["D"], size["D"] // 2, True),
        (size["D"], size["D"] // 8, False),
        (72, 36, True),
    ):
        positions, frequencies = empty(3, tokens, dtype=torch.int32), empty(half, dtype=torch.float32)
        sections = (half - half // 2, half // 4, half // 2 - half // 4)
        cos, sin = step.rotary(positions, frequencies, sections, interleaved=interleaved, pdl=wide)
        q, k, _ = empty(tokens, heads + 2 * kv_heads, head).split((heads, kv_heads, kv_heads), 1)
        mrope.rotate_(q, k, cos, sin, pdl=wide)


CALLS: dict[str, tuple[Callable[..., None], tuple[int, ...]]] = {  # and the rows, tokens or patches to try
    "decode": (decode, (1, 8, 64, 128)),
    "prompt": (prompt, (64, 256, 512, 2048)),
    "vision": (vision, (256, 1024, 4096, 9216)),
    "rotary": (rotary, (256,)),
}


def launches(call: Callable[[], None]) -> list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]]:
    """What a call launches, recorded instead of run."""
    recorded: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []
    run = JITFunction.run

    def record(self: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        recorded.append((self, args, {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")}))

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        call()
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return recorded


def compile_for(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Any:
    """Compile one recorded launch, specialised as a real launch would be."""
    options = {k: v for k, v in kwargs.items() if k in OPTIONS}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def declare(value: Any, path: tuple[int, ...]) -> Any:
        """The type of an argument, or of a part of a tuple; notes whether it is known, or a multiple of 16."""
        if isinstance(value, tuple):
            return tuple(declare(part, (*path, i)) for i, part in enumerate(value))
        if kernel.params[path[0]].do_not_specialize:
            return "i32"
        if kernel.params[path[0]].is_constexpr or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, TensorDescriptor | hopper.TensorDescriptor):
            layout = f",{value.layout!r}" if isinstance(value, hopper.TensorDescriptor) else ""
            return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}{layout}>"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for index, parameter in enumerate(kernel.params):
        signature[parameter.name] = declare(values[parameter.name], (index,))
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled: Any) -> dict[str, int]:
    """Registers and bytes of stack (where spills go) a thread, shared memory bytes a block, read from the binary."""
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    found = {k: int(v) for k, v in re.findall(r"(REG|LOCAL|STACK):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["LOCAL"] + found["STACK"], "shared": compiled.metadata.shared}


def records(capability: int) -> Iterator[dict[str, Any]]:
    seen = set()
    tables = (
        [{"wide": False, "hopper": False}] if capability < 90 else [{"wide": True, "hopper": h} for h in (False, True)]
    )
    models = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b")
    for model, (stage, (call, counts)), table in itertools.product(models, CALLS.items(), tables):
        for count in counts:
            for kernel, args, kwargs in launches(partial(call, model, count, **table)):
                compiled = compile_for(kernel, args, kwargs, capability)
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    used = usage(compiled)
                    yield {"kernel": kernel.__name__, "model": model, "stage": f"{stage} {count}", **used}


if __name__ == "__main__":
    for record in records(int(sys.argv[1])):
        print(json.dumps(record), flush=True)
