"""What `tall` does with 64 rows of a product before they are written: bias, GELU, gate, rotation, keys to their slots.

Each is a kernel less, and a trip of all outputs to memory and back.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def finish(accs, y, end, m, firsts, M, N, dtype: gl.constexpr, END: gl.constexpr):
    """Write the pieces accs [64 n] of the rows from m on, whose columns begin at firsts, to y [M N] as END has it."""
    if END == "gate":  # the second half of the pieces is up
        HALF: gl.constexpr = len(accs) // 2
        for j in gl.static_range(HALF):
            _store(accs[j] * accs[HALF + j] / (1.0 + gl.exp(-accs[j])), y, m, firsts[j], M, N, dtype)
    elif END == "heads":
        for j in gl.static_range(len(accs)):
            _write_head(accs[j], y, end, m, firsts[j] // accs[j].shape[1], M, dtype)
    else:
        for j in gl.static_range(len(accs)):
            acc = accs[j]
            if END != "plain":
                acc = _biased(acc, end[0], firsts[j], N)
            if END == "gelu_none":
                acc = acc * 0.5 * (1.0 + gl.erf(acc * 0.7071067811865476))
            elif END == "gelu_tanh":  # x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))
                acc = acc / (1.0 + gl.exp(acc * (-1.5957691216057308 - 0.07135481627260025 * acc * acc)))
            elif END == "turn":
                acc = _turned(acc, end, m, firsts[j], M)
            _store(acc, y, m, firsts[j], M, N, dtype)


@gluon.jit
def _store(acc, y, m, n0, M, N, dtype: gl.constexpr):
    """acc [64 BN] to the rows from m and the columns from n0 on of y [M N]."""
    layout: gl.constexpr = _lines(acc.shape[1])
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    c = n0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    out = gl.convert_layout(acc.to(dtype), layout)
    gl.store(y + r.to(gl.int64)[:, None] * N + c[None, :], out, mask=(r < M)[:, None] & (c < N)[None, :])


@gluon.constexpr_function
def _lines(columns):
    """How four warps hold 64 rows to write 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def _biased(acc, bias, n0, N):
    c = n0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    return acc + gl.load(bias + c, mask=c < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _turned(acc, end, m, n0, M):
    """acc [64 BN] rotated by heads of 64, whose first H are queries, times scale, the next H keys, and the others left
    alone; end: (bias, cos, sin f32 [M 32], scale, H)."""
    _, cos, sin, scale, H = end
    COUNT: gl.constexpr = acc.shape[1] // 64
    a, b = gl.split(gl.permute(gl.reshape(acc, [64, COUNT, 2, 32]), [0, 1, 3, 2]))
    layout: gl.constexpr = a.type.layout
    m = m + gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    h = n0 // 64 + gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    i = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    at = m[:, None, None] * 32 + i[None, None, :]
    inside = (m < M)[:, None, None]
    turn = (h < 2 * H)[None, :, None]
    c = gl.where(turn, gl.load(cos + at, mask=inside, other=0.0), 1.0)
    s = gl.where(turn, gl.load(sin + at, mask=inside, other=0.0), 0.0)
    times = gl.where(h < H, scale, 1.0)[None, :, None]
    pair = gl.join((a * c - b * s) * times, (b * c + a * s) * times)
    return gl.reshape(gl.permute(pair, [0, 1, 3, 2]), [64, acc.shape[1]])


@gluon.jit
def _write_head(acc, q, end, m, h, M, dtype: gl.constexpr):
    """acc [64 D], head h of 64 tokens. One of the first H is a query: normalised, rotated and scaled it goes to q [M H D].
    The next K are keys, normalised and rotated, and the others values; they go to slots [M] of their pools [slots K D].

    end: (q_norm, k_norm, cos, sin f32 [M D/2], slots, keys, values, scale, eps, H, K).
    """
    q_norm, k_norm, cos, sin, slots, keys, values, scale, eps, H, K = end
    D: gl.constexpr = acc.shape[1]
    if h < H + K:
        acc = _turned_head(acc, q_norm, k_norm, cos, sin, gl.where(h < H, scale, 1.0), eps, m, h < H, M)
    layout: gl.constexpr = _lines(D)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    inside = (r < M)[:, None]
    slot = gl.load(slots + r, mask=r < M, other=0)
    at = (slot * K + (h - H) % K)[:, None] * D + d[None, :]
    out = gl.convert_layout(acc.to(dtype), layout)
    if h < H:
        gl.store(q + (r.to(gl.int64) * H + h)[:, None] * D + d[None, :], out, mask=inside)
    elif h < H + K:
        gl.store(keys + at, out, mask=inside)
    else:
        gl.store(values + at, out, mask=inside)


@gluon.jit
def _turned_head(acc, q_norm, k_norm, cos, sin, times, eps, m, query, M):
    """acc [64 D] normalised over the head, and rotated by halves."""
    D: gl.constexpr = acc.shape[1]
    HALF: gl.constexpr = D // 2
    a, b = gl.split(gl.permute(gl.reshape(acc, [64, 2, HALF]), [0, 2, 1]))
    layout: gl.constexpr = a.type.layout
    m = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    i = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    factor = gl.rsqrt(gl.sum(a * a + b * b, 1) / D + eps)[:, None]
    a *= factor * gl.where(query, gl.load(q_norm + i), gl.load(k_norm + i)).to(gl.float32)[None, :]
    b *= factor * gl.where(query, gl.load(q_norm + HALF + i), gl.load(k_norm + HALF + i)).to(gl.float32)[None, :]
    at = m[:, None] * HALF + i[None, :]
    c = gl.load(cos + at, mask=(m < M)[:, None], other=0.0)
    s = gl.load(sin + at, mask=(m < M)[:, None], other=0.0)
    pair = gl.join((a * c - b * s) * times, (b * c + a * s) * times)
    return gl.convert_layout(gl.reshape(gl.permute(pair, [0, 2, 1]), [64, D]), acc.type.layout)
