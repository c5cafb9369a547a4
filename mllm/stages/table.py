"""Stages on the request table: `admit`, `extend`, `commit`, `release`. They run on the host.

Full is a value (fewer rows come back), wrong is an error, and an error leaves the table as it was: every check
comes before the table is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm.cache import SINK
from mllm.errors import TableError
from mllm.state import donate, replace
from mllm.table import RequestTable

Rows = tuple[int, ...]


def admit(table: RequestTable, tokens: Sequence[int]) -> tuple[RequestTable, Rows]:
    """Give each request a row and the pages for all the tokens it may come to hold, first come first served.

    `tokens[i]` counts prompt and completion of request i. Returns the table and one row per admitted request;
    there are fewer rows than requests when rows or pages run out, and the requests after that one wait, so that
    a long request is not starved by short ones behind it.

    Raises `TableError` for a request that could never be admitted, even into an empty table.
    """
    for count in tokens:
        _check_fits(table, count)
    idle = (~table.live).nonzero().flatten().tolist()
    table = donate(table, to="admit")
    rows: list[int] = []
    n_free = table.n_free
    for row, count in zip(idle, tokens, strict=False):
        need = table.pages_for(count)
        if need > n_free:
            break
        n_free = _give(table, row, need, n_free)
        table.live[row] = True
        rows.append(row)
    return replace(table, n_free=n_free), tuple(rows)


def extend(table: RequestTable, rows: Sequence[int], tokens: Sequence[int]) -> tuple[RequestTable, Rows]:
    """Give live rows pages for `tokens[i]` tokens in all, for going on beyond what `admit` gave.

    Returns the table and the rows that now hold as much; those for which no page was left are not among them.
    """
    _check_live(table, rows, "extend")
    _check_pairs(rows, tokens, "extend")
    for count in tokens:
        _check_fits(table, count)
    table = donate(table, to="extend")
    granted: list[int] = []
    n_free = table.n_free
    for row, count in zip(rows, tokens, strict=True):
        need = table.pages_for(count) - int(table.held[row])
        if need > n_free:
            continue
        n_free = _give(table, row, max(need, 0), n_free)
        granted.append(row)
    return replace(table, n_free=n_free), tuple(granted)


def commit(table: RequestTable, rows: Sequence[int], tokens: Sequence[int]) -> RequestTable:
    """Record that the keys and values of `tokens[i]` more tokens of row `rows[i]` are in the pool."""
    _check_live(table, rows, "commit")
    _check_pairs(rows, tokens, "commit")
    held, length = table.held.numpy(), table.length.numpy()  # between two steps: NumPy costs a fourth of PyTorch here
    for row, count in zip(rows, tokens, strict=True):
        room = int(held[row]) * table.page_size - int(length[row])
        if not 0 <= count <= room:
            raise TableError(f"commit: row {row} has room for {room} more tokens, got {count}; extend it first")
    table = donate(table, to="commit")
    for row, count in zip(rows, tokens, strict=True):
        length[row] += count
    return table


def release(table: RequestTable, rows: Sequence[int]) -> RequestTable:
    """Give the pages of `rows` back. Raises `TableError` for a row that is not live, or named twice."""
    _check_live(table, rows, "release")
    table = donate(table, to="release")
    n_free = table.n_free
    for row in rows:
        held = int(table.held[row])
        table.free[n_free : n_free + held] = table.pages[row, :held].flip(0)
        table.pages[row] = SINK
        table.held[row] = table.length[row] = 0
        table.live[row] = False
        n_free += held
    return replace(table, n_free=n_free)


def _give(table: RequestTable, row: int, count: int, n_free: int) -> int:
    """Move `count` pages from the top of the stack to the end of `row`; returns what is left on the stack."""
    held = int(table.held[row])
    table.pages[row, held : held + count] = table.free[n_free - count : n_free].flip(0)
    table.held[row] = held + count
    return n_free - count


def _check_pairs(rows: Sequence[int], tokens: Sequence[int], stage: str) -> None:
    if len(rows) != len(tokens):
        raise TableError(f"{stage}: {len(tokens)} counts of tokens for {len(rows)} rows")


def _check_fits(table: RequestTable, tokens: int) -> None:
    if tokens < 1:
        raise TableError(f"a request of {tokens} tokens: expected 1 or more")
    if tokens > table.row_tokens:
        raise TableError(f"a request of {tokens} tokens can never fit: a row holds at most {table.row_tokens}")


def _check_live(table: RequestTable, rows: Sequence[int], stage: str) -> None:
    live = table.live.numpy()
    wrong = [row for row in rows if not 0 <= row < len(live) or not live[row]]
    if wrong:
        raise TableError(f"{stage}: rows {wrong} are not live; live are {live.nonzero()[0].tolist()}")
    if len(set(rows)) < len(rows):
        raise TableError(f"{stage}: a row is named twice in {list(rows)}")
