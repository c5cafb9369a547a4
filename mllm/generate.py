"""The loop over the stages: prompts in, tokens and text out. Start reading here.

    admit -> vit -> prefill -> sample -> [decode -> sample -> advance] ... -> commit -> release

Rows are admitted as they come free, and the tokens of a request do not depend on who shares its batch.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from attrs import define, field
from torch import Tensor
from tqdm import tqdm

from mllm import budget, memory, requests, stages
from mllm.batch import ForwardBatch, SamplingBatch, VisionTokens, decode_batch, pack
from mllm.budget import MAX_ROWS, PREFILL_TOKENS
from mllm.cache import KVPool
from mllm.completion import Completion, Piece, join
from mllm.errors import ImageError
from mllm.model import Model
from mllm.prompts import Prompt
from mllm.requests import Request, Segment
from mllm.sampling import Sampling, sampling_batch
from mllm.state import alias
from mllm.table import RequestTable
from mllm.tokenizer import TextStream
from mllm.transform import capture

RECORDINGS = 1024
"""Recordings of the decode step that one call may make: a size of batch times a power of two of listed pages."""
GREEDY = Sampling()
INFERENCE = torch.inference_mode()
"""Around whole stages, never around a `yield`, which would hand it to the caller: a small model's step is a tenth
shorter without autograd's part in every call."""


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
    and they go on. Any other exception, and closing a stream, ends the call: nothing outlives it, so the next one
    finds what this one found.
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
    for request in requests.make_all(model, prompts, 1, GREEDY):
        memory.check_score(model, request.length)
        pool, table = memory.allocate(model, [request], rows=1, profile=model.memory)
        memory.fit(request, table, model.memory)
        table, rows = stages.admit(table, [request.slots])
        features = {request.index: _encode(model, request)} if request.prompt.images else {}
        parts = []
        for segments in requests.cut([(request, rows[0])], limit=PREFILL_TOKENS):
            pool, logits = _prefill(model, pool, table, segments, features, every=True)
            table = _commit(table, segments)
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
    pool, table = memory.allocate(model, made, rows=rows, profile=profile)
    return _loop(model, deque(memory.fit(request, table, profile) for request in made), pool, table)


@define(eq=False)
class _Run:
    """A request that holds a row. The one mutable thing here: what was made of the request so far."""

    request: Request
    row: int
    text: TextStream | None
    tokens: list[int] = field(factory=list)

    def push(self, token: int, end_tokens: Sequence[int]) -> Piece:
        """Take the next token, and say what it completes and whether it is the last."""
        if token < 0:
            return self.fail(f"the logits after {self.request.length + len(self.tokens)} tokens are not finite")
        self.tokens.append(token)
        reason = None
        if token in end_tokens:
            reason = "stop"
        elif len(self.tokens) == self.request.new_tokens:
            reason = self.request.limit_reason
        text = ""
        if self.text is not None:
            text = self.text.push(token) + (self.text.flush() if reason else "")
        return Piece(index=self.request.index, token=token, text=text, finish_reason=reason)

    def fail(self, error: str) -> Piece:
        """End the request here, and only it."""
        text = self.text.flush() if self.text else ""
        return Piece(index=self.request.index, token=-1, text=text, finish_reason="error", error=error)


def _loop(model: Model, waiting: deque[Request], pool: KVPool, table: RequestTable) -> Iterator[Piece]:
    """The loop itself. Each turn admits what fits, then runs one prefill batch or else one decode step."""
    step = INFERENCE(capture(partial(_step, model), donate=("pool",), carry=("batch",), limit=RECORDINGS))
    runs: dict[int, _Run] = {}  # by row
    prompts: deque[list[Segment]] = deque()  # the admitted prompts' tokens, in batches to prefill
    features: dict[int, VisionTokens] = {}  # of their images, by request
    decoding: list[_Run] = []  # the runs whose prompts are through,
    batch: ForwardBatch | None = None  # their batch, the carry of decode: None once it has to be made anew,
    longest = 0  # and the tokens of their longest context
    while waiting or runs:
        pieces: list[tuple[int, Piece]] = []
        if waiting and batch is None:
            table, rows = stages.admit(table, [r.slots for r in islice(waiting, len(table.live))])
            for row in rows:
                runs[row] = _Run(waiting.popleft(), row, model.tokenizer.stream() if model.tokenizer else None)
            pieces = _encode_all(model, [runs[row] for row in rows], features)
            failed = {row for row, _ in pieces}
            prompts.extend(requests.cut([(runs[r].request, r) for r in rows if r not in failed], limit=PREFILL_TOKENS))
        drawn: dict[int, int] = {}  # the next token of each row that has one
        kept = alias(pool)  # where a stage fails: it wrote only slots beyond what is committed, so nobody's tokens
        if prompts:
            segments = prompts.popleft()
            batch = None
            try:
                pool, drawn = _prefill_and_draw(model, pool, table, segments, features)
            except torch.OutOfMemoryError as error:
                pool = kept
                pieces += _out_of_memory("prefill", [runs[row] for row in {s.row for s in segments}], error)
                prompts = deque(requests.without(prompts, {row for row, _ in pieces}))
            else:
                table = _commit(table, segments)
        elif len(pieces) < len(runs):
            try:
                if batch is None or batch.pages.shape[1] < table.pages_for(longest + 1):
                    decoding = [run for run in runs.values() if run.tokens]
                    longest = max(int(table.length[run.row]) for run in decoding)
                    batch, sampling = _decode_batch(model, table, decoding, longest + 1)
                pool, batch, tokens = step(pool, batch, sampling)
            except torch.OutOfMemoryError as error:
                pool, batch = kept, None
                pieces += _out_of_memory("decode", decoding, error)
            else:
                longest += 1
                table = stages.commit(table, [run.row for run in decoding], [1] * len(decoding))
                drawn = dict(zip((run.row for run in decoding), tokens.tolist(), strict=False))
        pieces += [(row, runs[row].push(token, model.config.end_tokens)) for row, token in drawn.items()]
        yield from (piece for _, piece in pieces)
        if done := [row for row, piece in pieces if piece.finish_reason]:
            table = stages.release(table, done)
            batch = None
            for row in done:
                features.pop(runs.pop(row).request.index, None)


