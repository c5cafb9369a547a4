"""The memory budget: bytes in, tokens out. Pure, but for `available`, which asks the device.

    static share = mem_fraction_static * available before loading      weights and KV pool together
    KV budget    = available after loading - (available before loading - static share)
    tokens       = KV budget // bytes of a token, in whole pages, one of which is the sink

What lies outside the static share must hold everything else, whose peak `mllm.peak` predicts at the declared limits: one
prefill chunk, `rows` rows that decode, and the largest image.
"""

from __future__ import annotations

import warnings

import psutil
import torch
from attrs import asdict, evolve, frozen

from mllm import cgroup, peak
from mllm.cache import PAGE_SIZE, bytes_per_token
from mllm.config import Config
from mllm.errors import MemoryBudgetError
from mllm.image_config import ImageConfig
from mllm.peak import Load, Peak

MEM_FRACTION_STATIC = 0.85
"""Share of the memory for weights and KV pool unless the caller says otherwise."""
PREFILL_TOKENS = 2048
"""Prompt tokens in one prefill batch: enough to be bound by arithmetic, few enough to bound the activations."""
MAX_ROWS = 64
"""Rows that decode together unless `max_running_requests` says otherwise."""


@frozen(kw_only=True)
class MemoryProfile:
    """How the memory of a device is shared out for one model.

    device: the device, like "cuda:0".
    memory: whose memory it is: "GPU", "system" for a CPU, "system, shared with the GPU" for an integrated one; "cgroup" in
      the place of "system" where the control groups of the process, its container's, leave less than the system has.
    available_before: bytes that could be allocated before the weights were loaded.
    available_after: bytes that could be allocated after.
    weight_bytes: bytes of all parameters.
    mem_fraction_static: the share of `available_before` that weights and KV pool together may take, between 0 and 1.
    recurrent_bytes: bytes kept for recurrent state: 0, these models have none.
    kv_bytes: bytes that the KV pool may take.
    bytes_per_token: bytes of the keys and values of one token in all layers.
    page_size: tokens in a page of the pool.
    context: tokens of the longest context that the model was made for.
    profiled_tokens: tokens that `kv_bytes` hold, in whole pages without the sink.
    requested_tokens: the caller's `max_total_tokens`; None where there is none.
    effective_tokens: tokens that the pool may have: the smaller of the two, in whole pages.
    prefill_tokens: the declared limit of one prefill batch, in tokens.
    rows: the declared limit of rows that decode together on a full pool.
    image_pixels: the declared limit of a picture after resizing, in pixels; 0 for a model without an encoder.
    peak: predicted bytes of everything else at these limits.
    """

    device: str
    memory: str
    available_before: int
    available_after: int
    weight_bytes: int
    mem_fraction_static: float
    recurrent_bytes: int = 0
    kv_bytes: int
    bytes_per_token: int
    page_size: int
    context: int
    profiled_tokens: int
    requested_tokens: int | None = None
    effective_tokens: int
    prefill_tokens: int
    rows: int
    image_pixels: int = 0
    peak: Peak

    @property
    def static_bytes(self) -> int:
        """Bytes that weights and KV pool together may take."""
        return int(self.available_before * self.mem_fraction_static)

    @property
    def left_bytes(self) -> int:
        """Bytes outside the static share: for everything else."""
        return self.available_before - self.static_bytes

    @property
    def longest(self) -> int:
        """Tokens of the longest context that fits, whether the model or the pool ends it."""
        return min(self.context, self.effective_tokens)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON; with the sums."""
        return asdict(self) | {
            "static_bytes": self.static_bytes, "left_bytes": self.left_bytes, "peak_bytes": self.peak.total,
        }  # fmt: skip


def available(device: torch.device) -> int:
    """Bytes that could be allocated on a device now.

    A discrete GPU: what CUDA has free. A CPU, and a GPU that shares the system's memory, where CUDA counts what the
    system could give back as taken: what the system has available, or less where a container has a limit. What PyTorch's
    allocator holds unused counts as free.
    """
    if device.type != "cuda":
        return _system()[0]
    free = torch.cuda.mem_get_info(device)[0]  # first, since it wakes CUDA, and before that there are no statistics
    stats = torch.cuda.memory_stats_as_nested_dict(device)  # `memory_reserved` takes 0.4 ms to flatten all of it
    cached = stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"]
    return cached + (_system()[0] if _is_integrated(device) else free)


def describe(device: torch.device) -> str:
    """Whose memory a device uses."""
    if device.type != "cuda":
        return _system()[1]
    return f"{_system()[1]}, shared with the GPU" if _is_integrated(device) else "GPU"


def _system() -> tuple[int, str]:
    """Bytes of the system's memory that this process could allocate now, and who says so: "system" or "cgroup"."""
    system, group = int(psutil.virtual_memory().available), cgroup.available()
    return (system, "system") if group is None or system <= group else (group, "cgroup")


