"""The loop over the stages: what `generate` and `stream` run.

admit -> vit -> prefill -> sample -> [decode -> sample -> advance] ... -> commit -> release
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from attrs import define, field

from mllm import buckets, requests, segments, stages
from mllm.batch import ForwardBatch, SamplingBatch, VisionTokens, decode_batch, pack, upload_all
from mllm.budget import PREFILL_TOKENS
from mllm.completion import Piece
from mllm.errors import ImageError
from mllm.model import Model
from mllm.programs import INFERENCE
from mllm.requests import Request
from mllm.runs import Read, Run
from mllm.sampling import sampling_batch
from mllm.segments import Segment
from mllm.shelf import Lease, Programs
from mllm.state import alias
from mllm.table import RequestTable

AHEAD = {False: 1, True: 2}  # by whether the model pads
"""Steps whose tokens may be on their way to the host at once: more than one only where a batch lists all the pages that its
rows will need (`buckets.decode_size`), for a new batch starts from tokens that were read."""
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""What a `RuntimeError` says of memory that ran out elsewhere than in the allocator of a GPU, for which PyTorch has an
exception: on a CPU, for a graph that is made executable, for the code of a kernel, in a library."""
Ends = list[tuple[int, Piece]]  # rows, each with the piece that a turn made of it


@define(eq=False, kw_only=True)
class Loop:
    """A call in the middle of its work: the states that the stages take and give back, and who runs where.

    `prompts`: tokens of admitted prompts, in batches to prefill. `features`: of their images, by request. `decoding`:
    the runs whose prompts are through; `batch` is theirs, the carry of decode, None once it has to be made anew, and
    `longest` the tokens of their longest context. `reads`: the tokens of steps that were launched.
    """

    model: Model
    lease: Lease
    table: RequestTable
    waiting: deque[Request]
    runs: dict[int, Run] = field(factory=dict)  # by row
    prompts: deque[list[Segment]] = field(factory=deque)
    features: dict[int, VisionTokens] = field(factory=dict)
    decoding: list[Run] = field(factory=list)
    batch: ForwardBatch | None = None
    sampling: SamplingBatch | None = None
    longest: int = 0
    reads: deque[Read] = field(factory=deque)

    def turns(self) -> Iterator[Piece]:
        """Each turn admits what fits, then reads the tokens of a step, or runs a batch of prompts, or launches a step.

        A GPU's tokens are read one step behind: the next step is on its way while the host looks at those of the last.
        """
        while self.waiting or self.runs:
            ends = self._admit() if self.waiting and self.batch is None and not self.reads else []
            if self._has_to_read():
                ends += self._push({row: token for row, token in self.reads.popleft().get() if row in self.runs})
            elif self.prompts:
                ends += self._prefill(self.prompts.popleft())
            elif len(ends) < len(self.runs):
                ends += self._step()
            yield from (piece for _, piece in ends)
            self._release([row for row, piece in ends if piece.finish_reason])

    def _admit(self) -> Ends:
        """Give rows to the requests that fit, and encode their images; ends those whose images fail."""
        model, lengths = self.model, [r.slots for r in islice(self.waiting, len(self.table.live))]
        self.table, rows = stages.admit(self.table, lengths)
        for row in rows:
            text = model.tokenizer.stream() if model.tokenizer else None
            self.runs[row] = Run(self.waiting.popleft(), row, text)
        failed = _encode_all(model, self.lease.programs, [self.runs[row] for row in rows], self.features)
        left = [(self.runs[row].request, row) for row in rows if row not in dict(failed)]
        self.prompts.extend(segments.cut(left, limit=PREFILL_TOKENS))
        return failed

    def _has_to_read(self) -> bool:
        """Whether no further step is to be launched before the tokens of one are read."""
        if not self.reads:
            return False
        full = len(self.reads) == AHEAD[self.model.pads]
        return full or self.batch is None or min(run.wanted for run in self.decoding) <= len(self.reads)

    def _prefill(self, part: list[Segment]) -> Ends:
        """Run one batch of prompt segments."""
        kept = alias(self.lease.pool)  # a stage that fails wrote only slots beyond what is committed: nobody's tokens
        self.batch = None
        try:
            drawn = _prefill_and_draw(self.model, self.lease, self.table, part, self.features)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self.lease.pool = kept
            failed = _out_of_memory("prefill", [self.runs[row] for row in {s.row for s in part}], error)
            self.prompts = deque(segments.without(self.prompts, set(dict(failed))))
            return failed
        self.table = commit(self.table, part)
        return self._push(drawn)

    def _step(self) -> Ends:
        """Launch one decode step of all rows whose prompts are through; its tokens are read later."""
        kept, programs = alias(self.lease.pool), self.lease.programs
        try:
            if self.batch is None or self.batch.pages.shape[1] < self.table.pages_for(self.longest + 1):
                self.decoding = [run for run in self.runs.values() if run.tokens]
                self.longest = max(int(self.table.length[run.row]) for run in self.decoding)
                self.batch, self.sampling = _decode_batch(self.model, self.table, self.decoding, self.longest + 1)
            self.lease.pool, self.batch, tokens = programs.step(self.lease.pool, self.batch, self.sampling)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self.lease.pool, self.batch = kept, None
            self.reads.clear()
            return _out_of_memory("decode", self.decoding, error)
        self.longest += 1
        rows = [run.row for run in self.decoding]
        self.table = stages.commit(self.table, rows, [1] * len(rows))
        self.reads.append(Read(tokens, rows, programs.reads))
        return []

    def _push(self, drawn: dict[int, int]) -> Ends:
        """Hand each row its next token."""
        return [(row, self.runs[row].push(token, self.model.config.end_tokens)) for row, token in drawn.items()]

    def _release(self, rows: list[int]) -> None:
        """Give back what ended requests held; those that go on need a new batch."""
        if not rows:
            return
        self.table = stages.release(self.table, rows)
        self.batch = None
        for row in rows:
            self.features.pop(self.runs.pop(row).request.index, None)


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether memory ran out: a GPU's, a CPU's, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)


