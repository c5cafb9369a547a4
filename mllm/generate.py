"""The loop over the stages: prompts in, tokens and text out. Start reading here.

    admit -> vit -> prefill -> sample -> [decode -> sample -> advance] ... -> commit -> release

Rows are admitted as they come free, and the tokens of a request do not depend on who shares its batch.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from mllm import buckets, budget, memory, requests, segments, stages
from mllm.batch import ForwardBatch, SamplingBatch, VisionTokens, decode_batch, pack, upload_all
from mllm.budget import MAX_ROWS, PREFILL_TOKENS
from mllm.cache import KVPool
from mllm.completion import Completion, Piece, join
from mllm.errors import ImageError
from mllm.model import Model
from mllm.programs import INFERENCE, Lease, Programs, make_programs
from mllm.prompts import Prompt
from mllm.requests import Request
from mllm.runs import Read, Run
from mllm.sampling import Sampling, sampling_batch
from mllm.segments import Segment
from mllm.state import alias
from mllm.table import RequestTable

AHEAD = {False: 1, True: 2}  # by whether the model pads
"""Steps whose tokens may be on their way to the host at once: more than one only where a batch lists all the pages that its
rows will need (`buckets.decode_size`), for a new batch starts from tokens that were read."""
GREEDY = Sampling()


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Complete every prompt; `max_new_tokens` and `sampling` are one for all or one for each.

    `max_running_requests` bounds the rows that decode together, `max_total_tokens` the KV pool (rounded down to
    pages; it bounds what `model.memory` has room for, and is cut to that with a warning). `progress` prints the memory
    budget and a bar to standard error.

    Raises `PromptError`, `ImageError`, `MemoryBudgetError`, `ValueError` or `TypeError` before anything runs for what
    can never run. What fails later fails its own request, with `finish_reason` "error": a picture that cannot be
    decoded, logits that are not finite. Memory that runs out fails the requests of the batch that needed it (one in
    the encoder, those of a prefill batch, those that decode together); the others' keys and values are as they were,
    and they go on. Any other exception, and closing a stream, ends the call. The next one finds every page free: what
    a GPU keeps for it, programs and pool, is let go of where a stage was at work on the pool.
    """
    made = requests.make_all(model, prompts, max_new_tokens, sampling)
    pieces: list[list[Piece]] = [[] for _ in made]
    with tqdm(total=len(made), desc="prompts", disable=not progress) as bar:
        for piece in _run(model, made, max_running_requests, max_total_tokens, progress=progress):
            pieces[piece.index].append(piece)
            bar.update(piece.finish_reason is not None)
    return [join(own, request.length) for request, own in zip(made, pieces, strict=True)]


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
) -> Iterator[Piece]:
    """As `generate`, token by token as they are made. Closing the iterator early abandons what still runs."""
    made = requests.make_all(model, prompts, max_new_tokens, sampling)
    return _run(model, made, max_running_requests, max_total_tokens)


