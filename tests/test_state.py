"""State: shapes checked when an object is made, moves that leave a dead handle, and trees of tensors."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from mllm.cache import KVPool
from mllm.errors import DonatedError, ShapeError
from mllm.state import (
    LEGEND,
    State,
    alias,
    clone,
    donate,
    each,
    is_donated,
    leaves,
    letter_of,
    map_leaves,
    replace,
    signature,
    state,
    tensor,
)  # fmt: skip


@state
class Pair(State):
    a: Tensor = tensor("B 3", torch.float32)
    b: Tensor = tensor("B+1", torch.int32)
    note: str = "plain"


@state
class Nest(State):
    one: Pair
    many: tuple[Pair, ...] = each(Pair, "L")
    maybe: Tensor | None = tensor("L")


def pair(rows: int = 2, **changes: Any) -> Pair:
    values: dict[str, Any] = {
        "a": torch.arange(rows * 3.0).view(rows, 3),
        "b": torch.arange(rows + 1, dtype=torch.int32),
    }
    return Pair(**{**values, **changes})


def nest() -> Nest:
    return Nest(one=pair(), many=[pair(1), pair(4)], maybe=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": torch.zeros(2, 3).double()}, r"Pair\.a: expected torch\.float32, got torch\.float64"),
        ({"b": torch.zeros(3)}, r"Pair\.b: expected torch\.int32, got torch\.float32"),
        ({"a": torch.zeros(2, 4)}, r"Pair\.a: expected \[B 3\], got \[2, 4\]"),
        ({"a": torch.zeros(6)}, r"Pair\.a: expected \[B 3\], got \[6\]"),
        ({"a": torch.zeros(2, 3, 1)}, r"Pair\.a: expected \[B 3\], got \[2, 3, 1\]"),
        ({"b": torch.zeros(2, dtype=torch.int32)}, r"Pair\.b: B=1 here but B=2 in Pair\.a"),
        ({"b": torch.zeros((), dtype=torch.int32)}, r"Pair\.b: expected \[B\+1\], got \[\]"),
    ],
)
def test_a_wrong_shape_or_dtype_fails_where_it_is_made_and_says_what_was_expected(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        pair(**changes)


def test_an_empty_tensor_and_a_missing_one_are_fine() -> None:
    assert pair(0).a.shape == (0, 3)
    assert nest().maybe is None


def test_a_state_is_frozen_keyword_only_and_compared_by_identity() -> None:
    p = pair()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        p.a = torch.zeros(2, 3)  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        p.other = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        Pair(p.a, p.b)  # type: ignore[call-arg,misc]
    assert p == p
    assert p != pair()
    assert len({p, pair()}) == 2


def test_an_attribute_that_never_was_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="Pair has no attribute 'c'"):
        _ = pair().c  # type: ignore[attr-defined]
    assert not hasattr(pair(), "c")


def test_a_donated_state_is_dead_and_names_who_took_it() -> None:
    old = pair()
    a = old.a
    new = donate(old, to="prefill")
    assert new.a is a
    assert (is_donated(old), is_donated(new)) == (True, False)
    for name in ("a", "b", "note"):
        with pytest.raises(DonatedError, match=rf"Pair\.{name} was read after prefill consumed this Pair"):
            getattr(old, name)
    assert repr(old) == "Pair(donated to prefill)"
    assert repr(new) == "Pair(a=float32[2, 3], b=int32[3], note='plain')"


@pytest.mark.parametrize("use", [
    lambda s: donate(s, to="decode"), leaves, clone, alias, signature, lambda s: replace(s, note="x"),
    lambda s: map_leaves(lambda t: t, s), lambda s: attrs.evolve(s, note="x"),
])  # fmt: skip
def test_every_use_of_a_dead_state_is_an_error_that_names_who_took_it(use: object) -> None:
    old = pair()
    donate(old, to="prefill")
    with pytest.raises(DonatedError, match="prefill"):
        use(old)  # type: ignore[operator]
    assert repr(old) == "Pair(donated to prefill)"  # and it stays the one who took it first


def test_a_dead_state_is_dead_to_a_state_that_holds_it() -> None:
    outer = nest()
    donate(outer.many[1], to="release")
    with pytest.raises(DonatedError, match="release"):
        leaves(outer)
    assert repr(outer).count("donated to release") == 1


def test_replace_keeps_what_it_is_not_told_and_leaves_the_old_alive() -> None:
    old = pair()
    new = replace(old, note="changed")
    assert (new.note, old.note, new.a is old.a) == ("changed", "plain", True)
    assert type(new) is Pair


def test_clone_shares_nothing_and_alias_shares_every_tensor() -> None:
    old = nest()
    copied, other = clone(old), alias(old)
    for x, y, z in zip(leaves(old), leaves(copied), leaves(other), strict=True):
        assert torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()
        assert x is z
    donate(other.one, to="somebody")
    assert not is_donated(old.one)  # another handle, all the way down


def test_leaves_are_in_the_order_of_the_fields_and_of_nested_states() -> None:
    outer = nest()
    assert [t.shape[0] for t in leaves(outer)] == [2, 3, 1, 2, 4, 5]
    assert leaves((outer.one, [outer.one.a], 3, None)) == [*leaves(outer.one), outer.one.a]


def test_map_leaves_keeps_structure_and_plain_values() -> None:
    twice = map_leaves(lambda t: t * 2, (nest(), [1, "x"]))
    assert type(twice) is tuple
    assert (type(twice[0]), type(twice[0].many), twice[0].one.note, twice[1]) == (Nest, tuple, "plain", [1, "x"])
    assert torch.equal(twice[0].one.a, nest().one.a * 2)


def test_a_signature_is_everything_but_the_numbers() -> None:
    same = signature(nest())
    assert same == signature(clone(nest()))
    assert hash(same) == hash(signature(map_leaves(torch.zeros_like, nest())))
    assert same != signature(replace(nest(), one=pair(3)))
    assert same != signature(replace(nest(), one=replace(pair(), note="other")))
    assert same != signature(replace(nest(), maybe=torch.zeros(2)))
    assert same != signature(replace(nest(), many=(pair(1),)))
    assert signature(torch.zeros(2)) != signature(torch.zeros(2, dtype=torch.int64))
    assert signature((1, 2)) != signature([1, 2])


def test_every_letter_of_every_state_is_in_the_legend() -> None:
    import mllm  # noqa: F401  (defines them all)

    seen: set[str] = set()

    def visit(cls: type[State]) -> None:
        for sub in cls.__subclasses__():
            if sub.__module__.startswith("mllm"):
                seen.update(letter_of(d) for _, dims, _ in sub.__specs__ for d in dims if not d.isdigit())
                visit(sub)

    visit(State)
    assert len(seen) > 20
    assert seen <= LEGEND.keys()


def test_a_pool_must_have_keys_and_values_alike() -> None:
    with pytest.raises(ShapeError, match=r"KVPool\.values: S=8 here but S=4 in KVPool\.keys"):
        KVPool(keys=torch.zeros(1, 2, 4, 2, 8), values=torch.zeros(1, 2, 8, 2, 8))
