"""The predicted peak against the allocator's own record: never below what was allocated, and close to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import picture, words
from torch.profiler import ProfilerActivity, profile

import mllm
from mllm import families, memory, peak, requests, stages
from mllm.batch import Chunk, decode_batch, pack
from mllm.cache import KVPool
from mllm.image_config import ImageConfig
from mllm.peak import Load
from mllm.sampling import Sampling, sampling_batch
from mllm.table import RequestTable

# wide and shallow, so that activations are what a layer of a real model has and weights are small
CONFIG = mllm.Config(
    text=mllm.TextConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=4096, max_position_embeddings=32768, rope_theta=1e6, mrope_section=(12, 10, 10),
        tie_word_embeddings=True,
    ),
    vision=mllm.config.VisionConfig(
        depth=3, hidden_size=512, intermediate_size=2048, num_heads=8, out_hidden_size=256, num_position_embeddings=256,
        deepstack_visual_indexes=(0, 1, 2), patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
    ),
    image_token_id=4095,
)  # fmt: skip
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest) -> mllm.Model:
    return mllm.dummy(CONFIG, dtype=request.param)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Of which PyTorch's own share is little, so that a prediction without it is close to what was allocated."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def allocated(call: Callable[[], Any]) -> int:
    """The most bytes that lived at once while `call` ran, of those that it allocated."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    assert found
    return int(np.cumsum([e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]).max())


