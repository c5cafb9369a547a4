"""Compile every Triton kernel for a GPU that is not here, and read what it needs: registers, stack, shared memory.

    python tests/compiled.py 90        # compute capability 9.0; prints one JSON record per kernel and shape

The kernels are launched by their own ops on meta tensors, with the launch replaced by a recorder, so a new kernel or
a new shape of an op needs no entry here, only a call in `calls`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mllm import families
from mllm.batch import ForwardBatch
from mllm.kernels import cuda, step

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
OPTIONS = {"num_warps", "num_stages", "launch_pdl", "enable_fp_fusion"}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(model: str, rows: int, *, pdl: bool) -> None:
    """Every op of the decode table once, at the shapes of a public model."""
    config = families.preset(model).text
    size = config.sizes
    ops = cuda.decode_ops(rows, pdl=pdl)
    batch = ForwardBatch(
        tokens=empty(rows, dtype=torch.int32), positions=empty(3, rows, dtype=torch.int32),
        slots=empty(rows, dtype=torch.int64), pages=empty(rows, 64, dtype=torch.int32),
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
    tokens = step.argmax(logits, pdl=pdl)
    ops.advance_(batch, tokens, page_size=64)


def launches(model: str, rows: int, *, pdl: bool) -> list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]]:
    """What `calls` launches, recorded instead of run."""
    recorded: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []
    run = JITFunction.run

    def record(self: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        recorded.append((self, args, {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")}))

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        calls(model, rows, pdl=pdl)
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return recorded


def build(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Any:
    """Compile one recorded launch, specialised as a real launch would be."""
    options = {k: v for k, v in kwargs.items() if k in OPTIONS}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
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
    for model in ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"):
        for rows in (1, 8, 64):
            for kernel, args, kwargs in launches(model, rows, pdl=capability >= 90):
                compiled = build(kernel, args, kwargs, capability)
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    yield {"kernel": kernel.__name__, "model": model, "rows": rows, **usage(compiled)}


if __name__ == "__main__":
    for record in records(int(sys.argv[1])):
        print(json.dumps(record), flush=True)
