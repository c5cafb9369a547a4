"""The epilogues of `tall`: what is done with 64 rows of a product before they are written, like bias, GELU, gate, rotation
of heads, or keys to their slots.

Each is a kernel less, and a trip of all outputs to memory and back.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mllm.kernels import flash
from mllm.kernels.hopper import for_rows, halves, lines, mma, nothing
from mllm.kernels.tall_heads import HEAD, angles_of, around, as_turned, slots_of, turned, whole, write_heads

LOG2E = gl.constexpr(flash.LOG2E)


@gluon.constexpr_function
def _adds(EPILOGUE):
    return EPILOGUE in ("add", "bias_add", "scale", "measure")


@gluon.constexpr_function
def _biased(EPILOGUE):
    return EPILOGUE in ("bias", "bias_add", "gelu_none", "gelu_tanh", "turn", "measure")


@gluon.constexpr_function
def waits(EPILOGUE):
    """Whether what `begin` or `meanwhile` load is of kernels before this one."""
    return _adds(EPILOGUE) or EPILOGUE in ("turn", "heads")


@gluon.constexpr_function
def _columns(accs):
    return sum(acc.shape[1] for acc in accs)


@gluon.jit
def begin(ws, operands, m, firsts, M, N, EPILOGUE: gl.constexpr, NORM: gl.constexpr):
    """What the products of each piece are added to [64 n]: the stream, the last of `operands` [M N], the bias, their first
    [N], or nothing. They are on their way while the first tiles are. A product yet to be normalised gets its bias later."""
    accs = ()
    for j in gl.static_range(len(ws)):
        acc = nothing(ws[j].shape[1])
        if _adds(EPILOGUE):
            acc = _there(operands[-1], m, firsts[j], M, N, ws[j].shape[1])
        if _biased(EPILOGUE) and NORM == 0:
            acc += _row(acc, operands[0], firsts[j], N)[None, :]
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
"""Columns of a tile up to which there are registers for what its epilogue takes from its beginning on."""
AT_ONCE = gl.constexpr(128)
"""Columns of a piece whose epilogue is done at once: all of a wide one would take too many registers."""


@gluon.constexpr_function
def _at_once(EPILOGUE, SIZE):
    """AT_ONCE of an epilogue: half as many where it takes many registers, or is laid out anew as float32."""
    much = EPILOGUE == "gelu_none" or (EPILOGUE == "turn" and not whole(AT_ONCE.value, SIZE))
    return AT_ONCE.value // 2 if much else AT_ONCE.value


@gluon.jit
def _first_part(acc):
    """The part of acc [64 BN] that `_finish` comes to first, for its form."""
    if acc.shape[1] > AT_ONCE:
        part, _ = halves(acc)
    else:
        part = acc
    return part


@gluon.jit
def meanwhile(accs, operands, m, firsts, M, N, EPILOGUE: gl.constexpr, SIZE: gl.constexpr):
    """What `finish` takes for each piece beside `operands`, loaded while products are made: what a norm multiplies by, cos
    and sin of its pairs, or what is around a head. Of tiles of more than AHEAD columns no more than the first of those, and
    the second where that is one head's for all."""
    ahead: gl.constexpr = _columns(accs) <= AHEAD
    coming = ()
    for j in gl.static_range(len(accs)):
        if EPILOGUE == "scale":
            coming += (_row(accs[j], operands[0], firsts[j], N),)  # type: ignore[assignment]
        elif EPILOGUE == "turn" and (whole(AT_ONCE, SIZE) or (ahead and accs[j].shape[1] <= _at_once(EPILOGUE, SIZE))):
            part = as_turned(_first_part(accs[j]), SIZE)
            coming += (angles_of(part, operands, m, firsts[j], M, SIZE),)  # type: ignore[assignment]
        elif EPILOGUE == "heads" and ahead:
            found = around(accs[j], operands, m, firsts[j] // HEAD, M), slots_of(accs[j], operands, m, M)
            coming += (found,)  # type: ignore[assignment]
        else:
            coming += ((),)  # type: ignore[assignment]
    return coming


@gluon.jit
def finish(accs, coming, y, operands, m, firsts, M, N, dtype: gl.constexpr, EPILOGUE: gl.constexpr, SIZE: gl.constexpr):
    """Write the pieces accs [64 n] of the rows from m on, whose columns begin at firsts, to y [M N] as EPILOGUE has it;
    `coming` as `meanwhile` has it; SIZE: that of the heads to "turn"."""
    if EPILOGUE == "gate":
        for j in gl.static_range(len(accs)):
            gate, up = halves(accs[j])
            _store(gate * up * _sigmoid(gate * LOG2E), y, m, firsts[j], M, N, dtype)
    elif EPILOGUE == "heads":
        for j in gl.static_range(len(accs)):
            write_heads(accs[j], coming[j], y, operands, m, firsts[j], M, dtype)
    elif EPILOGUE == "scale" or EPILOGUE == "measure":
        for j in gl.static_range(len(accs)):
            piece = firsts[0] // _columns(accs) * len(accs) + j
            _store_measured(accs[j], coming[j], y, operands, piece, m, firsts[j], M, N, dtype, EPILOGUE)
    else:
        for j in gl.static_range(len(accs)):
            _finish(accs[j], coming[j], y, operands, m, firsts[j], M, N, dtype, EPILOGUE, SIZE)


@gluon.jit
def _finish(acc, coming, y, operands, m, n0, M, N, dtype: gl.constexpr, EPILOGUE: gl.constexpr, SIZE: gl.constexpr):
    """`finish` for one piece, in halves where all of it would take too many registers."""
    if acc.shape[1] > _at_once(EPILOGUE, SIZE):
        left, right = halves(acc)
        _finish(left, coming, y, operands, m, n0, M, N, dtype, EPILOGUE, SIZE)
        _finish(right, coming, y, operands, m, n0 + left.shape[1], M, N, dtype, EPILOGUE, SIZE)
    else:
        if EPILOGUE == "gelu_none":
            acc *= _normal(acc)
        elif EPILOGUE == "gelu_tanh":
            acc = _gelu(acc)
        elif EPILOGUE == "turn":
            acc = turned(as_turned(acc, SIZE), coming, operands, m, n0, M, SIZE)
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
def _store(acc, y, m, n0, M, N, dtype: gl.constexpr):
    """acc [64 BN] to the rows from m and the columns from n0 on of y [M N]; what is wide in halves, which are laid out anew
    in the same shared memory, one by one."""
    BN: gl.constexpr = acc.shape[1]
    if BN > AT_ONCE:
        left, right = halves(acc)
        _store(left, y, m, n0, M, N, dtype)
        _store(right, y, m, n0 + BN // 2, M, N, dtype)
    else:
        layout: gl.constexpr = lines(BN)
        r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
        c = n0 + gl.arange(0, BN, gl.SliceLayout(0, layout))
        out = gl.convert_layout(acc.to(dtype), layout)
        gl.store(y + r.to(gl.int64)[:, None] * N + c[None, :], out, mask=(r < M)[:, None] & (c < N)[None, :])


@gluon.jit
def _store_measured(acc, weight, y, operands, piece, m, n0, M, N, dtype: gl.constexpr, EPILOGUE: gl.constexpr):
    """acc [64 BN] to y [M N], as `_store`, and what a norm of it will be made of: the squares of each row, added up, to
    squares[piece].

    "scale", for RMSNorm: operands are the norm's weight, squares f32 [n M], scaled [M N], x; acc times its part of that
    weight [BN] goes to `scaled`. "measure", for layer norm, whose weight is in the next product's: operands are bias,
    squares, sums f32 [n M], x; what each row sums up to goes to sums[piece].
    """
    acc = acc.to(dtype).to(gl.float32)  # what is normalised is what the next layer adds to
    square, total = _measures(acc)
    r = m + gl.arange(0, 64, square.type.layout)
    gl.store(operands[1] + piece * M + r, square, mask=r < M)
    _store(acc, y, m, n0, M, N, dtype)
    if EPILOGUE == "scale":
        _store(acc * weight[None, :], operands[2], m, n0, M, N, dtype)
    else:
        gl.store(operands[2] + piece * M + r, total, mask=r < M)


@gluon.jit
def _measures(acc):
    """What the squares of each row of acc [64 BN] sum up to, and the numbers."""
    if acc.shape[1] > AT_ONCE:
        left, right = halves(acc)
        square, total = _measures(left)
        other = _measures(right)
        square += other[0]
        total += other[1]
    else:
        square, total = gl.sum(acc * acc, 1), gl.sum(acc, 1)
    return square, total


@gluon.jit
def measures_of(norm, m, M, P: gl.constexpr):
    """Of the rows from m on what their squares, and for layer norm their numbers, sum up to, in parts [64 P], on their way;
    norm: (squares f32 [n M], n, eps), and for layer norm sums f32 [n M]."""
    found = (_parts_of(norm[0], norm[1], m, M, P),)
    if len(norm) > 3:
        found += (_parts_of(norm[3], norm[1], m, M, P),)  # type: ignore[assignment]
    return found


@gluon.jit
def _parts_of(x, n, m, M, P: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, P // 2], [16, 2], [4, 1], [1, 0])
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    i = gl.arange(0, P, gl.SliceLayout(0, layout))
    return gl.load(x + i[None, :] * M + r[:, None], mask=(r < M)[:, None] & (i < n)[None, :], other=0.0)


@gluon.jit
def biases_of(ws, operands, firsts, N, EPILOGUE: gl.constexpr):
    """The bias of each piece [n], or nothing, which takes few registers until it is wanted."""
    biases = ()
    if _biased(EPILOGUE):
        for j in gl.static_range(len(ws)):
            c = firsts[j] + gl.arange(0, ws[j].shape[1], gl.BlockedLayout([1], [32], [4], [0]))
            biases += (gl.load(operands[0] + c, mask=c < N, other=0.0).to(gl.float32),)  # type: ignore[assignment]
    return biases


@gluon.jit
def normalised(accs, measures, biases, norm, K):
    """accs, products of K inputs, by RMSNorm or layer norm of the rows that have these measures, and then their biases."""
    square = gl.sum(measures[0], 1) / K
    if len(measures) > 1:
        mean = gl.sum(measures[1], 1) / K
        square = gl.maximum(square - mean * mean, 0.0)
    factor = gl.rsqrt(square + norm[2])
    out = ()
    for j in gl.static_range(len(accs)):
        acc = accs[j] * for_rows(factor, accs[j])
        if len(biases) > 0:
            acc += gl.convert_layout(biases[j], gl.SliceLayout(0, accs[j].type.layout))[None, :]
        out += (acc,)  # type: ignore[assignment]
    return out