def rows_of(model: mllm.Model, rows: int, slots: int, before: int) -> tuple[KVPool, RequestTable, Sequence[int]]:
    """A pool and a table of `rows` rows of `slots` slots, `before` of which are committed."""
    each = -(-slots // 16)
    table = RequestTable.empty(rows=rows, pages=rows * each, page_size=16, row_pages=each)
    table, admitted = stages.admit(table, [slots] * rows)
    table = stages.commit(table, admitted, [before] * rows)
    pool = KVPool.empty(model.config.text, pages=rows * each, page_size=16, device="cpu", dtype=model.dtype)
    return pool, table, admitted


def prefill_took(model: mllm.Model, rows: int, tokens: int, before: int) -> int:
    """The most bytes of a prefill of `tokens` tokens a row, after `before` others."""
    pool, table, admitted = rows_of(model, rows, before + tokens, before)
    positions = torch.arange(before, before + tokens, dtype=torch.int32).expand(3, -1)
    chunks = [Chunk(row=r, tokens=torch.ones(tokens, dtype=torch.int32), positions=positions) for r in admitted]
    batch = pack(table, chunks, device="cpu")
    return allocated(lambda: stages.prefill(model.weights, pool, batch, config=CONFIG, ops=model.ops))


def encoder_took(model: mllm.Model, grids: list[tuple[int, int]]) -> int:
    """The most bytes of the encoder, for images of so many rows and columns of patches."""
    patches = sum(rows * cols for rows, cols in grids)
    parts = [torch.zeros(rows * cols, 768, dtype=torch.uint8) for rows, cols in grids]
    batch = requests.join_patches(parts, grids, np.arange(patches // 4), ImageConfig(), device=torch.device("cpu"))
    vision = model.weights.vision
    assert vision is not None
    assert CONFIG.vision is not None
    encode = CONFIG.vision
    return allocated(lambda: stages.vit(vision, batch, config=encode, ops=model.ops))


@pytest.mark.parametrize(
    ("rows", "tokens", "before"), [(1, 512, 0), (1, 512, 4096), (8, 64, 0), (64, 8, 0), (8, 64, 512)]
)
def test_a_prefill_batch_takes_what_was_predicted(model: mllm.Model, rows: int, tokens: int, before: int) -> None:
    load = Load(prefill_tokens=rows * tokens, rows=rows, context=before + tokens, listed=1, greedy=True)
    took = prefill_took(model, rows, tokens, before)
    assert took <= peak.prefill(CONFIG, load, itemsize=model.dtype.itemsize, gathers=True) <= 1.15 * took


@pytest.mark.parametrize(
    ("rows", "context", "temperature"), [(1, 256, 0.0), (8, 1024, 0.0), (64, 64, 1.0), (8, 64, 1.0)]
)
def test_a_decode_step_takes_what_was_predicted(model: mllm.Model, rows: int, context: int, temperature: float) -> None:
    pool, table, admitted = rows_of(model, rows, context, context - 1)
    batch = decode_batch(table, admitted, [1] * rows, [0] * rows, size=rows, listed=context // 16, device="cpu")
    sampling = sampling_batch([Sampling(temperature=temperature)] * rows, size=rows, device="cpu")
    took = allocated(lambda: stages.step(model.weights, pool, batch, sampling, config=CONFIG, ops=model.ops))
    options: dict[str, Any] = {"rows": rows, "listed": context, "gathers": True, "greedy": temperature == 0}
    assert took <= peak.decode(CONFIG.text, itemsize=model.dtype.itemsize, **options) <= 1.15 * took


@pytest.mark.parametrize("grids", [[(32, 32)], [(48, 16), (4, 4)], [(8, 8)] * 9])
def test_the_encoder_takes_what_was_predicted(model: mllm.Model, grids: list[tuple[int, int]]) -> None:
    patches = sum(rows * cols for rows, cols in grids)
    took = encoder_took(model, grids)
    assert took <= peak.encoder(CONFIG, patches=patches, itemsize=model.dtype.itemsize) <= 1.15 * took


@pytest.mark.parametrize("threads", [1, 16, 64])
def test_many_threads_stay_below_what_was_predicted(model: mllm.Model, threads: int) -> None:
    """PyTorch's attention and products keep room for each thread."""
    torch.set_num_threads(threads)
    load = Load(prefill_tokens=800, rows=1, context=1800, listed=1, patches=40 * 24, greedy=True)
    predicted = peak.predict(CONFIG, load, itemsize=model.dtype.itemsize, device="cpu")
    assert encoder_took(model, [(40, 24)]) <= predicted.encoder + predicted.workspace
    assert prefill_took(model, 1, 800, 1000) <= predicted.prefill + predicted.workspace


def test_a_score_takes_what_was_predicted(model: mllm.Model) -> None:
    prompt = mllm.Prompt(words(1500))
    took = allocated(lambda: mllm.score(model, [prompt]))
    predicted = peak.score(CONFIG, tokens=1500, chunk=2048, itemsize=model.dtype.itemsize)
    assert 0.5 * took < predicted < 1.5 * took  # beside the pool and the layers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_whole_call_stays_below_its_pool_and_predicted_peak(model: mllm.Model, temperature: float) -> None:
    """The bound that `mllm.memory.allocate` holds against what is available: pictures, chunks, decode, recordings."""
    prompts = [
        mllm.Prompt([1, CONFIG.image_token_id, *words(20 + 300 * i, i)], [picture(160 + 64 * i, 320, i)]) for i in range(5)
    ]  # fmt: skip
    sampling = Sampling(temperature=temperature)
    made = requests.make_all(model, prompts, 8, sampling)
    pages = memory._pages(made, 5, model.memory)
    bound = memory._pool_bytes(pages, model.memory) + memory._peak(model, made, 5, model.memory).total
    took = allocated(lambda: mllm.generate(model, prompts, max_new_tokens=8, sampling=sampling))
    assert 0.5 * bound < took <= bound


def test_more_of_anything_never_takes_less() -> None:
    """`budget` and `memory` search for the largest limits that fit, which needs a peak that only grows."""
    base = {"prefill_tokens": 64, "rows": 4, "context": 256, "listed": 256, "patches": 64, "feature_tokens": 16}
    for name in ("qwen3-0.6b", "qwen3-vl-2b", "qwen3-vl-8b"):
        for device in ("cpu", "cuda"):
            for key in base:
                more = [Load(**{**base, key: base[key] * factor}) for factor in (1, 2, 3, 8, 100)]
                found = [peak.predict(families.preset(name), x, itemsize=2, device=device).total for x in more]
                assert found == sorted(found), (name, device, key)


@pytest.mark.cuda
@pytest.mark.parametrize("fraction", [0.5, 0.85])
def test_a_full_pool_leaves_a_gpu_room_for_the_declared_limits(device: str, fraction: float) -> None:
    """Weights, a pool of every profiled token, a chunk, 64 rows that draw, the largest picture; nothing else."""
    model = mllm.dummy("qwen3-vl-2b", device=device, mem_fraction_static=fraction)
    made = model.memory
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pages = made.profiled_tokens // made.page_size
    config, vision = model.config, model.weights.vision
    assert vision is not None
    assert config.vision is not None
    pool = KVPool.empty(config.text, pages=pages, page_size=made.page_size, device=device, dtype=model.dtype)
    table = RequestTable.empty(rows=64, pages=pages, page_size=made.page_size, row_pages=pages // 64)
    table, rows = stages.admit(table, [4096] * 64)
    chunk = Chunk(row=0, tokens=torch.ones(2048, dtype=torch.int32), positions=torch.zeros(3, 2048, dtype=torch.int32))
    side = int((made.image_pixels // 16**2) ** 0.5) // 2 * 2
    blank = torch.zeros(side * side, 768, dtype=torch.uint8, device=model.device)
    at = np.arange(side * side // 4)
    patches = requests.join_patches([blank], [(side, side)], at, ImageConfig(), device=model.device)
    with torch.inference_mode():
        stages.vit(vision, patches, config=config.vision, ops=model.ops)
        pool, _ = stages.prefill(model.weights, pool, pack(table, [chunk], device=device), config=config, ops=model.ops)
        batch = decode_batch(table, rows, [1] * 64, [0] * 64, size=64, listed=pages // 64, device=device)
        sampling = sampling_batch([Sampling(temperature=1.0)] * 64, size=64, device=device)
        stages.step(model.weights, pool, batch, sampling, config=config, ops=model.step_ops(64))
    took = torch.cuda.max_memory_allocated() - before
    assert took <= pages * made.page_size * made.bytes_per_token * 1.001 + made.peak.total
    assert pages * made.page_size * made.bytes_per_token + made.weight_bytes >= 0.97 * made.static_bytes


@pytest.mark.cuda
@pytest.mark.parametrize("patches", [64, 256, 1024, 4096])
def test_an_encoder_of_a_gpu_takes_what_was_predicted(device: str, patches: int) -> None:
    model = mllm.dummy("qwen3-vl-2b", device=device)
    assert model.weights.vision is not None
    assert model.config.vision is not None
    assert model.vision_ops is not None
    pixels = torch.zeros(patches, 768, dtype=torch.uint8, device=model.device)
    grid, at = (patches // 8, 8), np.arange(patches // 4)
    batch = requests.join_patches([pixels], [grid], at, ImageConfig(), device=model.device)
    for _ in range(2):  # workspaces first
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stages.vit(model.weights.vision, batch, config=model.config.vision, ops=model.vision_ops)
        took = torch.cuda.max_memory_allocated() - before
    load = Load(prefill_tokens=1, rows=1, context=1, listed=1, patches=patches)
    assert took <= peak.predict(model.config, load, itemsize=2, device=device).encoder
