"""The compiled kernels of CPUs against the reference ops, over odd sizes; and that a row never depends on others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ops import CASES, Case, call, randn
from tiny import Tiny, assert_close, four_prompts
from torch import Tensor

import mllm
from mllm.batch import ForwardBatch, decode_batch
from mllm.config import TextConfig
from mllm.kernels.cpu import CPU
from mllm.kernels.ops import NOT_FINITE
from mllm.kernels.reference import REFERENCE
from mllm.kernels.tables import tables_for
from mllm.sampling import Sampling, sampling_batch
from mllm.stages import admit, commit
from mllm.state import map_leaves
from mllm.table import RequestTable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch's ops serve")
PROMPT, DECODE_OPS, *_ = tables_for("cpu", torch.float32)
DECODE = DECODE_OPS(1) if DECODE_OPS else PROMPT
EPS = 1e-6
NEAR = 1e-5  # relative to the largest number


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def decode_case(case: Case) -> bool:
    """Whether a case could come up in a decode step."""
    return case.op != "attend_" or case.name in ("of one token of many rows", "of one token")


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.name}".strip())
def test_an_op_computes_its_definition(case: Case) -> None:
    args, kwargs = case.make(torch.Generator().manual_seed(len(case.name)))
    want = case.want(*map_leaves(lambda t: t.double() if t.is_floating_point() else t.clone(), args), **kwargs)
    for ops in (PROMPT, DECODE) if decode_case(case) else (PROMPT,):
        got = call(ops, case, map_leaves(Tensor.clone, args), kwargs)
        assert_close(got.reshape(want.shape), want, 2e-6, case.op)


def products(rows: int, depth: int, outputs: int) -> dict[str, tuple[Any, ...]]:
    """The arguments of every op with a product in it, by its name."""
    g = torch.Generator().manual_seed(rows + depth)
    x, norm = randn(g, rows, depth), 1 + randn(g, depth, scale=0.2)
    weight = randn(g, 2 * outputs, depth, scale=depth**-0.5)
    return {
        "norm_linear": (x, norm, weight),
        "norm_gate": (x, norm, weight),
        "head": (x, torch.arange(rows), norm, weight),
        "linear_add": (x, weight, randn(g, rows, 2 * outputs)),
    }


def run(ops: Any, op: str, args: tuple[Any, ...]) -> Tensor:
    out = getattr(ops, op)(*args, **({} if op == "linear_add" else {"eps": EPS}))
    return out[1] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


SIZES = [(1, 1), (3, 5), (16, 4), (37, 9), (65, 129), (1031, 7), (2050, 33)]  # inputs, half the outputs


@pytest.mark.parametrize(("depth", "outputs"), SIZES)
@pytest.mark.parametrize("rows", [*range(1, 18), 66])
def test_products_of_any_size_are_the_reference_ops(rows: int, depth: int, outputs: int) -> None:
    for op, args in products(rows, depth, outputs).items():
        want = run(REFERENCE, op, map_leaves(lambda t: t.double() if t.is_floating_point() else t, args))
        for ops in (DECODE, PROMPT):
            assert_close(run(ops, op, args), want, NEAR, op)


@pytest.mark.parametrize("rows", range(2, 18))
def test_a_row_of_a_product_is_the_same_alone(rows: int) -> None:
    for op, args in products(rows, 1031, 21).items():
        together = run(DECODE, op, args)
        row = rows - 1
        alone = {
            "head": (args[0], torch.tensor([row]), *args[2:]),
            "linear_add": (args[0][row:], args[1], args[2][row:]),
        }
        assert torch.equal(run(DECODE, op, alone.get(op, (args[0][row:], *args[1:])))[0], together[row]), op


def test_products_are_the_same_in_any_number_of_threads(three_threads: None) -> None:
    args = products(5, 256, 2501)  # enough to be shared out
    parallel = {op: run(DECODE, op, args[op]) for op in args}
    torch.set_num_threads(1)
    for op, result in parallel.items():
        assert torch.equal(run(DECODE, op, args[op]), result), op


def test_products_read_weights_and_inputs_in_any_layout() -> None:
    for op, args in products(5, 24, 10).items():
        across = map_leaves(lambda t: t.t().contiguous().t() if t.dim() == 2 else t, args)
        assert torch.equal(run(DECODE, op, across), run(DECODE, op, args))


def test_what_is_not_finite_stays_in_its_row() -> None:
    for op, args in products(6, 40, 8).items():
        broken = map_leaves(Tensor.clone, args)
        broken[0][3, 7] = torch.nan
        out, want = run(DECODE, op, broken), run(DECODE, op, args)
        assert out[3].isnan().all()
        keep = [0, 1, 2, 4, 5]
        assert torch.equal(out[keep], want[keep])


# attention


def config(heads: int, kv_heads: int, size: int) -> TextConfig:
    return TextConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=size, vocab_size=50, max_position_embeddings=2000, rope_theta=1e4,
        mrope_section=(size // 2 - 2 * (size // 6), size // 6, size // 6),
    )  # fmt: skip


def attention(lengths: list[int], page: int, c: TextConfig) -> tuple[list[Any], ForwardBatch]:
    """Arguments of `attend_` without the plan, and the batch: rows of `lengths` tokens, the newest one included."""
    g = torch.Generator().manual_seed(page)
    table = RequestTable.empty(rows=len(lengths), pages=sum(-(-n // page) for n in lengths), page_size=page)
    table, rows = admit(table, lengths)
    table = commit(table, rows, [n - 1 for n in lengths])
    batch = decode_batch(
        table, rows, [3] * len(rows), [-(n // 3) for n in lengths], size=len(rows), listed=table.pages_for(max(lengths)),
        device="cpu",
    )  # fmt: skip
    pool = (len(table.free) + 1, page, c.num_key_value_heads, c.head_dim)
    qkv, norms = randn(g, len(rows), c.sizes["C"]), [1 + randn(g, c.head_dim, scale=0.3) for _ in range(2)]
    return [qkv, *norms, randn(g, *pool), randn(g, *pool)], batch


def attend(ops: Any, args: list[Any], batch: ForwardBatch, page: int, c: TextConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What `attend_` makes, and what it leaves in the pool."""
    qkv, q_norm, k_norm, keys, values = map_leaves(Tensor.clone, args)
    plan = ops.plan(batch, config=c, page_size=page, dtype=torch.float32)
    return ops.attend_(qkv, q_norm, k_norm, plan, keys, values, eps=EPS), keys, values


