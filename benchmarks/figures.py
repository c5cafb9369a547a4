"""Bytes and flops of each stage, counted from the configuration; and what they make of a time and a limit.

bytes: each weight once, plus the live keys and values. flops: two per multiply-add of the linear layers, plus
attention, which for a causal prompt is half of the square.
"""

from __future__ import annotations

from attrs import frozen

from mllm.config import TextConfig, VisionConfig


@frozen
class Work:
    """What a stage has to read, in bytes, and to compute, in floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@frozen
class Limit:
    """What the device reached in this session: a read stream in bytes/s, a matrix product in flops/s."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, work: Work) -> float:
        """The least time that `work` can take: all bytes or all flops, whichever lasts longer."""
        return max(work.bytes / self.bytes_per_s, work.flops / self.flops_per_s)


def layer_parameters(config: TextConfig) -> int:
    """Elements of the matrices of all decoder layers; norms are left out, below 0.1 %."""
    s = config.sizes
    return s["L"] * (s["C"] * s["E"] + s["E"] * s["A"] + s["G"] * s["E"] + s["E"] * s["F"])


def kv_bytes(config: TextConfig, itemsize: int) -> int:
    """Bytes of keys and values of one token."""
    s = config.sizes
    return 2 * s["L"] * s["K"] * s["D"] * itemsize


def head(config: TextConfig, rows: int, itemsize: int) -> Work:
    """The projection to logits of `rows` positions."""
    elements = config.sizes["V"] * config.sizes["E"]
    return Work(elements * itemsize, 2 * elements * rows)


def decode(config: TextConfig, *, rows: int, context: float, itemsize: int) -> Work:
    """One decode step of `rows` rows whose contexts are `context` tokens long, on average."""
    s, elements = config.sizes, layer_parameters(config)
    attention = 4 * s["L"] * s["A"] * context * rows
    cache = kv_bytes(config, itemsize) * context * rows
    return Work(elements * itemsize + cache, 2 * elements * rows + attention) + head(config, rows, itemsize)


def prefill(config: TextConfig, *, rows: int, length: int, itemsize: int) -> Work:
    """Prompts of `length` tokens, whole, with logits after the last token of each row.

    After attention the last layer has to compute no other token.
    """
    s, elements = config.sizes, layer_parameters(config)
    tokens = rows * length
    after = elements // s["L"] - s["C"] * s["E"]  # of a layer, all but its queries, keys and values
    linear = 2 * (elements * tokens - after * (tokens - rows))
    attention = 4 * s["L"] * s["A"] * length / 2 * tokens
    cache = kv_bytes(config, itemsize) * tokens
    return Work(elements * itemsize + cache, linear + attention) + head(config, rows, itemsize)


def vit(config: VisionConfig, *, patches: tuple[int, ...], itemsize: int) -> Work:
    """The encoder on images of so many patches each: patch embedding, blocks, merger and taps."""
    s = config.sizes
    blocks = s["Lv"] * (s["Cv"] * s["Ev"] + s["Ev"] ** 2 + 2 * s["Fv"] * s["Ev"])
    merger = (s["J"] + 1) * (s["Mv"] ** 2 + s["Mv"] * config.out_hidden_size)
    embed = s["Ev"] * s["U"]
    total = sum(patches)
    merged = total / config.spatial_merge_size**2
    attention = sum(4 * s["Lv"] * s["Ev"] * count**2 for count in patches)
    linear = 2 * (blocks + embed) * total + 2 * merger * merged
    return Work((blocks + merger + embed) * itemsize, linear + attention)


def rates(work: Work, seconds: float, limit: Limit | None) -> dict[str, float]:
    """The figures of a stage that took `seconds`: bytes, flops, GB/s, TFLOP/s and the share of the limit."""
    found = {
        "bytes": work.bytes,
        "flops": work.flops,
        "gb_s": work.bytes / seconds / 1e9,
        "tflop_s": work.flops / seconds / 1e12,
    }
    if limit is not None:
        found |= {"limit_ms": limit.seconds(work) * 1e3, "limit_share": limit.seconds(work) / seconds}
    return found


def first_token(rows: int, input_len: int, seconds: float) -> dict[str, float]:
    """The figures of a point whose one new token comes from prefill, in SGLang's words."""
    return {
        "batch_size": rows, "input_len": input_len, "output_len": 1,
        "prefill_latency": seconds, "prefill_throughput": rows * input_len / seconds,
        "total_latency": seconds, "overall_throughput": rows * (input_len + 1) / seconds,
    }  # fmt: skip
