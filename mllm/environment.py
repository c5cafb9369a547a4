"""What this machine and its packages are: for bug reports (`mllm env`)."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mllm

PACKAGES = {
    "triton": "triton", "flashinfer": "flashinfer-python", "transformers": "transformers", "tokenizers": "tokenizers",
    "safetensors": "safetensors", "pillow": "pillow", "attrs": "attrs", "numpy": "numpy",
    "numba": "numba",
}  # fmt: skip
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TRITON_INTERPRET")


def report() -> dict[str, Any]:
    """Versions, processor, memory and GPUs. Plain values only, so it can be written as JSON; None means not there."""
    return {
        "mllm": mllm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": _first_line("/proc/device-tree/model"),  # a Jetson says here which it is
        "cpu": _cpu(),
        "cores": _cores(),
        "memory_gib": _memory(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        **{name: _version(distribution) for name, distribution in PACKAGES.items()},
        "driver": _driver(),
        "gpus": _gpus(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def text(values: dict[str, Any]) -> str:
    """The report, one line for each thing."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            shown = "; ".join(", ".join(f"{k} {v}" for k, v in item.items()) for item in value) or "none"
        elif isinstance(value, dict):
            shown = " ".join(f"{k}={v}" for k, v in value.items()) or "none set"
        else:
            shown = "-" if value is None else str(value)
        lines.append(f"{name:<14}{shown}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[0].strip("\0 ")
    except (OSError, IndexError):
        return None


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _driver() -> str | None:
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _first_line("/proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
        }
        for gpu in found
    ]
