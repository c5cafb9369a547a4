"""What `tall` does with 64 rows of a product before they are written: bias, GELU, gate, rotation, keys to their slots.

Each is a kernel less, and a trip of all outputs to memory and back.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mllm.kernels import flash, tall_tiles
from mllm.kernels.hopper import lines, mma, nothing

LOG2E, HEAD = gl.constexpr(flash.LOG2E), gl.constexpr(tall_tiles.HEAD)


@gluon.constexpr_function
def waits(END):
    """Whether what `begin` or `meanwhile` load is of kernels before this one."""
    return END in ("add", "bias_add", "scale", "turn", "heads")


@gluon.constexpr_function
def _columns(accs):
    return sum(acc.shape[1] for acc in accs)


@gluon.jit
def begin(ws, end, m, firsts, M, N, END: gl.constexpr):
    """What the products of each piece are added to [64 n]: the stream, the last of `end` [M N], the bias, its first [N], or
    nothing. They are on their way while the first tiles are."""
    accs = ()
    for j in gl.static_range(len(ws)):
        acc = nothing(ws[j].shape[1])
        if END == "add" or END == "bias_add" or END == "scale":
            acc = _there(end[-1], m, firsts[j], M, N, ws[j].shape[1])
        if END != "plain" and END != "add" and END != "scale" and END != "gate" and END != "heads":
            acc += _row(acc, end[0], firsts[j], N)[None, :]
        accs += (acc,)  # type: ignore[assignment]
    return accs


@gluon.jit
def _there(x, m, n0, M, N, BN: gl.constexpr):
    layout: gl.constexpr = mma(BN)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    c = n0 + gl.arange(0, BN, gl.SliceLayout(0, layout))
    at = x + r.to(gl.int64)[:, None] * N + c[None, :]
    return gl.load(at, mask=(r < M)[:, None] & (c < N)[None, :], other=0.0).to(gl.float32)


@gluon.jit
def _row(acc, x, n0, N):
    """The numbers of x [N] from n0 on, as many as acc [64 BN] has columns and laid out as they are."""
    c = n0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    return gl.load(x + c, mask=c < N, other=0.0).to(gl.float32)


AHEAD = gl.constexpr(192)
"""Columns of a tile up to which there are registers for what its end takes from its beginning on."""


@gluon.jit
def meanwhile(accs, end, m, firsts, M, N, END: gl.constexpr, SIZE: gl.constexpr):
    """What `finish` takes for each piece beside `end`, loaded while products are made: what a norm multiplies by, cos and
    sin of its pairs, or what is around a head. Of tiles of more than AHEAD columns no more than the first of those."""
    ahead: gl.constexpr = _columns(accs) <= AHEAD
    coming = ()
    for j in gl.static_range(len(accs)):
        if END == "scale":
            coming += (_row(accs[j], end[0], firsts[j], N),)  # type: ignore[assignment]
        elif END == "turn" and ahead:
            coming += (_angles(accs[j], end, m, firsts[j], M, SIZE),)  # type: ignore[assignment]
        elif END == "heads" and ahead:
            coming += (_around(accs[j], end, m, firsts[j] // HEAD, M) + (_slots(accs[j], end, m, M),),)  # type: ignore[assignment]
        else:
            coming += ((),)  # type: ignore[assignment]
    return coming


@gluon.jit
def finish(accs, coming, y, end, m, firsts, M, N, dtype: gl.constexpr, END: gl.constexpr, SIZE: gl.constexpr):
    """Write the pieces accs [64 n] of the rows from m on, whose columns begin at firsts, to y [M N] as END has it; `coming`
    as `meanwhile` has it; SIZE: that of the heads to "turn"."""
    if END == "gate":
        for j in gl.static_range(len(accs)):
            gate, up = _halves(accs[j])
            _store(gate * up * _sigmoid(gate * LOG2E), y, m, firsts[j], M, N, dtype)
    elif END == "heads":
        for j in gl.static_range(len(accs)):
            _write_heads(accs[j], coming[j], y, end, m, firsts[j], M, dtype)
    elif END == "scale":
        for j in gl.static_range(len(accs)):
            sums = firsts[0] // _columns(accs) * len(accs) + j
            _store_scaled(accs[j], coming[j], y, end, sums, m, firsts[j], M, N, dtype)
    else:
        for j in gl.static_range(len(accs)):
            _finish(accs[j], coming[j], y, end, m, firsts[j], M, N, dtype, END, SIZE)


@gluon.jit
def _finish(acc, coming, y, end, m, n0, M, N, dtype: gl.constexpr, END: gl.constexpr, SIZE: gl.constexpr):
    """The same of one piece, in halves where all of it would take too many registers."""
    greedy: gl.constexpr = END == "gelu_none" or (END == "turn" and len(coming) == 0)
    if acc.shape[1] > (64 if greedy else 128):
        left, right = _halves(acc)
        _finish(left, coming, y, end, m, n0, M, N, dtype, END, SIZE)
        _finish(right, coming, y, end, m, n0 + left.shape[1], M, N, dtype, END, SIZE)
    else:
        if END == "gelu_none":
            acc *= _normal(acc)
        elif END == "gelu_tanh":
            acc = _gelu(acc)
        elif END == "turn":
            acc = _turned(acc, coming, end, m, n0, M, SIZE)
        _store(acc, y, m, n0, M, N, dtype)


@gluon.jit
def _inverse(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sigmoid(x):
    """1 / (1 + 2^-x), by two instructions of the unit for such functions: a division takes ten others."""
    return _inverse(1.0 + gl.exp2(-x))


@gluon.jit
def _gelu(x):
    """x * (1 + tanh(u)) / 2 for u = sqrt(2 / pi) * (x + 0.044715 * x**3), by one instruction of that unit: to 3e-4 |x|."""
    u = x * (0.7978845608028654 + 0.03567740813636141 * x * x)
    t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True, pack=1)
    return 0.5 * x + 0.5 * x * t


@gluon.jit
def _normal(x):
    """The share of a normal distribution below x, to 1e-7: Abramowitz and Stegun, 7.1.26."""
    u = gl.abs(x) * 0.7071067811865476
    t = _inverse(1.0 + 0.3275911 * u)
    p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    beyond = 0.5 * p * gl.exp2(u * u * -1.4426950408889634)
    return gl.where(x < 0, beyond, 1.0 - beyond)


@gluon.jit
def _halves(acc):
    """The first and the last columns of acc [64 BN]."""
    return gl.split(gl.permute(gl.reshape(acc, [64, 2, acc.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def _pieces(acc, WIDTH: gl.constexpr):
    """acc [64 BN] in pieces of so many columns at most, which are laid out anew in the same shared memory, one by one."""
    if acc.shape[1] <= WIDTH:
        pieces = (acc,)
    else:
        left, right = _halves(acc)
        pieces = _pieces(left, WIDTH) + _pieces(right, WIDTH)
    return pieces


@gluon.jit
def _store(acc, y, m, n0, M, N, dtype: gl.constexpr):
    """acc [64 BN] to the rows from m and the columns from n0 on of y [M N]."""
    pieces = _pieces(acc, 128)
    BN: gl.constexpr = pieces[0].shape[1]
    layout: gl.constexpr = lines(BN)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    for i in gl.static_range(len(pieces)):
        c = n0 + i * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
        out = gl.convert_layout(pieces[i].to(dtype), layout)
        gl.store(y + r.to(gl.int64)[:, None] * N + c[None, :], out, mask=(r < M)[:, None] & (c < N)[None, :])


@gluon.jit
def _store_scaled(acc, weight, y, end, sums, m, n0, M, N, dtype: gl.constexpr):
    """acc [64 BN] to y [M N], as `_store`, and what RMSNorm of it will be made of; end: (the norm's weight, scaled [M N],
    squares f32 [n M], x). Times its part of that weight [BN] it goes to `scaled`, and each row's sum of squares to
    `squares[sums]`."""
    _, scaled, squares, _ = end
    layout: gl.constexpr = acc.type.layout
    acc = acc.to(dtype).to(gl.float32)  # what is normalised is what the next layer adds to
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    gl.store(squares + sums * M + r, gl.sum(acc * acc, 1), mask=r < M)
    _store(acc, y, m, n0, M, N, dtype)
    _store(acc * weight[None, :], scaled, m, n0, M, N, dtype)


@gluon.jit
def squares_of(norm, m, M, P: gl.constexpr):
    """The sums of squares [64 P] of the rows from m on, on their way; norm: (squares f32 [n M], n, eps)."""
    squares, n, _ = norm
    layout: gl.constexpr = gl.BlockedLayout([1, P // 2], [16, 2], [4, 1], [1, 0])
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    i = gl.arange(0, P, gl.SliceLayout(0, layout))
    return gl.load(squares + i[None, :] * M + r[:, None], mask=(r < M)[:, None] & (i < n)[None, :], other=0.0)


@gluon.jit
def normalised(accs, sums, norm, K):
    """accs, the products of K inputs of rows whose squares have these sums, by RMSNorm of those rows."""
    factor = gl.rsqrt(gl.sum(sums, 1) / K + norm[2])
    out = ()
    for j in gl.static_range(len(accs)):
        out += (accs[j] * gl.convert_layout(factor, gl.SliceLayout(1, accs[j].type.layout))[:, None],)  # type: ignore[assignment]
    return out


@gluon.jit
def _pairs(acc):
    """The numbers [64 BN/2] of acc [64 BN] that are rotated with each other, which are neighbours."""
    return gl.split(gl.reshape(acc, [64, acc.shape[1] // 2, 2]))


@gluon.jit
def _angles(acc, end, m, n0, M, SIZE: gl.constexpr):
    """(cos, sin) [64 BN/2] of the pairs of acc [64 BN], whose columns begin at n0: of queries and keys from `end`, as
    `_turned` has it, and of values those of no angle."""
    _, cos, sin, _, H = end
    HALF: gl.constexpr = SIZE // 2
    a, _ = _pairs(acc)
    layout: gl.constexpr = a.type.layout
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    p = n0 // 2 + gl.arange(0, a.shape[1], gl.SliceLayout(0, layout))
    at = r[:, None] * HALF + (p % HALF)[None, :]
    turns = (r < M)[:, None] & (p < 2 * H * HALF)[None, :]
    return gl.load(cos + at, mask=turns, other=1.0), gl.load(sin + at, mask=turns, other=0.0)


@gluon.jit
def _turned(acc, angles, end, m, n0, M, SIZE: gl.constexpr):
    """acc [64 BN] rotated by heads of SIZE, whose first H are queries, times scale, the next H keys, and the others left
    alone; end: (bias, cos, sin f32 [M SIZE/2], scale, H)."""
    _, _, _, scale, H = end
    a, b = _pairs(acc)
    if len(angles) == 0:
        c, s = _angles(acc, end, m, n0, M, SIZE)
    else:
        c, s = angles
    p = n0 // 2 + gl.arange(0, a.shape[1], gl.SliceLayout(0, a.type.layout))
    times = gl.where(p < H * (SIZE // 2), scale, 1.0)[None, :]
    return gl.reshape(gl.join((a * c - b * s) * times, (b * c + a * s) * times), [64, acc.shape[1]])


@gluon.jit
def _write_heads(acc, coming, q, end, m, n0, M, dtype: gl.constexpr):
    """acc [64 BN], one head or two, the first of which begins at column n0."""
    if acc.shape[1] > HEAD:
        first, second = _halves(acc)
        _write_head(first, coming, q, end, m, n0 // HEAD, M, dtype)
        _write_head(second, coming, q, end, m, n0 // HEAD + 1, M, dtype)
    else:
        _write_head(acc, coming, q, end, m, n0 // HEAD, M, dtype)


@gluon.jit
def _around(acc, end, m, h, M):
    """What acc [64 D], head h of 64 tokens, is normalised and rotated by: the norm's weight in halves [D/2], and cos and
    sin [64 D/2]."""
    q_norm, k_norm, cos, sin, _, _, _, _, _, H, _ = end
    HALF: gl.constexpr = acc.shape[1] // 2
    a, _ = _halves(acc)
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
def _slots(acc, end, m, M):
    """Where the keys and values of 64 tokens go [64]."""
    r = m + gl.arange(0, 64, gl.SliceLayout(1, lines(acc.shape[1])))
    return gl.load(end[4] + r, mask=r < M, other=0)


@gluon.jit
def _write_head(acc, coming, q, end, m, h, M, dtype: gl.constexpr):
    """acc [64 D], head h of 64 tokens. One of the first H is a query: normalised, rotated and scaled it goes to q [M H D].
    The next K are keys, normalised and rotated, and the others values; they go to slots [M] of their pools [slots K D].

    end: (q_norm, k_norm, cos, sin f32 [M D/2], slots, keys, values, scale, eps, H, K).
    """
    _, _, _, _, _, keys, values, scale, eps, H, K = end
    D: gl.constexpr = acc.shape[1]
    if h < H + K:
        a, b = _halves(acc)
        factor = gl.rsqrt(gl.sum(a * a + b * b, 1) / D + eps)[:, None]
        if len(coming) == 0:
            a_norm, b_norm, c, s = _around(acc, end, m, h, M)
        else:
            a_norm, b_norm, c, s = coming[0], coming[1], coming[2], coming[3]
        a *= factor * a_norm.to(gl.float32)[None, :]
        b *= factor * b_norm.to(gl.float32)[None, :]
        times = gl.where(h < H, scale, 1.0)
        pair = gl.join((a * c - b * s) * times, (b * c + a * s) * times)
        acc = gl.convert_layout(gl.reshape(gl.permute(pair, [0, 2, 1]), [64, D]), acc.type.layout)
    layout: gl.constexpr = lines(D)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    inside = (r < M)[:, None] & (h < H + 2 * K)  # a piece of two heads may begin with the last
    if len(coming) == 0:
        slot = _slots(acc, end, m, M)
    else:
        slot = coming[4]
    at = (slot * K + (h - H) % K)[:, None] * D + d[None, :]
    out = gl.convert_layout(acc.to(dtype), layout)
    if h < H:
        gl.store(q + (r.to(gl.int64) * H + h)[:, None] * D + d[None, :], out, mask=inside)
    elif h < H + K:
        gl.store(keys + at, out, mask=inside)
    else:
        gl.store(values + at, out, mask=inside)