def _out_of_memory(stage: str, runs: Sequence[_Run], error: BaseException) -> list[tuple[int, Piece]]:
    """The ends of requests whose batch had no memory to run in: (row, piece) of each."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return [(run.row, run.fail(f"out of memory in {stage}, {len(runs)} requests at once: {reason}")) for run in runs]


@INFERENCE
def _encode_all(model: Model, runs: Sequence[_Run], features: dict[int, VisionTokens]) -> list[tuple[int, Piece]]:
    """Put the features of every run's images into `features`; a picture that cannot be decoded ends its run."""
    failed = []
    for run in runs:
        try:
            if run.request.prompt.images:
                features[run.request.index] = _encode(model, run.request)
        except ImageError as error:
            failed.append((run.row, run.fail(str(error))))
        except (torch.OutOfMemoryError, MemoryError) as error:
            failed += _out_of_memory("the vision encoder", [run], error)
    return failed


def _encode(model: Model, request: Request) -> VisionTokens:
    """The features of the images of one request."""
    if model.config.vision is None or model.weights.vision is None:
        raise ImageError("a model that reads only text was given an image")
    parts = (requests.patch_batch(model, request, part) for part in requests.image_batches(model, request))
    vit = partial(stages.vit, model.weights.vision, config=model.config.vision, ops=model.ops)
    return requests.join([vit(part) for part in parts])


def _prefill(
    model: Model,
    pool: KVPool,
    table: RequestTable,
    segments: Sequence[Segment],
    features: dict[int, VisionTokens],
    *,
    every: bool = False,
) -> tuple[KVPool, Tensor]:
    """Run one batch of prompt segments; logits after the last token of each, or after every token. Commits nothing."""
    batch = pack(table, [segment.chunk() for segment in segments], device=model.device, every=every)
    vision = requests.crop(features, segments)
    return stages.prefill(model.weights, pool, batch, vision, config=model.config, ops=model.ops)


def _commit(table: RequestTable, segments: Sequence[Segment]) -> RequestTable:
    return stages.commit(table, [s.row for s in segments], [s.stop - s.start for s in segments])


@INFERENCE
def _prefill_and_draw(
    model: Model, pool: KVPool, table: RequestTable, segments: Sequence[Segment], features: dict[int, VisionTokens]
) -> tuple[KVPool, dict[int, int]]:
    """Run one batch of prompt segments; the first new token of each row whose prompt ends in it."""
    pool, logits = _prefill(model, pool, table, segments, features)
    settings = sampling_batch([s.request.sampling for s in segments], size=len(segments), device=model.device)
    lengths = torch.tensor([s.stop for s in segments], dtype=torch.int32, device=model.device)
    tokens = stages.sample(logits, settings, lengths, ops=model.ops).tolist()
    through = [(s, token) for s, token in zip(segments, tokens, strict=True) if s.completes]
    for segment, _ in through:
        features.pop(segment.request.index, None)
    return pool, {segment.row: token for segment, token in through}


def _step(
    model: Model, pool: KVPool, batch: ForwardBatch, sampling: SamplingBatch
) -> tuple[KVPool, ForwardBatch, Tensor]:
    """One decode step, with the ops that are fastest for as many rows as the batch has."""
    ops = model.step_ops(len(batch.lengths))
    return stages.step(model.weights, pool, batch, sampling, config=model.config, ops=ops)


def _decode_batch(
    model: Model, table: RequestTable, runs: Sequence[_Run], longest: int
) -> tuple[ForwardBatch, SamplingBatch]:
    """The carry of decode for these rows, with room for contexts of `longest` tokens, and their settings."""
    size, listed = memory.decode_shape(model.device, len(runs), table.pages_for(longest))
    batch = decode_batch(
        table,
        [run.row for run in runs],
        [run.tokens[-1] for run in runs],
        [run.request.layout.delta for run in runs],
        size=size,
        listed=min(listed, table.pages.shape[1]),
        device=model.device,
    )
    return batch, sampling_batch([run.request.sampling for run in runs], size=size, device=model.device)
