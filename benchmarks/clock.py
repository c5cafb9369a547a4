"""Time, on the host's clock and on the device's own; and the limits of the device, measured with the same clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.figures import Limit

Call = Callable[[], Any]
SPIN_S = 0.05  # longest head start that the host gets before device time is taken


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def synced(fn: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """`fn` that returns when the device is done, so that a host's stopwatch around it sees all of it."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = fn(*args, **kwargs)
        synchronize(device)
        return out

    return call


def wall(fn: Call, device: torch.device | str) -> float:
    """Seconds from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def device_time(fn: Call, device: torch.device | str, *, head_start: float) -> float:
    """Seconds between two events around the work of `fn`; on a CPU the same as `wall`.

    The device spins for about `head_start` seconds first, so that the host has enqueued the work by the time the
    first event fires: what is left is the device's time without the launches'. Where `fn` waits for the device
    inside, the host's time shows all the same.
    """
    if torch.device(device).type != "cuda":
        return wall(fn, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(min(head_start, SPIN_S) * 2e9))  # cycles of a clock below 2 GHz
    begin.record()
    fn()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def measure_limit(device: torch.device | str, dtype: torch.dtype) -> Limit:
    """The read stream and the matrix product that this device reaches now, best of several."""
    return Limit(_read_stream(device), _product(device, dtype))


def _read_stream(device: torch.device | str) -> float:
    """Bytes/s of reading an array too large for the caches, by the quicker of a sum and a matrix-vector product."""
    gpu = torch.device(device).type == "cuda"
    side = 32768 if gpu else 8192  # 4 GB, 256 MB
    data = torch.ones(side, side, device=device)
    vector = torch.ones(side, device=device)
    calls: list[Call] = [lambda: data.sum(), lambda: torch.mv(data, vector)]
    rounds = 10 if gpu else 3
    return data.nbytes / min(device_time(call, device, head_start=1e-3) for call in calls for _ in range(rounds))


def _product(device: torch.device | str, dtype: torch.dtype) -> float:
    """Flops/s of a product of two square matrices of random numbers (zeros draw less power and run faster)."""
    side = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def call() -> None:
        torch.mm(a, b, out=out)

    return 2 * side**3 / min(device_time(call, device, head_start=1e-3) for _ in range(10))
