"""The kernels in Gluon, for the tensor cores of Hopper (capability 9.0), against their definitions; and what decides
where they are used, which needs no GPU.

pytest tests/test_hopper.py --device cuda
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from attending import attended, error, prompt_error, stand_out
from torch import Tensor

pytest.importorskip("triton")


def image_errors(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], groups: int) -> list[float]:
    """The error of each image, some of whose bounds may be those of none, by so many groups of warps."""
    from mllm.kernels import flash, flash_hopper

    indptr = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    tile = flash_hopper.Tile(groups, 64 if groups > 2 else 128, 2)
    got = flash_hopper.images(q * (q.shape[2] ** -0.5 * flash.LOG2E), k, v, indptr, tile=tile)
    return [error(got[a:b], attended(q[a:b], k[a:b], v[a:b])) for a, b in itertools.pairwise(bounds) if a < b]


@pytest.mark.cuda
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("bounds", [[0, 70, 70, 301, 1000], [0, 64], [0, 1300]], ids=str)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(64, torch.bfloat16), (64, torch.float16), (72, torch.bfloat16), (80, torch.bfloat16), (128, torch.bfloat16)],
)
def test_patches_attend_to_their_image_on_hopper(
    size: int, dtype: torch.dtype, bounds: list[int], groups: int, device: str, hopper: None
) -> None:
    count, heads = bounds[-1] + 40, 4  # some patches pad the batch
    qkv = torch.randn(count, 3, heads, size, generator=torch.Generator().manual_seed(size)).to(device, dtype)
    qkv[bounds[-1] :] = torch.nan
    q, k, v = qkv.unbind(1)
    assert all(e < 1e-2 for e in image_errors(q, k, v, bounds, groups))


@pytest.mark.cuda
@pytest.mark.parametrize("tile", [(1, 128, 2), (2, 128, 2), (2, 64, 3)], ids=str)
@pytest.mark.parametrize("page", [8, 16, 64, 128])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("rows", "free"),
    [([(64, 64)], 0), ([(1000, 1000)], 24), ([(77, 999)], 3), ([(1, 1), (500, 777), (130, 130)], 9)],
    ids=str,
)
def test_prompts_attend_to_what_is_before_them_on_hopper(
    rows: list[tuple[int, int]], free: int, size: int, page: int, tile: tuple[int, int, int], device: str, hopper: None
) -> None:
    from mllm.kernels import flash_hopper

    run = functools.partial(flash_hopper.prompts, tile=flash_hopper.Tile(*tile))
    assert prompt_error(run, rows, free, size=size, page=page, dtype=torch.bfloat16, device=device) < 1e-2


ABOVE = [(torch.bfloat16, x) for x in (12, 60, 70, 150, 3000)] + [(torch.float16, x) for x in (12, 16, 150)]
"""Scores of late keys above all others, base 2: some less and some more than what the first tile's largest is taken for."""


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "above"), ABOVE, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [64, 72, 128])
def test_patches_attend_to_one_far_above_those_before_it(
    size: int, groups: int, dtype: torch.dtype, above: float, device: str, hopper: None
) -> None:
    bounds = (0, 70, 1000, 1500)
    q, k, v = torch.randn(3, 1500, 4, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    for b in bounds[2:]:
        stand_out(q, k[b - 9], above)
    assert all(e < 1e-2 for e in image_errors(q.to(device), k.to(device), v.to(device), bounds, groups))


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "above"), ABOVE, ids=str)
@pytest.mark.parametrize("tile", [(1, 128, 2), (2, 128, 2), (2, 64, 3)], ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_prompts_attend_to_one_far_above_those_before_it(
    size: int, tile: tuple[int, int, int], dtype: torch.dtype, above: float, device: str, hopper: None
) -> None:
    from mllm.kernels import flash_hopper

    run = functools.partial(flash_hopper.prompts, tile=flash_hopper.Tile(*tile))
    rows = [(1000, 1000), (300, 777), (130, 130)]
    assert prompt_error(run, rows, 3, size=size, page=16, dtype=dtype, device=device, above=above) < 1e-2


PRODUCTS = [
    (1, 64, 8), (64, 2048, 640), (130, 200, 136), (256, 1024, 1024), (256, 4304, 1152), (300, 6144, 256),
    (1000, 2048, 6144), (4500, 320, 1544), (1000, 256, 4304), (256, 64, 18432), (64, 72, 18432),
]  # fmt: skip
"""Rows, inputs and outputs of products on Hopper: of one tile and less, of tiles in parts, also with a rest, of several
turns of the chip and several bands, and of tiles in two pieces, the widest among them."""


def factors(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias of a product whose outputs are about 1."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*n, generator=generator) for n in ((rows, inputs), (outputs, inputs), (outputs,)))
    return x.to(device, dtype), (weight * inputs**-0.5).to(device, dtype), bias.to(device, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_a_product_goes_on_with_what_follows_it(
    shape: tuple[int, int, int], dtype: torch.dtype, pdl: bool, device: str, hopper: None
) -> None:
    from mllm.kernels import tall

    x, weight, bias = factors(shape, dtype, device)
    y = factors((len(x), len(weight), 1), dtype, device)[0]
    exact = x.double() @ weight.double().T
    shifted = exact + bias.double()
    gate, up = exact.chunk(2, 1)
    functional = torch.nn.functional
    for got, want in [
        (tall.linear(x, weight, pdl=pdl), exact),
        (tall.linear(x, weight, bias, pdl=pdl), shifted),
        (tall.linear(x, weight, bias, gelu="tanh", pdl=pdl), functional.gelu(shifted, approximate="tanh")),
        (tall.linear(x, weight, bias, gelu="none", pdl=pdl), functional.gelu(shifted)),
        (tall.split(x, weight, pdl=pdl).double().sum(0), exact),
        (tall.gated(x, weight, pdl=pdl), functional.silu(gate) * up),
        (tall.added(x, weight, y, pdl=pdl), y.double() + exact),
        (tall.added(x, weight, y, bias, pdl=pdl), y.double() + shifted),
    ]:
        assert error(got, want) < 1e-2


@pytest.mark.cuda
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 64, 72), (64, 1024, 640), (130, 512, 200), (256, 1152, 1152), (1024, 512, 2048)], ids=str
)
def test_some_products_are_made_at_once(
    shape: tuple[int, int, int], dtype: torch.dtype, pdl: bool, device: str, hopper: None
) -> None:
    from mllm.kernels import tall
    from mllm.kernels.room import empty_groups

    rows, inputs, outputs = shape
    x, weight, bias = (torch.stack(t) for t in zip(*(factors(shape, dtype, device) for _ in range(3)), strict=True))
    scales = torch.tensor([0.5, 1.0, -1.0], dtype=dtype, device=device)[:, None, None]
    held = empty_groups(x, 3, rows, inputs)
    held.copy_(x)
    exact = (x.double() @ (weight * scales).double().transpose(1, 2)) + (bias[:, None] * scales).double()
    around = torch.full((5, rows, outputs), 7.0, dtype=dtype, device=device)
    for gelu, want in (("", exact), ("none", torch.nn.functional.gelu(exact))):
        got = tall.linears(held, weight * scales, bias * scales[:, 0], around[1:4], gelu=gelu, pdl=pdl)
        assert error(got, want) < 1e-2
        assert (around[::4] == 7).all()  # nothing is written elsewhere


