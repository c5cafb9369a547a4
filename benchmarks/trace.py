"""Traces: one call of a stage under the PyTorch profiler, as a gzipped Chrome trace that Perfetto opens."""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import synchronize


def file_name(stage: str, model: str, point: str) -> str:
    """A file name that says what was traced: decode-qwen3-vl-2b-bs=8-in=2048-out=128."""
    return re.sub(r"[^\w.=+-]+", "_", f"{stage}-{model}-{point}")


def mark(call: Callable[[], Any], device: str) -> None:
    """Run `call` once between cudaProfilerStart and Stop, with the device idle at both.

    For `nsys profile --capture-range=cudaProfilerApi --capture-range-end=repeat pytest benchmarks --profiler cuda ...`,
    which writes a report for each range.
    """
    synchronize(device)
    torch.cuda.profiler.start()
    call()
    synchronize(device)
    torch.cuda.profiler.stop()


def record(call: Callable[[], Any], path: Path, *, device: str) -> str:
    """Run `call` once under PyTorch's profiler, write `path`, and return the table of key averages."""
    gpu = torch.device(device).type == "cuda"
    synchronize(device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds, with_stack=True, record_shapes=True) as found:
        call()
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        found.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(path, "wb") as target:
            shutil.copyfileobj(source, target)
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=48))
