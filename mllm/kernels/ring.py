"""Products of one row with weights from a ring in shared memory, which a warp fills that does nothing else.

The warp copies tiles of 16 outputs in the order in which they will be wanted, and waits for room in the ring only. Eight
others multiply: each has its own inputs of a tile, which are a factor of the tensor cores' with x as the other, and they add
up what they have when all inputs of the outputs are through. Of x all columns are the same, so that every thread has
a whole result.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mllm.kernels.hopper import copy, factor_layout, new_barriers, parts_layout
from mllm.kernels.words import halves, pack, receive, unpack

OUTPUTS = gl.constexpr(16)
"""Outputs of a tile: the tensor cores' tall side."""
COLUMNS = gl.constexpr(8)
"""Columns of a product, of which one is wanted: the tensor cores' narrow side."""
WARPS = gl.constexpr(8)
INPUTS = gl.constexpr(64)
"""Inputs of a tile for each warp: 128 bytes, the widest that descriptors copy."""
WIDTH = gl.constexpr(512)
"""Inputs of a tile for all warps; as many of x are a piece."""
TILES = gl.constexpr(2)
"""Tiles of a stage of the ring, one after the other along the inputs: fewer barriers than with one."""
HEIGHT = gl.constexpr((WARPS * OUTPUTS).value)
"""Rows of a tile as it lies in the ring, INPUTS wide: the outputs for each warp."""
GROUP = gl.constexpr(4)
"""Tiles that are multiplied between two barriers."""


@gluon.constexpr_function
def _flat():
    """The layout in which the warps read a tile [WARPS*OUTPUTS INPUTS], which is the weight."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [WARPS.value, 1], [16, 8]), 2)


@gluon.constexpr_function
def _pairs():
    """The layout of a piece of x in pairs [WARPS INPUTS/2] as it comes: one a thread."""
    return gl.BlockedLayout([1, 1], [1, 32], [WARPS.value, 1], [1, 0])


@gluon.constexpr_function
def _wanted():
    """The layout of such a piece to multiply: each of four threads has a fourth of its warp's, one after the other in shared
    memory."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4]],
        lane_bases=[[0, 8], [0, 16], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[1, 0], [2, 0], [4, 0]],
        block_bases=[],
        shape=[WARPS.value, INPUTS.value // 2],
    )


@gluon.constexpr_function
def results():
    """The layout of every second output of a tile [OUTPUTS/2]: all warps have all of them."""
    return gl.SliceLayout(0, _parts())


@gluon.constexpr_function
def _parts():
    return gl.BlockedLayout([WARPS.value, 1], [1, 32], [1, WARPS.value], [1, 0])


@gluon.jit
def new_ring(box, STAGES: gl.constexpr):
    """An empty ring: (tiles, barrier of each that it is there, barrier of each stage that it has been read)."""
    tiles = gl.allocate_shared_memory(box.dtype, [STAGES, TILES * HEIGHT, INPUTS], box.layout)
    return tiles, new_barriers(STAGES * TILES, 1), new_barriers(STAGES, 1)


