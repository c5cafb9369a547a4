"""The request table: pages are conserved, and it does what a dict of lists does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import examples

from mllm.batch import Chunk, Size, pack, slots_of
from mllm.cache import SINK
from mllm.errors import DonatedError, TableError
from mllm.stages import admit, commit, extend, release
from mllm.state import is_donated, leaves
from mllm.table import RequestTable


def snapshot(table: RequestTable) -> list[Any]:
    return [*(t.clone() for t in leaves(table)), table.n_free, table.page_size]


def refused(table: RequestTable, call: Callable[[], object], words: str) -> None:
    """`call` is a `TableError` that leaves the table alive and as it was."""
    before = snapshot(table)
    with pytest.raises(TableError, match=words):
        call()
    assert not is_donated(table)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(before, snapshot(table), strict=True))  # fmt: skip


def owned(table: RequestTable) -> dict[int, list[int]]:
    """The pages that each row lists, whether it is alive or not."""
    return {row: [p for p in pages if p != SINK] for row, pages in enumerate(table.pages.tolist())}


class Model:
    """The same table as plain dicts: pages held, tokens promised, tokens committed of each live row."""

    def __init__(self, rows: int, pages: int, page_size: int, row_pages: int) -> None:
        self.rows, self.pages, self.page_size, self.row_pages = rows, pages, page_size, row_pages
        self.held: dict[int, int] = {}
        self.length: dict[int, int] = {}

    @property
    def free(self) -> int:
        return self.pages - sum(self.held.values())

    def need(self, tokens: int) -> int:
        return (tokens + self.page_size - 1) // self.page_size


class TableMachine(RuleBasedStateMachine):
    @initialize(
        rows=st.integers(1, 5), pages=st.integers(1, 24), page_size=st.integers(1, 5), row_pages=st.integers(1, 24)
    )
    def start(self, rows: int, pages: int, page_size: int, row_pages: int) -> None:
        self.table = RequestTable.empty(rows=rows, pages=pages, page_size=page_size, row_pages=row_pages)
        self.model = Model(rows, pages, page_size, min(pages, row_pages))
        assert self.table.row_tokens == self.model.row_pages * page_size

    def fits(self, count: int) -> bool:
        return 1 <= count <= self.model.row_pages * self.model.page_size

    @rule(tokens=st.lists(st.integers(-1, 60), max_size=7))
    def admit(self, tokens: list[int]) -> None:
        model = self.model
        if not all(map(self.fits, tokens)):
            refused(self.table, lambda: admit(self.table, tokens), "a request of")
            return
        expected = 0
        free = model.free
        for count in tokens[: model.rows - len(model.held)]:
            if model.need(count) > free:
                break
            free -= model.need(count)
            expected += 1
        old = self.table
        self.table, rows = admit(old, tokens)
        with pytest.raises(DonatedError, match="admit"):
            _ = old.pages
        assert len(rows) == expected  # full is a value: fewer rows
        assert not set(rows) & set(model.held)
        for row, count in zip(rows, tokens, strict=False):
            model.held[row], model.length[row] = model.need(count), 0

    def some(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.model.held)), unique=True)) if self.model.held else []

    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        model, rows = self.model, self.some(data)
        counts = data.draw(st.lists(st.integers(0, 60), min_size=len(rows), max_size=len(rows)))
        if not all(map(self.fits, counts)):
            refused(self.table, lambda: extend(self.table, rows, counts), "a request of")
            return
        expected = []
        for row, count in zip(rows, counts, strict=True):
            more = max(model.need(count) - model.held[row], 0)
            if more <= model.free:
                model.held[row] += more
                expected.append(row)
        self.table, granted = extend(self.table, rows, counts)
        assert list(granted) == expected

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        model, rows = self.model, self.some(data)
        counts = data.draw(st.lists(st.integers(-1, 12), min_size=len(rows), max_size=len(rows)))
        rooms = [model.held[row] * model.page_size - model.length[row] for row in rows]
        if not all(0 <= count <= room for count, room in zip(counts, rooms, strict=True)):
            refused(self.table, lambda: commit(self.table, rows, counts), "room for")
            return
        self.table = commit(self.table, rows, counts)
        for row, count in zip(rows, counts, strict=True):
            model.length[row] += count

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        rows = self.some(data)
        self.table = release(self.table, rows)
        for row in rows:
            del self.model.held[row], self.model.length[row]

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def release_of_a_row_named_twice_is_an_error(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.model.held)))
        refused(self.table, lambda: release(self.table, [row, row]), "twice")

    @rule(data=st.data(), stage=st.sampled_from(["extend", "commit", "release"]))
    def a_row_that_is_not_live_is_an_error(self, data: st.DataObject, stage: str) -> None:
        dead = sorted({-1, self.model.rows, *range(self.model.rows)} - set(self.model.held))
        rows = [*sorted(self.model.held), data.draw(st.sampled_from(dead))]  # after good ones, which must not be done
        ones = [1] * len(rows)
        call = {"extend": lambda: extend(self.table, rows, ones), "commit": lambda: commit(self.table, rows, ones),
                "release": lambda: release(self.table, rows)}[stage]  # fmt: skip
        refused(self.table, call, f"{stage}: rows .* are not live")

    @invariant()
    def no_page_is_lost_or_owned_twice(self) -> None:
        table, model = self.table, self.model
        listed = owned(table)
        pages = [p for row in listed.values() for p in row] + table.free[: table.n_free].tolist()
        assert sorted(pages) == list(range(1, model.pages + 1))  # each page once, the sink never
        assert table.n_free == model.free

    @invariant()
    def it_is_what_the_dicts_say(self) -> None:
        table, model = self.table, self.model
        assert table.live.nonzero().flatten().tolist() == sorted(model.held)
        for row, pages in owned(table).items():
            held = model.held.get(row, 0)
            assert (len(pages), int(table.held[row])) == (held, held)
            assert table.pages[row, :held].tolist() == pages  # in front, the sink beyond
            assert int(table.length[row]) == model.length.get(row, 0) <= held * model.page_size


TestTable = TableMachine.TestCase
TestTable.settings = examples(200, stateful_step_count=50)


def test_a_row_keeps_its_pages_when_it_is_extended() -> None:
    table, (a, b) = admit(RequestTable.empty(rows=2, pages=6, page_size=4), [5, 4])
    before = owned(table)
    table, granted = extend(table, [a, b], [13, 4])
    assert granted == (a, b)
    after = owned(table)
    assert (after[a][:2], after[b]) == (before[a], before[b])
    assert len(after[a]) == 4


def test_tokens_stand_in_the_slots_of_their_pages_in_order() -> None:
    table, (row,) = admit(RequestTable.empty(rows=1, pages=3, page_size=4), [9])
    pages = owned(table)[row]
    assert slots_of(table, row, 0, 9).tolist() == [pages[i // 4] * 4 + i % 4 for i in range(9)]


def test_a_padded_batch_lists_its_own_pages_and_elsewhere_the_sink() -> None:
    table, (a, b) = admit(RequestTable.empty(rows=3, pages=9, page_size=4), [12, 7])
    table = commit(table, [a], [3])
    tokens = [torch.arange(2, dtype=torch.int32) + 1, torch.arange(5, dtype=torch.int32) + 3]
    chunks = [Chunk(row=r, tokens=t, positions=t.expand(3, -1)) for r, t in zip((a, b), tokens, strict=True)]
    batch = pack(table, chunks, device="cpu", size=Size(tokens=8, rows=4, listed=3))
    pages = owned(table)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert batch.positions[2].tolist() == batch.tokens.tolist()
    assert batch.slots.tolist() == [*slots_of(table, a, 3, 5).tolist(), *slots_of(table, b, 0, 5).tolist(), 0]
    # of the three pages that row a holds its five tokens are in two
    assert batch.pages.tolist() == [[*pages[a][:2], SINK], [*pages[b][:2], SINK], [SINK] * 3, [SINK] * 3]
    assert batch.lengths.tolist() == [5, 5, 0, 0]
    assert batch.q_indptr.tolist() == [0, 2, 7, 7, 7]
    assert batch.last.tolist() == [1, 6, 0, 0]


def test_a_long_request_is_not_overtaken() -> None:
    table = RequestTable.empty(rows=3, pages=4, page_size=1)
    table, rows = admit(table, [3, 2, 1])
    assert len(rows) == 1  # the last would fit, but the one before it came first
    table, rows = admit(release(table, rows), [2, 1])
    assert len(rows) == 2


def test_a_request_that_fills_the_table_exactly_is_admitted_and_one_more_never() -> None:
    table = RequestTable.empty(rows=1, pages=3, page_size=4)
    refused(table, lambda: admit(table, [13]), "13 tokens can never fit: a row holds at most 12")
    _, rows = admit(table, [12])
    assert rows == (0,)


def test_rows_and_tokens_that_do_not_pair_up_are_an_error() -> None:
    table, (row,) = admit(RequestTable.empty(rows=2, pages=4, page_size=1), [2])
    refused(table, lambda: extend(table, [row], [1, 1]), "extend: 2 counts of tokens for 1 rows")
    refused(table, lambda: commit(table, [row], []), "commit: 0 counts of tokens for 1 rows")
