"""What `tall` does with 64 rows of a product before they are written: bias, GELU, gate, rotation, keys to their slots.

Each is a kernel less, and a trip of all outputs to memory and back.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mllm.kernels import flash, tall_tiles
from mllm.kernels.hopper import mma, nothing

LOG2E, HEAD = gl.constexpr(flash.LOG2E), gl.constexpr(tall_tiles.HEAD)


@gluon.constexpr_function
def adds(END):
    return END in ("add", "bias_add", "scale")


@gluon.constexpr_function
def _columns(accs):
    return sum(acc.shape[1] for acc in accs)


@gluon.jit
def begin(ws, end, m, firsts, M, N, END: gl.constexpr):
    """What the products of each piece are added to [64 n]: nothing, or where END `adds` what the last of `end`, [M N], has
    there. That is on its way while the first tiles are."""
    accs = ()
    for j in gl.static_range(len(ws)):
        if adds(END):
            accs += (_there(end[-1], m, firsts[j], M, N, ws[j].shape[1]),)  # type: ignore[assignment]
        else:
            accs += (nothing(ws[j].shape[1]),)  # type: ignore[assignment]
    return accs


@gluon.jit
def _there(x, m, n0, M, N, BN: gl.constexpr):
    layout: gl.constexpr = mma(BN)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    c = n0 + gl.arange(0, BN, gl.SliceLayout(0, layout))
    at = x + r.to(gl.int64)[:, None] * N + c[None, :]
    return gl.load(at, mask=(r < M)[:, None] & (c < N)[None, :], other=0.0).to(gl.float32)


@gluon.jit
def finish(accs, y, end, m, firsts, M, N, dtype: gl.constexpr, END: gl.constexpr):
    """Write the pieces accs [64 n] of the rows from m on, whose columns begin at firsts, to y [M N] as END has it."""
    if END == "gate":
        for j in gl.static_range(len(accs)):
            gate, up = _halves(accs[j])
            _store(gate * up * _sigmoid(gate * LOG2E), y, m, firsts[j], M, N, dtype)
    elif END == "heads":
        for j in gl.static_range(len(accs)):
            _write_heads(accs[j], y, end, m, firsts[j], M, dtype)
    elif END == "scale":
        for j in gl.static_range(len(accs)):
            sums = firsts[0] // _columns(accs) * len(accs) + j
            _store_scaled(accs[j], y, end, sums, m, firsts[j], M, N, dtype)
    else:
        for j in gl.static_range(len(accs)):
            acc = accs[j]
            if END != "plain" and END != "add":
                acc = _biased(acc, end[0], firsts[j], N)
            if END == "gelu_none":
                acc *= _normal(acc)
            elif END == "gelu_tanh":  # x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))
                acc *= _sigmoid(acc * (2.302208198295474 + 0.10294323969629199 * acc * acc))
            elif END == "turn":
                acc = _turned(acc, end, m, firsts[j], M)
            _store(acc, y, m, firsts[j], M, N, dtype)


@gluon.jit
def _inverse(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sigmoid(x):
    """1 / (1 + 2^-x), by two instructions of the unit for such functions: a division takes ten others."""
    return _inverse(1.0 + gl.exp2(-x))


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
    layout: gl.constexpr = _lines(BN)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    for i in gl.static_range(len(pieces)):
        c = n0 + i * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
        out = gl.convert_layout(pieces[i].to(dtype), layout)
        gl.store(y + r.to(gl.int64)[:, None] * N + c[None, :], out, mask=(r < M)[:, None] & (c < N)[None, :])


@gluon.jit
def _store_scaled(acc, y, end, sums, m, n0, M, N, dtype: gl.constexpr):
    """acc [64 BN] to y [M N], as `_store`, and what RMSNorm of it will be made of; end: (the norm's weight, scaled [M N],
    squares f32 [n M], x). Times that weight it goes to `scaled`, and each row's sum of squares to `squares[sums]`."""
    weight, scaled, squares, _ = end
    BN: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    acc = acc.to(dtype).to(gl.float32)  # what is normalised is what the next layer adds to
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    gl.store(squares + sums * M + r, gl.sum(acc * acc, 1), mask=r < M)
    _store(acc, y, m, n0, M, N, dtype)
    c = n0 + gl.arange(0, BN, gl.SliceLayout(0, layout))
    _store(acc * gl.load(weight + c, mask=c < N, other=0.0).to(gl.float32)[None, :], scaled, m, n0, M, N, dtype)


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
def _write_heads(acc, q, end, m, n0, M, dtype: gl.constexpr):
    """acc [64 BN], one head or two, the first of which begins at column n0."""
    if acc.shape[1] > HEAD:
        first, second = _halves(acc)
        _write_head(first, q, end, m, n0 // HEAD, M, dtype)
        _write_head(second, q, end, m, n0 // HEAD + 1, M, dtype)
    else:
        _write_head(acc, q, end, m, n0 // HEAD, M, dtype)


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
    inside = (r < M)[:, None] & (h < H + 2 * K)  # a piece of two heads may begin with the last
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
    norm = k_norm
    if query:
        norm = q_norm
    a *= factor * gl.load(norm + i).to(gl.float32)[None, :]
    b *= factor * gl.load(norm + HALF + i).to(gl.float32)[None, :]
    at = m[:, None] * HALF + i[None, :]
    c = gl.load(cos + at, mask=(m < M)[:, None], other=0.0)
    s = gl.load(sin + at, mask=(m < M)[:, None], other=0.0)
    pair = gl.join((a * c - b * s) * times, (b * c + a * s) * times)
    return gl.convert_layout(gl.reshape(gl.permute(pair, [0, 2, 1]), [64, D]), acc.type.layout)
