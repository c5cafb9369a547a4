"""What `tall` does with heads where they are made: an encoder's are turned, a decoder's normalised, turned, and its keys and
values put in their slots."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mllm.kernels import tall_tiles
from mllm.kernels.hopper import halves, lines

HEAD = gl.constexpr(tall_tiles.HEAD)


@gluon.constexpr_function
def whole(columns, size):
    """Whether so many columns are a number of heads, so that those after them have the same angles."""
    return columns % size == 0


@gluon.constexpr_function
def _run(columns, size):
    """Pairs side by side in `columns` whose angles are: of a whole head, or the power of two that heads begin at."""
    half = size // 2
    return half if whole(columns, size) else min(half & -half, 4)


@gluon.jit
def as_turned(acc, SIZE: gl.constexpr):
    """acc [64 BN] laid out to be turned: as a product lies where the heads are whole, and else as it is written, so that a
    thread loads the angles of neighbours at once, as there are those of each head to load."""
    if not whole(acc.shape[1], SIZE):
        acc = gl.convert_layout(acc, lines(acc.shape[1]))
    return acc


@gluon.jit
def _pairs(acc, SIZE: gl.constexpr):
    """The numbers [64 runs n] of acc [64 BN] that are rotated with each other, which are neighbours: runs of n pairs."""
    RUN: gl.constexpr = _run(acc.shape[1], SIZE)
    return gl.split(gl.reshape(acc, [64, acc.shape[1] // 2 // RUN, RUN, 2]))


@gluon.jit
def _rotated(a, b, c, s, times):
    """The pairs (a, b) turned by the angle of (c, s), times `times`, side by side."""
    return gl.join((a * c - b * s) * times, (b * c + a * s) * times)


@gluon.jit
def _place(a, n0, WHOLE: gl.constexpr, RUNS: gl.constexpr):
    """(pair, i) of the first RUNS runs [64 runs n] of a, whose columns begin at n0: which pair of all each one is, or of
    heads that are not WHOLE only the first of each run, which is in one head; and its place in the run."""
    layout: gl.constexpr = a.type.layout
    run = gl.arange(0, RUNS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    i = gl.arange(0, a.shape[2], gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    pair = n0 // 2 + (run * a.shape[2])[None, :, None]
    if WHOLE:  # n0 may be within a head
        pair += i
    return pair, i


@gluon.jit
def angles_of(acc, operands, m, n0, M, SIZE: gl.constexpr):
    """(cos, sin) [64 runs n] of the pairs of acc [64 BN], laid out `as_turned`, whose columns begin at n0, from `operands`
    as `turned` has them: of whole heads [64 1 n], of the first for all. Where that is one of values they have no angle."""
    _, cos, sin, _, H = operands
    HALF: gl.constexpr = SIZE // 2
    WHOLE: gl.constexpr = whole(acc.shape[1], SIZE)
    a, _ = _pairs(acc, SIZE)
    RUN: gl.constexpr = a.shape[2]
    r = m + gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, a.type.layout)))
    pair, i = _place(a, n0, WHOLE, 1 if WHOLE else a.shape[1])
    at = pair % HALF if WHOLE else pair // RUN % (HALF // RUN) * RUN + i  # in which the compiler sees neighbours
    at += r[:, None, None] * HALF
    turns = (r < M)[:, None, None] & (pair < 2 * H * HALF)
    return gl.load(cos + at, mask=turns, other=1.0), gl.load(sin + at, mask=turns, other=0.0)


@gluon.jit
def turned(acc, angles, operands, m, n0, M, SIZE: gl.constexpr):
    """acc [64 BN], laid out `as_turned`, rotated by heads of SIZE, whose first H are queries, times scale, the next H keys,
    and the others left alone; operands: (bias, cos, sin f32 [M SIZE/2], scale, H)."""
    _, _, _, scale, H = operands
    HALF: gl.constexpr = SIZE // 2
    a, b = _pairs(acc, SIZE)
    if len(angles) == 0:
        c, s = angles_of(acc, operands, m, n0, M, SIZE)
    else:
        c, s = angles
    pair, _ = _place(a, n0, whole(acc.shape[1], SIZE), a.shape[1])
    if c.shape[1] < a.shape[1]:  # values may follow keys
        c = gl.where(pair < 2 * H * HALF, c, 1.0)
        s = gl.where(pair < 2 * H * HALF, s, 0.0)
    return gl.reshape(_rotated(a, b, c, s, gl.where(pair < H * HALF, scale, 1.0)), [64, acc.shape[1]])


@gluon.jit
def write_heads(acc, coming, q, operands, m, n0, M, dtype: gl.constexpr):
    """acc [64 BN], one head or two, the first of which begins at column n0; coming: what `around` and `slots_of` have of the
    one, or nothing."""
    if acc.shape[1] > HEAD:
        first, second = halves(acc)
        _write_head(first, coming, q, operands, m, n0 // HEAD, M, dtype)
        _write_head(second, coming, q, operands, m, n0 // HEAD + 1, M, dtype)
    else:
        _write_head(acc, coming, q, operands, m, n0 // HEAD, M, dtype)


@gluon.jit
def around(acc, operands, m, h, M):
    """What acc [64 D], head h of 64 tokens, is normalised and rotated by: the norm's weight in halves [D/2], and cos and
    sin [64 D/2]."""
    q_norm, k_norm, cos, sin, _, _, _, _, _, H, _ = operands
    HALF: gl.constexpr = acc.shape[1] // 2
    a, _ = halves(acc)
    layout: gl.constexpr = a.type.layout
    norm = k_norm
    if h < H:
        norm = q_norm
    i = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    at = r[:, None] * HALF + i[None, :]
    c = gl.load(cos + at, mask=(r < M)[:, None], other=0.0)
    s = gl.load(sin + at, mask=(r < M)[:, None], other=0.0)
    return gl.load(norm + i), gl.load(norm + HALF + i), c, s


@gluon.jit
def slots_of(acc, operands, m, M):
    """Where the keys and values of 64 tokens go [64]."""
    r = m + gl.arange(0, 64, gl.SliceLayout(1, lines(acc.shape[1])))
    return gl.load(operands[4] + r, mask=r < M, other=0)


@gluon.jit
def _write_head(acc, coming, q, operands, m, h, M, dtype: gl.constexpr):
    """acc [64 D], head h of 64 tokens. One of the first H is a query: normalised, rotated and scaled it goes to q [M H D].
    The next K are keys, normalised and rotated, and the others values; they go to slots [M] of their pools [slots K D].

    operands: (q_norm, k_norm, cos, sin f32 [M D/2], slots, keys, values, scale, eps, H, K).
    """
    _, _, _, _, _, keys, values, scale, eps, H, K = operands
    D: gl.constexpr = acc.shape[1]
    if h < H + K:
        a, b = halves(acc)
        factor = gl.rsqrt(gl.sum(a * a + b * b, 1) / D + eps)[:, None]
        if len(coming) == 0:
            a_norm, b_norm, c, s = around(acc, operands, m, h, M)
        else:
            a_norm, b_norm, c, s = coming[0]
        a *= factor * a_norm.to(gl.float32)[None, :]
        b *= factor * b_norm.to(gl.float32)[None, :]
        pair = _rotated(a, b, c, s, gl.where(h < H, scale, 1.0))
        acc = gl.convert_layout(gl.reshape(gl.permute(pair, [0, 2, 1]), [64, D]), acc.type.layout)
    layout: gl.constexpr = lines(D)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    inside = (r < M)[:, None] & (h < H + 2 * K)  # a piece of two heads may begin with the last
    if len(coming) == 0:
        slot = slots_of(acc, operands, m, M)
    else:
        slot = coming[1]
    at = (slot * K + (h - H) % K)[:, None] * D + d[None, :]
    out = gl.convert_layout(acc.to(dtype), layout)
    if h < H:
        gl.store(q + (r.to(gl.int64) * H + h)[:, None] * D + d[None, :], out, mask=inside)
    elif h < H + K:
        gl.store(keys + at, out, mask=inside)
    else:
        gl.store(values + at, out, mask=inside)
