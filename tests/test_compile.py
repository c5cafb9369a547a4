"""Every kernel compiles for the GPUs that this runtime is for, within their limits; no GPU is needed to know."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mllm import kernels

pytest.importorskip("triton")

# Bytes of stack a thread. Triton 3.7 takes 32 for a sine and spills one register of 56; 3.9 takes none. The tiles that
# were fastest with all 255 registers spill 16 more. A kernel that is short of registers spills hundreds of bytes.
STACK = 64
KERNELS = [
    (language, f"{name}_kernel")
    for module in Path(kernels.__file__).parent.glob("*.py")
    for language, name in re.findall(r"^@(\w+)\.jit\b.*\ndef (\w+)_kernel\(", module.read_text("utf-8"), re.MULTILINE)
]
# compute capability -> (bytes of shared memory a block may have, registers a thread may have): CUDA programming
# guide, "Technical specifications per compute capability"
LIMITS = {87: (163 * 1024, 255), 90: (227 * 1024, 255)}


@pytest.mark.parametrize("capability", LIMITS)
def test_every_kernel_compiles_within_the_limits(capability: int, capsys: pytest.CaptureFixture[str]) -> None:
    shared, registers = LIMITS[capability]
    script = Path(__file__).with_name("compiled.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the interpreter compiles nothing
    run = subprocess.run(  # noqa: S603
        [sys.executable, script, str(capability)], capture_output=True, text=True, env=env, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    with capsys.disabled():
        print(f"\nsm_{capability}: kernel, model, stage: registers, bytes of stack, shared bytes")
        for r in records:
            usage = f"{r['registers']:4} {r['stack']:3} {r['shared']:7}"
            print(f"  {r['kernel']:20} {r['model']:12} {r['stage']:12} {usage}")
    # those in Gluon are for Hopper's tensor cores
    assert {r["kernel"] for r in records} == {n for language, n in KERNELS if language == "triton" or capability == 90}
    assert [r for r in records if r["stack"] > STACK] == []
    assert [r for r in records if r["shared"] > shared or r["registers"] > registers] == []