def _out_of_memory(stage: str, runs: Sequence[Run], error: BaseException) -> Ends:
    """The ends of requests whose batch had no memory to run in."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return [(run.row, run.fail(f"out of memory in {stage}, {len(runs)} requests at once: {reason}")) for run in runs]


def _encode_all(model: Model, programs: Programs, runs: Sequence[Run], features: dict[int, VisionTokens]) -> Ends:
    """Put the features of every run's images into `features`; a picture that cannot be decoded ends its run."""
    failed: Ends = []
    for run in runs:
        try:
            if run.request.prompt.images:
                features[run.request.index] = encode(model, programs, run.request)
        except ImageError as error:
            failed.append((run.row, run.fail(str(error))))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            failed += _out_of_memory("the vision encoder", [run], error)
    return failed


@INFERENCE
def encode(model: Model, programs: Programs, request: Request) -> VisionTokens:
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
    model: Model, lease: Lease, table: RequestTable, part: Sequence[Segment], features: dict[int, VisionTokens]
) -> dict[int, int]:
    """Run one batch of prompt segments; the first new token of each row whose prompt ends in it. Commits nothing."""
    count, listed = sum(s.stop - s.start for s in part), max(table.pages_for(s.stop) for s in part)
    size = buckets.prompt_size(model.pads, count, len(part), listed, segments.pictured(part))
    batch = pack(table, [segment.chunk() for segment in part], device=model.device, size=size)
    vision = segments.crop(features, part, size.merged if size else None)
    lease.pool, logits = lease.programs.prefill(lease.pool, batch, vision, padded=size is not None)
    if not any(segment.completes for segment in part):  # nothing to wait for
        return {}
    settings = sampling_batch([s.request.sampling for s in part], size=len(part), device=model.device)
    (lengths,) = upload_all([torch.tensor([s.stop for s in part], dtype=torch.int32, device="cpu")], model.device)
    tokens = stages.sample(logits[: len(part)], settings, lengths, ops=model.ops).tolist()
    through = [(s, token) for s, token in zip(part, tokens, strict=True) if s.completes]
    for segment, _ in through:
        features.pop(segment.request.index, None)
    return {segment.row: token for segment, token in through}


def commit(table: RequestTable, part: Sequence[Segment]) -> RequestTable:
    """Record that the keys and values of a batch of segments are in the pool."""
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
