"""What a result was measured on: hardware, clocks, versions, commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "triton", "flashinfer-python", "numpy", "pillow", "pytest-benchmark")
GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "power.draw",
              "temperature.gpu", "memory.total")  # fmt: skip


def info(device: str) -> dict[str, Any]:
    """For `machine_info` of the JSON file."""
    found: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "packages": packages()}
    found |= commit()
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = gpu(torch.device(device).index or 0)
    return found


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether files differed from it; nothing outside a git checkout."""
    name = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not name:
        return {}
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "mllm", "benchmarks")
    return {"commit": name, "dirty": bool(changed)}


def gpu(index: int) -> dict[str, Any]:
    """Name, memory, multiprocessors, CUDA; driver, clocks and power where nvidia-smi answers."""
    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    query = f"--query-gpu={','.join(GPU_FIELDS)}"
    for name in (f"GPU-{properties.uuid}", str(index)):  # nvidia-smi's numbers are not those of CUDA_VISIBLE_DEVICES
        if line := _output("nvidia-smi", f"--id={name}", query, "--format=csv,noheader"):
            break
    return found | dict(zip(GPU_FIELDS, (part.strip() for part in line.split(",")), strict=False))


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is not there or fails: the machine may lack any of them."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
