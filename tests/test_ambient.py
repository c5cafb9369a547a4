"""What a caller has set for the whole process, or around a call, does not reach what the runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
import torch
from tiny import Tiny, four_prompts

import mllm
from mllm import stages
from mllm.batch import decode_batch
from mllm.cache import KVPool
from mllm.errors import ShapeError, TableError
from mllm.sampling import sampling_batch
from mllm.table import RequestTable


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": partial(default_dtype, torch.float64), "bfloat16": partial(default_dtype, torch.bfloat16),
    "float16": partial(default_dtype, torch.float16), "meta": partial(torch.device, "meta"),
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16), "grad": torch.enable_grad,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("around", AROUND)
def test_defaults_and_autocast_of_the_caller_change_no_answer(vision_model: Tiny, around: str, dtype: str) -> None:
    model = mllm.load(vision_model.folder, dtype=dtype)
    long = mllm.Prompt([1 + i % 80 for i in range(100)])  # beyond what the compiled products take
    prompts = [*four_prompts(vision_model), long]
    sampling = [mllm.Sampling(), *[mllm.Sampling(temperature=0.8, top_p=0.9, seed=i) for i in range(len(prompts) - 1)]]

    def run(on: mllm.Model) -> tuple[object, list[torch.Tensor]]:
        return mllm.generate(on, prompts, max_new_tokens=6, sampling=sampling), mllm.score(on, prompts)

    wanted, logits = run(model)
    with AROUND[around]():
        got, scores = run(model)
        fresh, _ = run(mllm.load(vision_model.folder, dtype=dtype))
    again, _ = run(model)
    assert got == fresh == again == wanted
    assert all(torch.equal(a, b) for a, b in zip(scores, logits, strict=True))


def decode_one(model: mllm.Model, pool: KVPool, *, table_pages: int, held: int) -> None:
    """A step of a row of `held` tokens by hand."""
    table = RequestTable.empty(rows=1, pages=table_pages, page_size=16)
    table, (row,) = stages.admit(table, [held + 1])
    table = stages.commit(table, [row], [held])
    batch = decode_batch(table, [row], [5], [0], size=1, listed=table_pages, device=model.device)
    sampling = sampling_batch([mllm.Sampling()], size=1, device=model.device)
    stages.step(model.weights, pool, batch, sampling, config=model.config, ops=model.step_ops(1))


def test_a_step_by_hand_over_another_pool_is_refused_not_read_beyond(text_model: Tiny) -> None:
    model = mllm.load(text_model.folder, dtype="float32")
    make = partial(KVPool.empty, model.config.text, page_size=16, device=model.device)
    with pytest.raises(TableError, match="page 4 of the batch is beyond a pool of 3"):
        decode_one(model, make(pages=2, dtype=torch.float32), table_pages=4, held=50)
    with pytest.raises(ShapeError, match=r"float32, got torch\.bfloat16"):
        decode_one(model, make(pages=4, dtype=torch.bfloat16), table_pages=4, held=50)
    decode_one(model, make(pages=4, dtype=torch.float32), table_pages=4, held=50)