SHAPES = [(1, 1, 2), (6, 2, 10), (4, 2, 64), (8, 2, 80), (3, 1, 128), (5, 5, 34)]


@pytest.mark.parametrize("page", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_reference_op(shape: tuple[int, int, int], page: int) -> None:
    c = config(*shape)
    for lengths in ([1], [70], [5, 1, 33, 16, 17, 64, 2]):
        args, batch = attention(lengths, page, c)
        for got, want in zip(*(attend(ops, args, batch, page, c) for ops in (DECODE, REFERENCE)), strict=True):
            assert_close(got, want, NEAR)


def test_a_row_attends_the_same_alone_and_in_any_number_of_threads(three_threads: None) -> None:
    c = config(8, 4, 64)
    args, batch = attention([900, 3, 150, 90], 16, c)
    together, _, _ = attend(DECODE, args, batch, 16, c)
    torch.set_num_threads(1)
    for row in range(4):
        own = ForwardBatch(
            tokens=batch.tokens[row : row + 1], positions=batch.positions[:, row : row + 1].contiguous(),
            slots=batch.slots[row : row + 1], pages=batch.pages[row : row + 1], lengths=batch.lengths[row : row + 1],
            q_indptr=batch.q_indptr[:2], last=batch.last[:1],
        )  # fmt: skip
        alone, _, _ = attend(DECODE, [args[0][row : row + 1], *args[1:]], own, 16, c)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_context_that_is_not_finite_fails_its_own_row(value: float) -> None:
    c = config(4, 2, 64)
    args, batch = attention([40, 40], 16, c)
    want, _, _ = attend(DECODE, args, batch, 16, c)
    args[3][batch.pages[1, 0], 2] = value
    got, _, _ = attend(DECODE, args, batch, 16, c)
    assert torch.equal(got[0], want[0])
    assert not got[1].isfinite().any()


# the ends of a step


def test_the_likeliest_token_is_the_first_of_the_largest() -> None:
    rows = torch.tensor([
        [-3.0, -1.0, -1.0, -2.0], [-0.0, 0.0, -1.0, 0.0], [0.0, -0.0, 1e-45, 0.0], [1.0, torch.nan, 2.0, 0.0],
        [1.0, torch.inf, 2.0, 0.0], [1.0, -torch.inf, 2.0, 0.0], [1.0, -torch.nan, 2.0, 0.0], [5.0, 5.0, 3e38, -3e38],
    ])  # fmt: skip
    greedy = sampling_batch([Sampling()] * len(rows), size=len(rows), device="cpu")
    lengths = torch.ones(len(rows), dtype=torch.int32)
    got = DECODE.sample(rows, greedy, lengths)
    assert got.tolist() == [1, 0, 2, NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE, 2]
    many = randn(torch.Generator().manual_seed(0), 9, 30011)
    greedy = sampling_batch([Sampling()] * 9, size=9, device="cpu")
    assert torch.equal(DECODE.sample(many, greedy, lengths), REFERENCE.sample(many, greedy, lengths))


def test_drawn_tokens_are_those_of_the_reference_op() -> None:
    logits = randn(torch.Generator().manual_seed(0), 3, 500)
    settings = sampling_batch([Sampling(temperature=1.0, seed=i) for i in range(3)], size=3, device="cpu")
    lengths = torch.tensor([4, 5, 6], dtype=torch.int32)
    assert torch.equal(DECODE.sample(logits, settings, lengths), REFERENCE.sample(logits, settings, lengths))


@pytest.mark.parametrize("page", [1, 4, 16])
def test_advance_is_the_reference_op(page: int) -> None:
    _, batch = attention([1, page, page + 1, 3 * page + 1, 7], page, config(2, 1, 8))
    batch.lengths[1] = 0  # a padding row
    ours, theirs = (map_leaves(Tensor.clone, batch) for _ in range(2))
    tokens = torch.tensor([7, 3, -1, 0, 49], dtype=torch.int32)
    DECODE.advance_(ours, tokens, page_size=page)
    REFERENCE.advance_(theirs, tokens, page_size=page)
    for name, _, _ in ForwardBatch.__specs__:  # its tensors
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


# as part of the package


def test_rows_decoded_in_two_threads_at_once_are_those_decoded_alone(vision_model: Tiny) -> None:
    prompts = four_prompts(vision_model)
    want = mllm.generate(vision_model.ours, prompts, max_new_tokens=12)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: mllm.generate(vision_model.ours, prompts, max_new_tokens=12), range(6)))
    assert made == [want] * 6


def test_without_numba_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import mllm\n"
        "assert mllm.kernels.tables.tables_for('cpu', mllm.model.DTYPES['bfloat16']).decode_ops is None\n"
        "mllm.kernels.tables.tables_for('cpu', mllm.model.DTYPES['float32'])\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    assert "MissingPackageError" in done.stderr
    assert "pip install numba" in done.stderr


def test_a_numba_that_cannot_be_imported_says_itself_why(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mllm; mllm.load(dtype='float32')"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    *_, last = done.stderr.strip().splitlines()
    assert "MissingPackageError: float32 on a CPU needs what cannot be imported here (pip install numba): Numba" in last
    assert last.endswith("Got NumPy 2.4.")


def test_other_dtypes_keep_the_ops_of_pytorch() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert tables_for("cpu", dtype) == (CPU, None, None, None)
