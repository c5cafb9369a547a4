"""How much KV pool a call gets: what its requests need, at most what the budget has, and room for what runs beside it."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from mllm import buckets, budget, peak, requests
from mllm.budget import PREFILL_TOKENS, MemoryProfile, gigabytes
from mllm.errors import MemoryBudgetError, PromptError
from mllm.model import Model
from mllm.peak import Load, Peak
from mllm.requests import Request
from mllm.table import RequestTable


def allocate(
    model: Model, made: Sequence[Request], *, rows: int, profile: MemoryProfile, reuse: bool = True
) -> RequestTable:
    """A request table for at most `rows` rows, over as many pages as their largest requests need or as `profile`
    allows; fewer rows where pool and peak of so many exceed what is available now.

    `reuse`: whether the call will take the pool that the last one left; it has to go where a call needs its memory.
    Raises `MemoryBudgetError`, before anything is allocated, where one row exceeds it.
    """
    free, size = budget.available(model.device), profile.page_size
    longest = -(-max(request.slots for request in made) // size)
    room = free + (model.shelf.nbytes if reuse else 0)
    pool, beside = _bytes(model, made, rows, profile)
    if beside > free or pool + beside > room:
        model.shelf.clear()
        gc.collect()  # earlier calls that failed may hang in their tracebacks, with their pools
        room = budget.available(model.device)
    while pool + beside > room:
        if rows == 1:
            raise MemoryBudgetError(_refusal(model, made, profile, room))
        rows -= 1
        pool, beside = _bytes(model, made, rows, profile)
    pages = _pages(made, rows, profile)
    return RequestTable.empty(rows=rows, pages=pages, page_size=size, row_pages=longest)


def pool_pages(model: Model, table: RequestTable) -> int:
    """Usable pages of the pool for a table.

    On a GPU pool and recordings outlive the call, so the pool is rounded up to a power of two, that the next call
    finds it large enough: by as much as the budget has, half of what is available, and the declared limits leave.
    """
    needed, size = len(table.free), table.page_size
    if not model.pads:
        return needed
    page_bytes = size * model.memory.bytes_per_token
    free = budget.available(model.device) + model.shelf.nbytes
    most = min(model.memory.effective_tokens // size, min(free // 2, free - model.memory.peak.total) // page_bytes)
    return max(needed, min(buckets.power_of_two(needed), most))


def _bytes(model: Model, made: Sequence[Request], rows: int, profile: MemoryProfile) -> tuple[int, int]:
    """Bytes of the pool for `rows` rows, and of what runs beside it."""
    return _pool_bytes(_pages(made, rows, profile), profile), _peak(model, made, rows, profile).total


def _pages(made: Sequence[Request], rows: int, profile: MemoryProfile) -> int:
    """Pages of the pool: the `rows` largest requests', at most the budget's."""
    needed = sorted((-(-request.slots // profile.page_size) for request in made), reverse=True)
    return min(sum(needed[:rows]), profile.effective_tokens // profile.page_size)


def _pool_bytes(pages: int, profile: MemoryProfile) -> int:
    return (pages + 1) * profile.page_size * profile.bytes_per_token  # and the sink


def _peak(model: Model, made: Sequence[Request], rows: int, profile: MemoryProfile) -> Peak:
    """What runs beside the pool when the largest `rows` requests run together."""
    held = min(max(request.slots for request in made), profile.effective_tokens)
    pictured = sorted((sum(request.layout.counts) for request in made), reverse=True)
    patches = max(requests.largest_batch(model, request) for request in made)
    pages = -(-held // profile.page_size)
    padded, listed = buckets.decode_size(model.pads, rows, pages, pages)
    load = Load(
        prefill_tokens=min(PREFILL_TOKENS, buckets.quarter(sum(request.length for request in made), 16)), rows=padded,
        context=min(max(request.length for request in made), profile.effective_tokens),
        listed=min(listed * profile.page_size, held * 2), patches=patches, feature_tokens=sum(pictured[:rows]),
        greedy=all(request.sampling.temperature == 0 for request in made),
    )  # fmt: skip
    return peak.predict(model.config, load, itemsize=model.dtype.itemsize, device=model.device.type)


def _refusal(model: Model, made: Sequence[Request], profile: MemoryProfile, free: int) -> str:
    """Why not even one of the requests can run, and how long the longest context is that could."""
    need, beside = _pool_bytes(_pages(made, 1, profile), profile), _peak(model, made, 1, profile)
    tokens = max((free - beside.total) // profile.bytes_per_token - 2 * profile.page_size, 0)
    cause = (
        f"the largest request needs {gigabytes(need)} of KV pool and {gigabytes(beside.total)} beside it, and "
        f"{gigabytes(free)} are available now"
    )
    remedy = (
        f"A context of about {min(tokens, profile.longest)} tokens would fit. Shorten the prompt, lower max_new_tokens, "
        "use smaller or fewer pictures, or free memory on the device."
    )
    return budget.refusal(profile, cause, remedy)


def check_score(model: Model, length: int) -> None:
    """Raises `MemoryBudgetError` where the logits of a prompt alone are more than is available."""
    need = peak.score(model.config, tokens=length, chunk=PREFILL_TOKENS, itemsize=model.dtype.itemsize)
    if need > budget.available(model.device):
        model.shelf.clear()
    if need > (free := budget.available(model.device)):
        cause = f"the logits of {length} tokens need {gigabytes(need)}, and {gigabytes(free)} are available"
        most = length * free // need
        raise MemoryBudgetError(budget.refusal(model.memory, cause, f"Score at most about {most} tokens at once."))


def fit(request: Request, table: RequestTable, profile: MemoryProfile) -> Request:
    """The request, cut to what one row can hold of it. Raises `PromptError` where that is not even its prompt."""
    if request.slots <= table.row_tokens:
        return request
    if request.length > table.row_tokens:
        what = requests.describe(request.layout)
        raise PromptError(
            f"prompts[{request.index}]: {what} exceed the KV pool of {table.row_tokens} tokens\n{budget.table(profile)}"
        )
    return request.cut_to(table.row_tokens)