@pytest.mark.cuda
def test_mergers_that_waited_make_what_each_would_have_made(device: str, hopper: None) -> None:
    from mllm import families, weights
    from mllm.kernels import mergers
    from mllm.kernels.norm import Pending
    from mllm.state import map_leaves

    made = weights.random(families.preset("qwen3-vl-2b"), device=device, dtype=torch.bfloat16).vision
    assert made is not None
    for rows, parts in ((16, 4), (400, 2), (1024, 0)):
        for those in (made, map_leaves(torch.clone, made)):  # one after the other in memory, and apart
            waiting = []
            for merger in (those.merger, *those.taps):
                x = factors((rows, 1024, 1), torch.bfloat16, device)[0]
                stream = (
                    Pending(x, torch.randn_like(x.expand(parts, *x.shape)), merger.down_bias[:1024]) if parts else x
                )
                waiting.append(mergers.merge(stream, merger, pdl=True)[1])
            got = mergers.features(waiting, pdl=True)
            assert got.shape == (4, rows // 4, 2048)
            for one, waited in zip(got, waiting, strict=True):
                assert isinstance(waited, mergers.Unmerged)
                assert error(one, waited.made()) < 1e-2


@pytest.mark.cuda
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(
    "shape", [(130, 320, 256), (256, 2048, 2048), (900, 640, 1152), (1000, 640, 1280), (4500, 320, 1536)], ids=str
)
def test_two_products_do_the_norm_between_them(
    shape: tuple[int, int, int], pdl: bool, device: str, hopper: None
) -> None:
    from mllm.kernels import tall

    rows, _, width = shape
    x, weight, norm = factors(shape, torch.bfloat16, device)
    y, after, _ = factors((rows, width, 512), torch.bfloat16, device)
    exact = y.double() + x.double() @ weight.double().T
    normal = torch.nn.functional.rms_norm(exact, (width,), norm.double(), eps=1e-6)
    total, scaled = tall.scaled(x, weight, y, norm, eps=1e-6, pdl=pdl)
    gate, up = (normal @ after.double().T).chunk(2, 1)
    assert error(total, exact) < 1e-2
    assert error(tall.linear(scaled, after, pdl=pdl), normal @ after.double().T) < 1e-2
    assert error(tall.gated(scaled, after, pdl=pdl), torch.nn.functional.silu(gate) * up) < 1e-2


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "pdl"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)])
@pytest.mark.parametrize(
    "shape", [(4, 320, 256), (256, 1024, 1024), (900, 640, 1152), (1024, 1024, 1024), (4500, 320, 1536)], ids=str
)
def test_two_products_do_the_layer_norm_between_them(
    shape: tuple[int, int, int], dtype: torch.dtype, pdl: bool, device: str, hopper: None
) -> None:
    from mllm.kernels import tall
    from mllm.weights import weight_after_norm

    rows, _, width = shape
    x, weight, bias = factors(shape, dtype, device)
    y, after, after_bias = factors((rows, width, 4608), dtype, device)
    after = weight_after_norm(after.float(), dtype=dtype)
    exact = y.double() + x.double() @ weight.double().T + bias.double()
    want = torch.nn.functional.layer_norm(exact, (width,), eps=1e-6) @ after.double().T + after_bias.double()
    total, unnormed = tall.measured(x, weight, y, bias, eps=1e-6, pdl=pdl)
    assert error(total, exact) < 1e-2
    assert error(tall.linear(unnormed, after, after_bias, pdl=pdl), want) < 1e-2
    gelu = torch.nn.functional.gelu(want, approximate="tanh")
    assert error(tall.linear(unnormed, after, after_bias, gelu="tanh", pdl=pdl), gelu) < 1e-2
    cos, sin = torch.ones(2, rows, 32, device=device)
    turned = tall.turned(unnormed, after, after_bias, cos, sin * 0, scale=1.0, pdl=pdl)
    assert error(turned.flatten(1), want) < 1e-2


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (16, 64), (1, 72), (5, 72), (16, 72)], ids=str)
@pytest.mark.parametrize("count", [4, 200, 500, 900, 4500])
def test_queries_and_keys_are_turned_where_their_product_is_made(
    count: int, shape: tuple[int, int], device: str, hopper: None
) -> None:
    from mllm.kernels import rope, tall

    heads, size = shape
    x, weight, bias = factors((count, 320, 3 * heads * size), torch.bfloat16, device)
    angle = torch.randn(count, size // 2, generator=torch.Generator().manual_seed(count)).to(device)
    cos, sin = angle.cos(), angle.sin()
    qkv = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    want = [*rope.rotate_heads(qkv, cos, sin, heads, scale=0.3), qkv.view(count, 3, heads, size)[:, 2]]
    got = tall.turned(x, weight, bias, cos, sin, scale=0.3).unbind(1)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-2


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(1, 1), (16, 8), (20, 4), (21, 4)], ids=str)
@pytest.mark.parametrize("count", [3, 200, 512, 1000, 4500])
def test_keys_and_values_are_written_where_their_product_is_made(
    count: int, heads: tuple[int, int], device: str, hopper: None
) -> None:
    from mllm.kernels import rope, tall

    queries, kv = heads
    x, weight, _ = factors((count, 320, (queries + 2 * kv) * 128), torch.bfloat16, device)
    generator = torch.Generator().manual_seed(count)
    norms = [torch.randn(128, generator=generator).to(device, torch.bfloat16) for _ in range(2)]
    angle = torch.randn(count, 64, generator=generator).to(device)
    slots = (8 + torch.randperm(count, generator=generator)).to(device)
    held = []
    for dtype, run in ((torch.bfloat16, tall.written), (torch.float32, None)):
        pool = torch.zeros(2, 1 + count // 8 + 1, 8, kv, 128, device=device, dtype=dtype)
        around = [t.to(dtype) for t in norms], (angle.cos(), angle.sin(), slots, *pool)
        if run is not None:
            q = run(x, weight, *around[0], *around[1], scale=0.3, eps=1e-6)
        else:
            qkv = x.float() @ weight.float().T
            q = rope.rotate_write(qkv, *around[0], *around[1], scale=0.3, eps=1e-6)
        held.append((q, *pool))
    assert max(error(a, b) for a, b in zip(*held, strict=True)) < 1e-2


SHAPES_OF_PRODUCTS = [
    (rows, n, k)
    for rows in (1, 65, 256, 400, 1000, 1500, 2048, 2304, 9216)
    for n, k in ((1024, 4096), (1152, 4304), (2048, 2048), (6144, 2048), (4304, 1152))
]


@pytest.mark.parametrize("epilogue", ["other", "sum", "gate", "turn", "heads"])
@pytest.mark.parametrize("shape", SHAPES_OF_PRODUCTS, ids=str)
def test_a_tile_fits_the_chip_and_its_parts_the_inputs(shape: tuple[int, int, int], epilogue: str) -> None:
    from mllm.kernels.tall_tiles import tile_for

    rows, outputs, inputs = shape
    tile = tile_for(epilogue, rows, outputs, inputs)
    columns = tile.columns * (2 if epilogue == "gate" else 1)
    assert tile.stages * (tile.rows + columns) * 64 * 2 < 227 * 1024
    assert columns <= (288 if epilogue in ("other", "turn") else 256)  # most of a group's registers are sums
    assert inputs > -(-inputs // (64 * tile.parts)) * 64 * (tile.parts - 1)  # no part is empty
    assert epilogue == "sum" or tile.parts == 1
    assert epilogue != "heads" or len(tile.outputs) == 1
    assert math.prod(tile.grid(rows, outputs)) * tile.rows * tile.columns >= rows * outputs * tile.parts


def test_products_are_ours_where_they_were_measured_to_be_faster() -> None:
    from mllm.kernels.tall_tiles import pays

    def x(rows: int, inputs: int = 2048, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(rows, inputs, dtype=dtype, device="meta")

    assert [n for n in (40, 160, 256, 384, 512, 1024, 2048) if pays("gate", x(n), 6144)] == [40, 256, 512, 1024, 2048]
    assert [n for n in (256, 384, 512, 1024, 2048) if pays("heads", x(n), 4096)] == [256, 512, 1024, 2048]
    assert not any(pays("heads", x(n, 4096), 6144) for n in (256, 512, 1024))  # much of the chip would be idle
    assert [n for n in (256, 512, 640, 896, 1024, 4096) if pays("other", x(n, 1024), 4096)] == [256, 896, 1024]
    assert [n for n in (512, 1024, 4096) if pays("other", x(n, 1152), 4304)] == [1024]  # 128 tiles of 272 outputs
    assert [rows for rows in (576, 1024, 1600, 4096) if pays("turn", x(rows, 1024), 3072)] == [576, 1024, 4096]
    # beyond 256 rows a norm by itself hides the start of the product after it
    assert [n for n in (64, 256, 512, 2048) if pays("gate", x(n), 6144, normed=True)] == [64, 256]
    assert [n for n in (64, 256, 512, 2048) if pays("heads", x(n), 4096, normed=True)] == [64, 256]
    assert [n for n in (64, 256, 1024, 1600, 4096) if pays("other", x(n, 1024), 4096, normed=True)] == [64, 256, 4096]
    assert [n for n in (64, 256, 1024, 1600, 4096) if pays("turn", x(n, 1024), 3072, normed=True)] == [64, 256, 4096]
    assert pays("sum", x(1000, 1024), 1024)  # few outputs
    assert [rows for rows in (512, 640, 1024, 4096) if pays("sum", x(rows, 6144), 2048)] == [512, 1024, 4096]
    assert not pays("gate", x(256, dtype=torch.float32), 6144)
    assert not pays("gate", x(256, 1028), 6144)  # rows that do not begin at 16 bytes


def test_a_product_that_is_left_unmade_is_made_on_demand() -> None:
    from mllm.kernels.products import Unmade

    x, weight, bias = factors((5, 16, 8), torch.float32, "cpu")
    assert torch.equal(Unmade(x, weight, bias).made(), torch.nn.functional.linear(x, weight, bias))


def test_a_sum_that_is_left_unmade_is_made_of_what_is_wanted() -> None:
    from mllm.kernels.products import Unadded

    y, weight, _ = factors((5, 16, 8), torch.float32, "cpu")
    x, rows = factors((5, 8, 1), torch.float32, "cpu")[0], torch.tensor([4, 1])
    made = Unadded(y, weight, x).at(rows).made()
    assert not isinstance(made, Tensor)  # float32 is cuBLAS's, and pending
    assert torch.allclose(made.x + made.parts.sum(0), x[rows] + y[rows] @ weight.T)


def test_activations_have_room_for_whole_tiles() -> None:
    from mllm.kernels.room import empty_rows, rows_of

    like = torch.empty(1, dtype=torch.bfloat16)
    x = empty_rows(like, 130, 3, 64)
    assert (x.shape, x.dtype) == ((130, 3, 64), torch.bfloat16)
    assert empty_rows(like, 5, 8, dtype=torch.float32).dtype == torch.float32
    assert rows_of(x, 128) == rows_of(x, 64) + 64 == 256
    assert rows_of(x[:, 2], 64) == 192  # a part of each row
    assert rows_of(torch.empty(130, 64), 64) == 130  # there is nothing behind it
    assert rows_of(torch.empty(256, 64)[200:], 64) == 56


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_is_done_by_the_products_around_it_where_no_number_overflows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm.kernels import products, tall

    x, y, into, norm, weight = (
        torch.empty(*n, dtype=dtype, device="meta")
        for n in ((256, 2048), (256, 2048), (2048, 2048), (2048,), (12288, 2048))
    )
    monkeypatch.setattr(tall, "scaled", lambda *_, **__: (x, "by the products"))
    monkeypatch.setattr(tall, "measured", lambda *_, **__: (x, "by the products, layer norm"))
    monkeypatch.setattr(products, "added", lambda *_, **__: x)
    monkeypatch.setattr(products, "add_norm", lambda *_, **__: (x, "by itself"))
    run = functools.partial(products.normed, weight=weight, eps=1e-6, product=lambda x, _: x, epilogue="gate", pdl=True)
    stream = products.Unadded(y, into, x)
    assert run(stream, norm)[1] == ("by the products" if dtype == torch.bfloat16 else "by itself")
    assert run(stream._replace(bias=norm), None)[1] == "by the products, layer norm"
    assert run(x, None)[1] == "by itself"