@gluon.jit
def room(ring, step, i: gl.constexpr, ahead):
    """Tile i of a stage, to be filled: (where it lies, its barrier). Waits until what was there has been read, and until
    only `ahead` tiles are on their way, this one included. The more there are, the longer everything else takes that
    multiprocessors have to read."""
    tiles, full, free = ring
    STAGES: gl.constexpr = tiles.shape[0]
    COUNT: gl.constexpr = STAGES * TILES
    stage = step % STAGES
    if i == 0:
        mbarrier.wait(free.index(stage), (step // STAGES) & 1 ^ 1)
    before = TILES * step + i - ahead
    if before >= 0:
        mbarrier.wait(full.index(before % COUNT), before // COUNT & 1)
    return tiles.index(stage).slice(i * HEIGHT, HEIGHT), full.index(stage * TILES + i)


@gluon.jit
def arrived(ring, step, COUNT: gl.constexpr):
    """Waits for the next tiles."""
    tiles, full, _ = ring
    STAGES: gl.constexpr = tiles.shape[0]
    for i in gl.static_range(COUNT):
        turn = step + i // TILES
        mbarrier.wait(full.index(turn % STAGES * TILES + i % TILES), turn // STAGES & 1)


@gluon.jit
def tile(ring, step, i: gl.constexpr):
    """Where the next tile but i lies."""
    tiles, _, _ = ring
    return tiles.index((step + i // TILES) % tiles.shape[0]).slice(i % TILES * HEIGHT, HEIGHT)


@gluon.jit
def done(ring, step, COUNT: gl.constexpr):
    """The next stages have been read."""
    _, _, free = ring
    for i in gl.static_range(COUNT):
        mbarrier.arrive(free.index((step + i) % free.shape[0]))


@gluon.jit
def fill(box, row, K: gl.constexpr, ring, step, ahead):
    """OUTPUTS rows of a weight [n K], to the ring; `ahead` as in `room`."""
    for k in range(0, K, TILES * WIDTH):
        for i in gl.static_range(TILES):
            to, bar = room(ring, step, i, ahead)
            if k + i * WIDTH < K:
                mbarrier.expect(bar, OUTPUTS * WIDTH * 2)
                for w in gl.static_range(WARPS):
                    copy(box, [row, k + i * WIDTH + w * INPUTS], bar, to.slice(w * OUTPUTS, OUTPUTS))
            else:
                mbarrier.expect(bar, 0)
        step += 1
    return step


@gluon.jit
def _addresses(x, COUNT: gl.constexpr):
    """The addresses of the pairs of a vector, in pieces."""
    P: gl.constexpr = _pairs()
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, P))[:, None]
    at = x + warp * (INPUTS // 2) + gl.arange(0, INPUTS // 2, gl.SliceLayout(0, P))[None, :]
    pieces = ()
    for i in gl.static_range(COUNT):
        pieces += (at + i * (WIDTH // 2),)  # type: ignore[assignment]
    return pieces


@gluon.jit
def read(x, K: gl.constexpr):
    """A vector [K] of 16 bits in memory, in pieces, in pairs."""
    at = _addresses(x.to(gl.pointer_type(gl.int32), bitcast=True), K // WIDTH)
    pieces = ()
    for i in gl.static_range(len(at)):
        pieces += (gl.load(at[i]),)  # type: ignore[assignment]
    return pieces


@gluon.jit
def receive_vector(words, turn, K: gl.constexpr):
    """A vector [K] that other programs send, in pieces, in pairs."""
    wanted = gl.full([WARPS, INPUTS // 2], 1, gl.int32, _pairs())
    return receive(_addresses(words, K // WIDTH), turn, wanted)


@gluon.jit
def put(pieces):
    """x to shared memory [... GROUP*WARPS INPUTS/2], in the order of `_wanted`; some pieces at a time, as a barrier
    follows each store."""
    COUNT: gl.constexpr = len(pieces)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    xs = gl.allocate_shared_memory(gl.int32, [(COUNT + GROUP - 1) // GROUP, GROUP * WARPS, INPUTS // 2], shared)
    for i in gl.static_range(0, COUNT // GROUP * GROUP, GROUP):
        four = gl.join(gl.join(pieces[i], pieces[i + 2]), gl.join(pieces[i + 1], pieces[i + 3]))
        four = gl.reshape(gl.permute(four, [2, 3, 0, 1]), [GROUP * WARPS, INPUTS // 2])
        xs.index(i // GROUP).store(_by_thread(four))
    for i in gl.static_range(COUNT // GROUP * GROUP, COUNT):
        xs.index(i // GROUP).slice(i % GROUP * WARPS, WARPS).store(_by_thread(pieces[i]))
    return xs


@gluon.jit
def _by_thread(pairs):
    """Pairs [n INPUTS/2] in the order of the threads of a factor, each of which wants every fourth."""
    apart = gl.permute(gl.reshape(pairs, [pairs.shape[0], INPUTS // 8, 4]), [0, 2, 1])
    return gl.reshape(apart, pairs.shape)


@gluon.jit
def put_scaled(pieces, scales, squares, dtype: gl.constexpr):
    """`put` of x times its norm's weight. To `squares` [WARPS] goes what each warp's part of x squared sums up to."""
    square = gl.zeros([WARPS, INPUTS // 2], gl.float32, _pairs())
    scaled = ()
    for i in gl.static_range(len(pieces)):
        a, b = unpack(pieces[i], dtype)
        c, d = unpack(scales[i], dtype)
        square += a * a + b * b
        scaled += (pack(a * c, b * d, dtype),)  # type: ignore[assignment]
    xs = put(scaled)
    squares.store(gl.sum(square, 1))
    return xs


@gluon.jit
def root(squares, K: gl.constexpr, eps):
    """The reciprocal of x's root mean square, by which products of x times its norm's weight have yet to be multiplied."""
    square = squares.load(gl.BlockedLayout([WARPS], [32], [WARPS], [0]))
    return gl.rsqrt(gl.sum(square, 0) / K + eps)


@gluon.jit
def factors(xs, first: gl.constexpr, count: gl.constexpr, dtype: gl.constexpr):
    """Pieces of x from shared memory, as factors."""
    pieces = ()
    for i in gl.static_range(first, first + count):
        pairs = xs.index(i // GROUP).slice(i % GROUP * WARPS, WARPS).load(_wanted())
        low, high = halves(pairs, dtype)
        x = gl.reshape(gl.join(low, high), [WARPS, 4, INPUTS // 8, 2])
        x = gl.reshape(gl.permute(x, [0, 2, 1, 3]), [WARPS, INPUTS])
        x = gl.convert_layout(x, gl.SliceLayout(2, factor_layout(1, WARPS, 2)), assert_trivial=True)
        pieces += (x[:, :, None].broadcast_to(WARPS, INPUTS, COLUMNS),)  # type: ignore[assignment]
    return pieces


@gluon.jit
def _multiply(acc, ring, pieces, step):
    """acc and the next tiles of the ring times pieces of x."""
    COUNT: gl.constexpr = len(pieces)
    TURNS: gl.constexpr = (COUNT + TILES - 1) // TILES
    arrived(ring, step, COUNT)
    ws = ()
    for i in gl.static_range(COUNT):
        w = tile(ring, step, i).load(_flat())
        w = gl.convert_layout(gl.reshape(w, [WARPS, OUTPUTS, INPUTS]), factor_layout(0, WARPS, 2), assert_trivial=True)
        ws += (w,)  # type: ignore[assignment]
    done(ring, step, TURNS)
    total = mma_v2(ws[0], pieces[0], acc)  # type: ignore[misc]
    for i in gl.static_range(1, COUNT):  # apart, so that none waits for another
        total += mma_v2(ws[i], pieces[i], gl.zeros([WARPS, OUTPUTS, COLUMNS], gl.float32, parts_layout(WARPS)))
    return total, step + TURNS


@gluon.jit
def dot(ring, pieces, step):
    """The next outputs of the ring times x in factors, in the warps' parts [WARPS OUTPUTS COLUMNS]."""
    acc = gl.zeros([WARPS, OUTPUTS, COLUMNS], gl.float32, parts_layout(WARPS))
    for i in gl.static_range(0, len(pieces), GROUP):
        acc, step = _multiply(acc, ring, pieces[i : i + GROUP], step)
    return acc, step


@gluon.jit
def dot_long(ring, xs, step, K: gl.constexpr, dtype: gl.constexpr):
    """`dot` of x [K] in shared memory, since registers may not have room for all of it."""
    COUNT: gl.constexpr = K // WIDTH
    acc = gl.zeros([WARPS, OUTPUTS, COLUMNS], gl.float32, parts_layout(WARPS))
    for i in gl.static_range(0, COUNT, GROUP):
        acc, step = _multiply(acc, ring, factors(xs, i, min(GROUP, COUNT - i), dtype), step)
    return acc, step


@gluon.jit
def share(acc):
    """The warps' parts to shared memory, [WARPS OUTPUTS COLUMNS/2]."""
    one, _ = gl.split(gl.reshape(acc, [WARPS, OUTPUTS, COLUMNS // 2, 2]))
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    return gl.allocate_shared_memory(gl.float32, [WARPS, OUTPUTS, COLUMNS // 2], shared, one)


@gluon.jit
def total(parts):
    """The warps' parts added up: (the even outputs, the odd ones), [OUTPUTS/2] each."""
    layout: gl.constexpr = gl.BlockedLayout([WARPS, 2, 1], [1, 32, 1], [1, 1, WARPS], [2, 1, 0])
    even, odd = gl.split(gl.reshape(parts.slice(0, 1, 2).load(layout), [WARPS, OUTPUTS // 2, 2]))
    return gl.sum(gl.convert_layout(even, _parts()), 0), gl.sum(gl.convert_layout(odd, _parts()), 0)


@gluon.jit
def pairs_at(y, n):
    """Where the outputs [OUTPUTS/2] of a tile from n on are, in words or in pairs."""
    return y + n // 2 + gl.arange(0, OUTPUTS // 2, results())
