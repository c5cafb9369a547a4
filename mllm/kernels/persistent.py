"""A decode step of one row as one kernel on Hopper, whose programs, one a multiprocessor, stay for all layers and the head.

Between kernels, even where the next one starts early, a multiprocessor's requests to memory run dry. Here a warp of each
program does nothing but copy weights into a ring (`kernels/ring.py`), while the others do what the chain of kernels does:
product, attention, product, gate, product. What a program has made it sends to the others in words that carry the layer they
are of (`kernels/words.py`). A word is written again a layer later. By then all have read it: whoever writes has heard, by
way of others, from every program that reads it, as none reads what it makes nothing of. Each program keeps its part of the
residual stream, in float32.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mllm.config import TextConfig
from mllm.kernels import attend_one, ring
from mllm.kernels.decode_plan import DecodePlan, Exchange, Split
from mllm.kernels.flash import LOG2E
from mllm.kernels.hopper import descriptor, multiprocessors
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.persistent_attend import SECTOR, attend, fill_context, merge, place, slots_of, span_of
from mllm.kernels.ring import INPUTS, OUTPUTS, WARPS, WIDTH
from mllm.kernels.words import pack, send, unpack
from mllm.weights import Stacks

STAGES = 6
"""Stages of the ring: what shared memory has room for beside attention."""
NEAR = gl.constexpr(2)
"""Tiles that are on their way around attention, where programs wait for each other most."""
FAR = gl.constexpr(3)
"""Tiles that are on their way elsewhere: enough to read memory at its full rate."""
ALONE = gl.constexpr(9)
"""Tiles on their way of programs that have more of the residual stream than most, while the others wait for them."""

RUN = 32
"""Tokens of a context that are copied at once, where pages are made of such."""
SPLITS = 16
"""Splits of a context, at most."""
TOKENS = 2**14
"""Tokens of a row up to which this is as fast as the chain of kernels."""


@gluon.constexpr_function
def _more(E, programs):
    """How many tiles are on their way of those of the residual stream that a program has after its first."""
    return (ALONE if E // OUTPUTS.value % programs < programs // 2 else FAR).value


@gluon.jit
def _produce(
    boxes, weights, around, layers, C: gl.constexpr, E: gl.constexpr, A: gl.constexpr, F: gl.constexpr, V: gl.constexpr,
    D: gl.constexpr, S: gl.constexpr, SPLITS: gl.constexpr, TILE: gl.constexpr, PROGRAMS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The warp that copies, in the order in which `_consume` will ask."""
    qkv, out, gate_up, down, head, keys, values = boxes
    _, pages, lengths = around
    K: gl.constexpr = (C - A) // (2 * D)
    MORE: gl.constexpr = _more(E, PROGRAMS)
    by: gl.constexpr = PROGRAMS * OUTPUTS
    first, last = gl.program_id(0) * OUTPUTS, _last()
    step = 0
    for n in range(last, C, by):
        step = ring.fill(qkv, n, E, weights, step, NEAR)
    wait(PDL)
    RUN: gl.constexpr = keys.block_shape[0]
    span = span_of(gl.load(lengths), K, SPLITS, TILE, RUN)
    slots = slots_of(pages, span[0], span[1], S, TILE, RUN)
    for layer in range(layers):
        row = layer * (keys.shape[0] // layers)
        step = fill_context((keys, values), pages, slots, span, row, weights, step, FAR, K, D, S)
        for n in range(first, E, by):
            step = ring.fill(out, layer * E + n, A, weights, step, gl.where(n == first, NEAR, MORE))
        for n in range(last, F, by):
            step = ring.fill(gate_up, layer * 2 * F + n, E, weights, step, FAR)
            step = ring.fill(gate_up, layer * 2 * F + F + n, E, weights, step, FAR)
        for n in range(first, E, by):
            step = ring.fill(down, layer * E + n, F, weights, step, gl.where(n == first, FAR, MORE))
        following = layer + 1
        for n in range(last, gl.where(following < layers, C, 0), by):
            step = ring.fill(qkv, following * C + n, E, weights, step, NEAR)
    for n in range(first, V, by):
        step = ring.fill(head, n, E, weights, step, FAR)


@gluon.jit
def _last():
    """The first outputs of a program where tiles are dealt out from the last program on: who has more of the residual
    stream than others then has less of what comes before it."""
    return (gl.num_programs(0) - 1 - gl.program_id(0)) * OUTPUTS


@gluon.jit
def _projected(weights, pieces, scales, squares, y, step, turn, eps, N: gl.constexpr, K: gl.constexpr, T: gl.constexpr):
    """norm(x) @ w.T, sent to `y`."""
    xs = ring.factors(ring.put_scaled(pieces, scales, squares, T), 0, K // WIDTH, T)
    for n in range(_last(), N, gl.num_programs(0) * OUTPUTS):
        acc, step = ring.dot(weights, xs, step)
        even, odd = ring.total(ring.share(acc))
        root = ring.root(squares, K, eps)
        send(ring.pairs_at(y, n), pack(even * root, odd * root, T), turn)
    return step


@gluon.jit
def _gated(weights, pieces, scales, squares, y, step, turn, eps, N: gl.constexpr, K: gl.constexpr, T: gl.constexpr):
    """silu(gate) * up of norm(x), sent to `y`."""
    xs = ring.factors(ring.put_scaled(pieces, scales, squares, T), 0, K // WIDTH, T)
    for n in range(_last(), N, gl.num_programs(0) * OUTPUTS):
        gate, step = ring.dot(weights, xs, step)
        up, step = ring.dot(weights, xs, step)
        gates, ups = ring.share(gate), ring.share(up)
        root = ring.root(squares, K, eps)
        even, odd = ring.total(gates)
        even_up, odd_up = ring.total(ups)
        even *= root
        odd *= root
        even = even / (1 + gl.exp(-even)) * (even_up * root)
        odd = odd / (1 + gl.exp(-odd)) * (odd_up * root)
        send(ring.pairs_at(y, n), pack(even, odd, T), turn)
    return step


@gluon.jit
def _added(weights, x, stream, y, step, turn, N: gl.constexpr, K: gl.constexpr, T: gl.constexpr):
    """x @ w.T, of an x that is sent, added to this program's part of the residual stream, which is sent to `y`."""
    xs = ring.put(ring.receive_vector(x, turn, K))
    by = gl.num_programs(0) * OUTPUTS
    for n in range(gl.program_id(0) * OUTPUTS, N, by):
        acc, step = ring.dot_long(weights, xs, step, K, T)
        even, odd = ring.total(ring.share(acc))
        evens, odds = stream.index(2 * (n // by)), stream.index(2 * (n // by) + 1)
        even += evens.load(ring.results())
        odd += odds.load(ring.results())
        send(ring.pairs_at(y, n), pack(even, odd, T), turn)
        evens.store(even)
        odds.store(odd)
    return step


@gluon.jit
def _started(x, stream, E: gl.constexpr, T: gl.constexpr):
    """This program's part of the residual stream, from x [E]."""
    by = gl.num_programs(0) * OUTPUTS
    x = x.to(gl.pointer_type(gl.int32), bitcast=True)
    for n in range(gl.program_id(0) * OUTPUTS, E, by):
        even, odd = unpack(gl.load(ring.pairs_at(x, n)), T)
        stream.index(2 * (n // by)).store(even)
        stream.index(2 * (n // by) + 1).store(odd)


@gluon.jit
def _heard(x, start, turn, wanted, E: gl.constexpr):
    """x [E] in pieces, that others send; where it is not wanted, that which the step begins with."""
    if wanted:
        pieces = ring.receive_vector(x, turn, E)
    else:
        pieces = ring.read(start, E)
    return pieces


@gluon.jit
def _logits(weights, pieces, scales, squares, y, step, eps, N: gl.constexpr, K: gl.constexpr, T: gl.constexpr):
    """norm(x) @ w.T, to `y` f32 [N]."""
    xs = ring.factors(ring.put_scaled(pieces, scales, squares, T), 0, K // WIDTH, T)
    for n in range(gl.program_id(0) * OUTPUTS, N, gl.num_programs(0) * OUTPUTS):
        acc, step = ring.dot(weights, xs, step)
        even, odd = ring.total(ring.share(acc))
        root = ring.root(squares, K, eps)
        at = y + n + 2 * gl.arange(0, OUTPUTS // 2, ring.results())
        gl.store(at, even * root)
        gl.store(at + 1, odd * root)


@gluon.jit
def _consume(
    weights, vectors, norms, rotary, pool, around, layers, eps, scale, C: gl.constexpr, E: gl.constexpr,
    A: gl.constexpr, F: gl.constexpr, V: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr, TILE: gl.constexpr,
    RUN: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warps that compute."""
    start, words, logits = vectors
    norm_in, q_norm, k_norm, norm_mlp, norm_out = norms
    keys, values, across = pool
    slots, _, lengths = around
    T: gl.constexpr = start.dtype.element_ty
    H: gl.constexpr = A // D
    K: gl.constexpr = (C - A) // (2 * D)
    OWN: gl.constexpr = (E + PROGRAMS * OUTPUTS - 1) // (PROGRAMS * OUTPUTS)
    x, mid, heads, gated, qkv = words, words + E // 2, words + E, words + E + A // 2, words + E + A // 2 + F // 2
    parts = qkv + C // 2
    sums = parts + SPLITS * A // 2
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    squares = gl.allocate_shared_memory(gl.float32, [WARPS], flat)
    stream = gl.allocate_shared_memory(gl.float32, [2 * OWN, OUTPUTS // 2], flat)
    program = gl.program_id(0)
    _, split = place(K)
    # a program without a tile of a product must not ask for what goes into it: others would not know when it has read that
    projects, adds, gates = _last() < C, program * OUTPUTS < E, _last() < F
    step = 0
    wait(PDL)
    _started(start, stream, E, T)
    rotary, slot = attend_one.turns(rotary[0], rotary[1], D, WARPS), gl.load(slots)
    begin, end, live = span_of(gl.load(lengths), K, SPLITS, TILE, RUN)
    for layer in range(layers):
        turn = layer + 1
        scales = ring.read(norm_in + layer * E, E)
        pieces = _heard(x, start, layer, projects & (layer > 0), E)
        head_norms = attend_one.norms(q_norm + layer * D, k_norm + layer * D, H // K, D, WARPS)
        step = _projected(weights, pieces, scales, squares, qkv, step, turn, eps, C, E, T)
        if split < live:
            at = layer.to(gl.int64) * across  # type: ignore[attr-defined]
            step = attend(
                weights, step, qkv, parts, sums, head_norms, rotary, (keys + at, values + at), slot, end - begin, turn,
                scale, eps, H, K, D, TILE, T,
            )  # fmt: skip
        if split < SPLITS:
            merge(parts, sums, heads, live, turn, H, K, D, SPLITS, T)
        if adds:
            step = _added(weights, heads, stream, mid, step, turn, E, A, T)
        scales = ring.read(norm_mlp + layer * E, E)
        pieces = _heard(mid, start, turn, gates, E)
        step = _gated(weights, pieces, scales, squares, gated, step, turn, eps, F, E, T)
        if adds:
            step = _added(weights, gated, stream, x, step, turn, E, F, T)
    scales = ring.read(norm_out, E)
    pieces = ring.receive_vector(x, layers, E)
    _logits(weights, pieces, scales, squares, logits, step, eps, V, E, T)


@gluon.jit
def persistent_kernel(
    qkv, out, gate_up, down, head, key_box, value_box, vectors, norms, rotary, pool, around, layers, eps, scale,
    C: gl.constexpr, E: gl.constexpr, A: gl.constexpr, F: gl.constexpr, V: gl.constexpr, D: gl.constexpr,
    S: gl.constexpr, SPLITS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Weights by descriptors of [L*n K], keys and values by those of [L*P*S K*D]; vectors: (x [E], words that are all 0,
    logits f32 [V]); norms: norm_in, q_norm, k_norm, norm_mlp [L n] and that before the head; rotary: cos, sin [D/2];
    pool: keys, values [L P S K D] and how far apart its layers are; around: slots, pages, lengths of the batch.

    All PROGRAMS must be on the chip at once, as they wait for each other.
    """
    launch_dependents(PDL)
    weights = ring.new_ring(qkv, STAGES)
    boxes = qkv, out, gate_up, down, head, key_box, value_box  # which a launch does not take as a tuple
    gl.warp_specialize([
        (_consume, (weights, vectors, norms, rotary, pool, around, layers, eps, scale, C, E, A, F, V, D, SPLITS, TILE,
                    key_box.block_shape[0], PROGRAMS, PDL)),
        (_produce, (boxes, weights, around, layers, C, E, A, F, V, D, S, SPLITS, TILE, PROGRAMS, PDL)),
    ], [1], [40])  # fmt: skip


def exchange_for(config: TextConfig, tokens: int, device: torch.device) -> Exchange:
    """The words and the split of a step whose row has at most so many tokens."""
    size = config.sizes
    split = split_for(tokens, size["H"], size["K"])
    vectors = 2 * size["E"] + size["A"] + size["F"] + size["C"]
    count = vectors // 2 + split.splits * (size["A"] // 2 + SECTOR.value * size["H"])
    return Exchange(words=torch.zeros(count, dtype=torch.int64, device=device), split=split)


def split_for(tokens: int, heads: int, kv_heads: int) -> Split:
    """How a context of at most so many tokens is shared out; what was fastest on an H200."""
    tile = 64 if tokens <= 512 else 128
    splits = max(4, heads // kv_heads, triton.next_power_of_2(triton.cdiv(tokens, tile)))
    return Split(min(splits, SPLITS), tile, WARPS.value, 0)


def fits(config: TextConfig, tokens: int, page_size: int, dtype: torch.dtype, programs: int) -> bool:
    """Whether the kernel takes a decoder, and rows of at most so many tokens, on a chip with so many multiprocessors."""
    size = config.sizes
    split = split_for(tokens, size["H"], size["K"])
    return (
        dtype == torch.bfloat16
        and size["D"] in (64, 128)
        and size["H"] // size["K"] in (1, 2, 4, 8)
        and tokens <= TOKENS
        and page_size % OUTPUTS.value == 0
        and size["K"] * split.splits <= programs
        and all(size[name] % WIDTH.value == 0 for name in "EAF")
        and all(size[name] % OUTPUTS.value == 0 for name in "CV")
        and size["F"] <= 2**14  # for which shared memory has room
    )


def logits(
    x: Tensor, stacks: Stacks, norm: Tensor, head: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan,
    exchange: Exchange, *, eps: float, pdl: bool,
) -> Tensor:  # fmt: skip
    """All layers, whose weights lie in stacks, and the head for x [1 E]: logits f32 [1 V]; writes the new keys and
    values [L P S K D] at the plan's slots.

    The exchange serves once: its words have to be 0.
    """
    _, _, page_size, _, size = keys.shape
    layers, columns, width = stacks.qkv.shape
    y = x.new_empty(1, len(head), dtype=torch.float32)
    matrices = stacks.qkv, stacks.out, stacks.gate_up, stacks.down, head
    weights = (descriptor(w.flatten(0, -2), OUTPUTS.value, INPUTS.value) for w in matrices)
    run = math.gcd(page_size, RUN)
    pool = (descriptor(held.flatten(3).flatten(0, 2), run, INPUTS.value) for held in (keys, values))
    programs = multiprocessors(x.device)
    persistent_kernel[(programs,)](
        *weights, *pool, (x, exchange.words, y),
        (stacks.norm_in, stacks.q_norm, stacks.k_norm, stacks.norm_mlp, norm), (plan.cos, plan.sin),
        (keys, values, keys.stride(0)), (plan.slots, plan.pages, plan.lengths), layers, eps, size**-0.5 * LOG2E,
        C=columns, E=width, A=stacks.out.shape[2], F=stacks.down.shape[2], V=len(head), D=size, S=page_size,
        SPLITS=exchange.split.splits, TILE=exchange.split.tile, STAGES=STAGES, PROGRAMS=programs, num_warps=WARPS.value,
        launch_cooperative_grid=True, **options(pdl),
    )  # fmt: skip
    return y