def score(model: Model, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Logits at every prompt position: f32 [T V] for each prompt, on the model's device."""
    scores = []
    programs = make_programs(model)
    for request in requests.make_all(model, prompts, 1, GREEDY):
        memory.check_score(model, request.length)
        table = memory.allocate(model, [request], rows=1, profile=model.memory, reuse=False)
        memory.fit(request, table, model.memory)
        pool = _pool(model, table, len(table.free))
        table, rows = stages.admit(table, [request.slots])
        features = {request.index: _encode(model, programs, request)} if request.prompt.images else {}
        parts = []
        for batch in segments.cut([(request, rows[0])], limit=PREFILL_TOKENS):
            tokens = pack(table, [segment.chunk() for segment in batch], device=model.device, every=True)
            pool, logits = programs.prefill(pool, tokens, segments.crop(features, batch), padded=False)
            table = _commit(table, batch)
            parts.append(logits)
        scores.append(torch.cat(parts))
    return scores


def _run(
    model: Model,
    made: Sequence[Request],
    max_running_requests: int | None,
    max_total_tokens: int | None,
    *,
    progress: bool = False,
) -> Iterator[Piece]:
    """Check the limits, which are the caller's, and only then hand out the loop, which runs when it is asked."""
    requests.check_limit("max_running_requests", max_running_requests, 1)
    requests.check_limit("max_total_tokens", max_total_tokens, model.memory.page_size)
    if not made:
        return iter(())
    profile = budget.bound(model.memory, max_total_tokens)
    if progress:
        print(budget.table(profile), file=sys.stderr)
    rows = min(len(made), max_running_requests or MAX_ROWS)
    table = memory.allocate(model, made, rows=rows, profile=profile)
    return _loop(model, deque(memory.fit(request, table, profile) for request in made), table)


def _pool(model: Model, table: RequestTable, pages: int) -> KVPool:
    size = table.page_size
    return KVPool.empty(model.config.text, pages=pages, page_size=size, device=model.device, dtype=model.dtype)


def _loop(model: Model, waiting: deque[Request], table: RequestTable) -> Iterator[Piece]:
    """Lend the turns what they run on, and take it back however they end."""
    lease = model.shelf.take(model, len(table.free), lambda: _pool(model, table, memory.pool_pages(model, table)))
    try:
        yield from _turns(model, waiting, table, lease)
    finally:
        model.shelf.put(model, lease)


def _turns(model: Model, waiting: deque[Request], table: RequestTable, lease: Lease) -> Iterator[Piece]:
    """The loop itself. Each turn admits what fits, then runs one prefill batch or else one decode step.

    A GPU's tokens are read one step behind: the next step is on its way while the host looks at those of the last.
    """
    programs = lease.programs
    most = AHEAD[model.pads]
    runs: dict[int, Run] = {}  # by row
    prompts: deque[list[Segment]] = deque()  # the admitted prompts' tokens, in batches to prefill
    features: dict[int, VisionTokens] = {}  # of their images, by request
    decoding: list[Run] = []  # the runs whose prompts are through,
    batch: ForwardBatch | None = None  # their batch, the carry of decode: None once it has to be made anew,
    longest = 0  # the tokens of their longest context,
    reads: deque[Read] = deque()  # and the tokens of the steps that were launched
    while waiting or runs:
        pieces: list[tuple[int, Piece]] = []
        if waiting and batch is None and not reads:
            table, rows = stages.admit(table, [r.slots for r in islice(waiting, len(table.live))])
            for row in rows:
                runs[row] = Run(waiting.popleft(), row, model.tokenizer.stream() if model.tokenizer else None)
            pieces = _encode_all(model, programs, [runs[row] for row in rows], features)
            failed = {row for row, _ in pieces}
            prompts.extend(segments.cut([(runs[r].request, r) for r in rows if r not in failed], limit=PREFILL_TOKENS))
        drawn: dict[int, int] = {}  # the next token of each row that has one
        kept = alias(
            lease.pool
        )  # where a stage fails: it wrote only slots beyond what is committed, so nobody's tokens
        if reads and (batch is None or len(reads) == most or min(r.wanted for r in decoding) <= len(reads)):
            drawn = {row: token for row, token in reads.popleft().get() if row in runs}
        elif prompts:
            part = prompts.popleft()
            batch = None
            try:
                lease.pool, drawn = _prefill_and_draw(model, programs, lease.pool, table, part, features)
            except torch.OutOfMemoryError as error:
                lease.pool = kept
                pieces += _out_of_memory("prefill", [runs[row] for row in {s.row for s in part}], error)
                prompts = deque(segments.without(prompts, {row for row, _ in pieces}))
            else:
                table = _commit(table, part)
        elif len(pieces) < len(runs):
            try:
                if batch is None or batch.pages.shape[1] < table.pages_for(longest + 1):
                    decoding = [run for run in runs.values() if run.tokens]
                    longest = max(int(table.length[run.row]) for run in decoding)
                    batch, sampling = _decode_batch(model, table, decoding, longest + 1)
                lease.pool, batch, tokens = programs.step(lease.pool, batch, sampling)
            except torch.OutOfMemoryError as error:
                lease.pool, batch = kept, None
                reads.clear()
                pieces += _out_of_memory("decode", decoding, error)
            else:
                longest += 1
                table = stages.commit(table, [run.row for run in decoding], [1] * len(decoding))
                reads.append(Read(tokens, [run.row for run in decoding], programs.reads))
        pieces += [(row, runs[row].push(token, model.config.end_tokens)) for row, token in drawn.items()]
        yield from (piece for _, piece in pieces)
        if done := [row for row, piece in pieces if piece.finish_reason]:
            table = stages.release(table, done)
            batch = None
            for row in done:
                features.pop(runs.pop(row).request.index, None)


def _out_of_memory(stage: str, runs: Sequence[Run], error: BaseException) -> list[tuple[int, Piece]]:
    """The ends of requests whose batch had no memory to run in: (row, piece) of each."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return [(run.row, run.fail(f"out of memory in {stage}, {len(runs)} requests at once: {reason}")) for run in runs]


def _encode_all(
    model: Model, programs: Programs, runs: Sequence[Run], features: dict[int, VisionTokens]
) -> list[tuple[int, Piece]]:
    """Put the features of every run's images into `features`; a picture that cannot be decoded ends its run."""
    failed = []
    for run in runs:
        try:
            if run.request.prompt.images:
                features[run.request.index] = _encode(model, programs, run.request)
        except ImageError as error:
            failed.append((run.row, run.fail(str(error))))
        except (torch.OutOfMemoryError, MemoryError) as error:
            failed += _out_of_memory("the vision encoder", [run], error)
    return failed


@INFERENCE
def _encode(model: Model, programs: Programs, request: Request) -> VisionTokens:
    """The features of the images of one request."""
    parts = []
    for part in requests.image_batches(model, request):
        grids, tokens = request.layout.grids[part], sum(request.layout.counts[part])
        patches = sum(rows * cols for rows, cols in grids)
        size = buckets.patch_size(model.pads, patches, len(grids), patches // tokens)
        made = programs.vit(requests.patch_batch(model, request, part, size), padded=size is not None)
        parts.append(made.first(tokens))
    return segments.join(parts)


@INFERENCE
def _prefill_and_draw(
    model: Model,
    programs: Programs,
    pool: KVPool,
    table: RequestTable,
    part: Sequence[Segment],
    features: dict[int, VisionTokens],
) -> tuple[KVPool, dict[int, int]]:
    """Run one batch of prompt segments; the first new token of each row whose prompt ends in it. Commits nothing."""
    count, listed = sum(s.stop - s.start for s in part), max(table.pages_for(s.stop) for s in part)
    size = buckets.prompt_size(model.pads, count, len(part), listed, segments.pictured(part))
    batch = pack(table, [segment.chunk() for segment in part], device=model.device, size=size)
    vision = segments.crop(features, part, size.merged if size else None)
    pool, logits = programs.prefill(pool, batch, vision, padded=size is not None)
    if not any(segment.completes for segment in part):  # nothing to wait for
        return pool, {}
    settings = sampling_batch([s.request.sampling for s in part], size=len(part), device=model.device)
    (lengths,) = upload_all([torch.tensor([s.stop for s in part], dtype=torch.int32)], model.device)
    tokens = stages.sample(logits[: len(part)], settings, lengths, ops=model.ops).tolist()
    through = [(s, token) for s, token in zip(part, tokens, strict=True) if s.completes]
    for segment, _ in through:
        features.pop(segment.request.index, None)
    return pool, {segment.row: token for segment, token in through}


def _commit(table: RequestTable, part: Sequence[Segment]) -> RequestTable:
    return stages.commit(table, [s.row for s in part], [s.stop - s.start for s in part])


def _decode_batch(
    model: Model, table: RequestTable, runs: Sequence[Run], longest: int
) -> tuple[ForwardBatch, SamplingBatch]:
    """The carry of decode for these rows, with room for contexts of `longest` tokens, and their settings."""
    held = max(int(table.held[run.row]) for run in runs)
    size, listed = buckets.decode_size(model.pads, len(runs), table.pages_for(longest), held)
    batch = decode_batch(
        table,
        [run.row for run in runs],
        [run.tokens[-1] for run in runs],
        [run.request.layout.delta for run in runs],
        size=size,
        listed=listed,
        device=model.device,
    )
    return batch, sampling_batch([run.request.sampling for run in runs], size=size, device=model.device)