def _is_integrated(device: torch.device) -> bool:
    return bool(torch.cuda.get_device_properties(device).is_integrated)


def profile(
    config: Config,
    images: ImageConfig | None,
    *,
    device: torch.device,
    memory: str,
    dtype: torch.dtype,
    available_before: int,
    available_after: int,
    weight_bytes: int,
    mem_fraction_static: float = MEM_FRACTION_STATIC,
) -> MemoryProfile:
    """The budget of a model. A pure function: `memory` and both `available` are what was measured, in bytes.

    Raises `MemoryBudgetError` where not even one page fits, or one row of one chunk beside the pool, and `ValueError`
    for a fraction that is none.
    """
    check_fraction(mem_fraction_static)
    page_size = PAGE_SIZE[device.type]
    each = bytes_per_token(config.text, dtype)
    left = available_before - int(available_before * mem_fraction_static)
    kv = available_after - left
    tokens = max(kv // (each * page_size) - 1, 0) * page_size  # without the sink
    made = MemoryProfile(
        device=str(device), memory=memory, available_before=available_before, available_after=available_after,
        weight_bytes=weight_bytes, mem_fraction_static=mem_fraction_static, kv_bytes=kv, bytes_per_token=each,
        page_size=page_size, context=config.text.max_position_embeddings, profiled_tokens=tokens,
        effective_tokens=tokens, prefill_tokens=PREFILL_TOKENS, rows=MAX_ROWS, peak=Peak(),
    )  # fmt: skip
    if tokens < 1:
        raise MemoryBudgetError(refusal(made, *_why_no_pool(made)))
    return _with_limits(made, config, images, itemsize=dtype.itemsize, device=device.type)


def check_fraction(value: object) -> None:
    """Raises `TypeError` or `ValueError` for a `mem_fraction_static` that is not a number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"mem_fraction_static: expected a number, got {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"mem_fraction_static: expected a number between 0 and 1, got {value!r}")


def _with_limits(
    made: MemoryProfile, config: Config, images: ImageConfig | None, *, itemsize: int, device: str
) -> MemoryProfile:
    """The profile with the largest limits whose peak fits outside the static share: rows first, then the picture."""
    area = 0 if images is None or config.vision is None else images.factor**2  # the smallest picture, in pixels

    def at(rows: int, pixels: int) -> MemoryProfile:
        share = min(made.context, made.effective_tokens // rows)
        listed = 2 * share if device == "cpu" else share  # there pages are listed in powers of two
        patches = pixels // images.patch**2 if images else 0
        load = Load(
            prefill_tokens=made.prefill_tokens, rows=rows, context=made.longest, listed=listed, patches=patches,
            feature_tokens=pixels // area if area else 0,
        )  # fmt: skip
        predicted = peak.predict(config, load, itemsize=itemsize, device=device)
        return evolve(made, rows=rows, image_pixels=pixels, peak=predicted)

    def fits(one: MemoryProfile) -> bool:
        return one.peak.total <= one.left_bytes

    rows = made.rows
    while rows > 1 and not fits(at(rows, area)):
        rows //= 2
    if not fits(least := at(rows, area)):
        raise MemoryBudgetError(refusal(least, *_why_no_rest(least)))
    if images is None or not area:
        return least
    low, high = 1, images.max_pixels // area  # tokens of the picture; the first fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(at(rows, middle * area)) else (low, middle - 1)
    return at(rows, low * area)


def bound(made: MemoryProfile, max_total_tokens: int | None) -> MemoryProfile:
    """The profile with a pool of at most `max_total_tokens` tokens, which bounds what was profiled, and never raises
    it: warns with both numbers where it is more."""
    if max_total_tokens is None:
        return made
    if max_total_tokens > made.profiled_tokens:
        warnings.warn(
            f"max_total_tokens {max_total_tokens} is more than the {made.profiled_tokens} tokens that fit; "
            f"the KV pool gets {made.profiled_tokens}",
            stacklevel=4,
        )
    tokens = min(max_total_tokens // made.page_size * made.page_size, made.profiled_tokens)
    return evolve(made, requested_tokens=max_total_tokens, effective_tokens=tokens)


def refusal(made: MemoryProfile, cause: str, remedy: str) -> str:
    """What a `MemoryBudgetError` says: cause, arithmetic, largest context, and what to change in which direction."""
    if made.memory.startswith("cgroup"):
        remedy += " Or raise the memory limit of the container: the system has more than it allows."
    return f"{made.device}: {cause}\n{table(made)}\n{remedy}"


def _why_no_pool(made: MemoryProfile) -> tuple[str, str]:
    """Cause and remedy of a KV budget below one page and the sink."""
    need = made.weight_bytes + 2 * made.page_size * made.bytes_per_token
    taken = made.available_before - made.available_after - made.weight_bytes
    if made.weight_bytes > made.static_bytes:
        cause = "no room for a KV pool: the weights alone exceed the static share"
    elif need <= made.static_bytes and taken > 0:
        cause = f"no room for a KV pool: {gigabytes(taken)} besides the weights were taken while they were loaded"
        return cause, "Free that memory: end other processes on the device, or load when they are done."
    else:
        cause = "no room for a KV pool: the weights leave less of the static share than one page"
    least = need / max(made.available_before, 1)
    if least < 0.99:
        return cause, f"Raise mem_fraction_static above {least + 0.005:.2f}, or take a smaller model or dtype."
    return cause, f"Free memory until {gigabytes(need)} are available, or take a smaller model or dtype."


def _why_no_rest(made: MemoryProfile) -> tuple[str, str]:
    """Cause and remedy of a peak that does not fit outside the static share even for one row."""
    most = 1 - made.peak.total / max(made.available_before, 1)
    cause = "what lies outside the static share cannot hold one prefill chunk and one row"
    if most > 0:
        return cause, f"Lower mem_fraction_static to {int(most * 100) / 100:.2f} or less."
    return cause, f"Free memory: {gigabytes(made.peak.total)} are needed beside weights and KV pool."


def gigabytes(count: int) -> str:
    """ "1.50 GB"; small numbers of bytes in MB."""
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.2f} MB"


def table(made: MemoryProfile) -> str:
    """The profile as lines of a table."""
    tokens = f"{made.profiled_tokens} tokens of {made.bytes_per_token} bytes, pages of {made.page_size}"
    if made.requested_tokens is not None:
        tokens += f"; max_total_tokens {made.requested_tokens} leaves {made.effective_tokens}"
    p = made.peak
    parts = {"encoder": p.encoder, "prefill": p.prefill, "decode": p.decode, "features": p.features,
             "graphs": p.graphs, "workspace": p.workspace}  # fmt: skip
    limits = f"prefill {made.prefill_tokens} tokens, decode {made.rows} rows"
    if made.image_pixels:
        limits += f", a picture {made.image_pixels} pixels"
    lines = {
        "memory": f"{gigabytes(made.available_before)} available before loading ({made.memory}), "
        f"{gigabytes(made.available_after)} after",
        "static share": f"{gigabytes(made.static_bytes)} = mem_fraction_static {made.mem_fraction_static:g}; "
        f"weights {gigabytes(made.weight_bytes)}",
        "KV budget": f"{gigabytes(made.kv_bytes)} = {gigabytes(made.available_after)} - "
        f"{gigabytes(made.left_bytes)} outside the share; recurrent state {made.recurrent_bytes} bytes",
        "KV pool": tokens,
        "context": f"{made.longest} tokens at most; the model's is {made.context}",
    }
    if p.total:  # it is predicted once there is a pool
        shown = ", ".join(f"{name} {gigabytes(count)}" for name, count in parts.items() if count)
        lines |= {"limits": limits, "peak": f"{gigabytes(p.total)} of {gigabytes(made.left_bytes)}: {shown}"}
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())
