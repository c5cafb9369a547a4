"""Immutable state with move semantics: `@state`, `tensor`, `donate`, and the tree of a state's tensors.

A state class is a frozen attrs class whose tensor fields name their sizes with the letters of `LEGEND`.
The sizes are bound and compared when an object is made, so a wrong shape fails where it arises.

A stage that updates tensors in place *donates* the object it received: the fields move to a new object,
and the old one is dead. Reading a dead object raises `DonatedError` with the name of the stage that took it.
What donation cannot see: a raw tensor taken out of a state object earlier stays readable, and `attrs.evolve`
or `copy.copy` of a state that a stage updates in place makes a second live handle. Do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, dataclass_transform

import attrs
import torch
from torch import Tensor

from mllm.errors import DonatedError, ShapeError

LEGEND = {
    "T": "tokens in a ragged batch",
    "B": "requests in a batch (rows of a decode batch, padding rows included)",
    "Q": "positions of a batch whose logits are wanted",
    "R": "rows of the request table",
    "L": "decoder layers",
    "P": "pages of the KV pool (page 0 is the sink)",
    "S": "slots (tokens) in a page",
    "N": "pages listed per row",
    "H": "query heads",
    "K": "key/value heads",
    "D": "head size",
    "E": "model width",
    "F": "MLP width",
    "V": "vocabulary",
    "A": "attention width, H*D",
    "C": "fused query, key and value width, (H + 2*K)*D",
    "G": "fused gate and up width, 2*F",
    "X": "image patches",
    "U": "bytes of a patch, channels * patch * patch",
    "M": "merged patches: the image tokens that the decoder sees",
    "I": "images",
    "J": "deepstack taps",
    "W": "entries of the learned position grid",
    "Lv": "vision layers",
    "Ev": "vision width",
    "Fv": "vision MLP width",
    "Cv": "fused vision query, key and value width, 3*Ev",
    "Mv": "width of merged vision features, merge*merge*Ev",
}

S = TypeVar("S", bound="State")
Tree = Any  # a tensor, a State, a tuple or list of trees, or a plain value

_DONATED = """\
{cls}.{name} was read after {by} consumed this {cls}.

{by} updates it in place, so the object that was passed in is dead once it returns. Keep what it returned:
    pool, logits = decode(weights, pool, batch, ...)
To go on from the old contents as well, copy them first with `mllm.state.clone`."""


class State:
    """Base of every state class: a frozen attrs class that can be donated once."""

    __slots__ = ("_donated_to",)
    __names__: tuple[str, ...] = ()  # field names, looked up once: `attrs.fields` costs 1 us a call
    __specs__: tuple[tuple[str, tuple[str, ...], torch.dtype | None], ...] = ()  # of the tensor fields

    def __getattr__(self, name: str) -> Any:  # reached only when the slot is empty
        try:
            by = object.__getattribute__(self, "_donated_to")
        except AttributeError:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}") from None
        raise DonatedError(_DONATED.format(cls=type(self).__name__, name=name, by=by))

    def __repr__(self) -> str:
        cls = type(self)
        try:
            return f"{cls.__name__}(donated to {object.__getattribute__(self, '_donated_to')})"
        except AttributeError:
            body = ", ".join(f"{name}={_show(getattr(self, name))}" for name in cls.__names__)
            return f"{cls.__name__}({body})"


def tensor(dims: str, dtype: torch.dtype | None = None) -> Any:
    """Declare a tensor field: `dims` names its sizes by `LEGEND`, a number, or a letter and a difference ("B+1")."""
    return attrs.field(metadata={"dims": tuple(dims.split()), "dtype": dtype})


def each(cls: type[State], count: str) -> Any:
    """Declare a field that is a tuple of `count` objects of one state class (the layers of a model)."""
    return attrs.field(converter=tuple, metadata={"each": cls, "count": count})


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False, field_specifiers=(tensor, each))
def state(cls: type[S]) -> type[S]:
    """Class decorator: frozen, slotted, keyword-only, compared by identity, shapes checked."""
    cls.__attrs_post_init__ = check  # type: ignore[attr-defined]
    made = attrs.frozen(eq=False, repr=False, kw_only=True)(cls)
    fields = attrs.fields(cast(Any, made))  # `frozen` has just made it a class of attrs'
    made.__names__ = tuple(f.name for f in fields)
    made.__specs__ = tuple((f.name, f.metadata["dims"], f.metadata["dtype"]) for f in fields if "dims" in f.metadata)
    return made


def check(self: State) -> None:
    """Bind each size letter once and compare every tensor field with it. Raises `ShapeError`."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, dims, dtype in self.__specs__:
        value = getattr(self, name)
        if value is None:
            continue
        where = f"{type(self).__name__}.{name}"
        if dtype is not None and value.dtype != dtype:
            raise ShapeError(f"{where}: expected {dtype}, got {value.dtype}")
        if len(value.shape) != len(dims):
            raise ShapeError(f"{where}: expected [{' '.join(dims)}], got {list(value.shape)}")
        for dim, got in zip(dims, value.shape, strict=True):
            _bind(sizes, dim, got, where=where, dims=dims, shape=value.shape)


def letter_of(dim: str) -> str:
    """The letter of a size in a declaration: B of "B" and of "B+1", nothing of a number."""
    return dim.rstrip("+-0123456789")


def _bind(
    sizes: dict[str, tuple[int, str]], dim: str, got: int, *, where: str, dims: tuple[str, ...], shape: torch.Size
) -> None:
    """Bind the letter of `dim` to `got`, or raise if it was bound to another size before."""
    expected = f"expected [{' '.join(dims)}], got {list(shape)}"
    if dim.isdigit():
        if int(dim) != got:
            raise ShapeError(f"{where}: {expected}")
        return
    letter = letter_of(dim)
    size = got - int(dim[len(letter) :] or 0)
    bound, by = sizes.setdefault(letter, (size, where))
    if bound != size:
        raise ShapeError(f"{where}: {letter}={size} here but {letter}={bound} in {by}; {expected}")


def donate(old: S, *, to: str) -> S:
    """Move the fields of `old` into a new object and leave `old` dead.

    `to` is the name of the stage that takes it, for the error of whoever reads `old` later.
    Raises `DonatedError` if `old` was donated before.
    """
    cls = type(old)
    new = object.__new__(cls)
    for name in cls.__names__:
        object.__setattr__(new, name, getattr(old, name))
    for name in cls.__names__:
        object.__delattr__(old, name)
    object.__setattr__(old, "_donated_to", to)
    return new


def is_donated(tree: State) -> bool:
    """Whether a stage has consumed this object."""
    return hasattr(tree, "_donated_to")


def check_alive(*states: State | None) -> None:
    """Raise `DonatedError` for a dead one. For stages that take one argument and read others: check, then take."""
    for one in states:
        for name in one.__names__[:1] if one is not None else ():
            getattr(one, name)  # which a dead one has not


def replace(old: S, **changes: Any) -> S:
    """`attrs.evolve` for a state that was just taken by `donate`: no shape check, no copy (4 us saved a call)."""
    new = object.__new__(type(old))
    for name in old.__names__:
        object.__setattr__(new, name, changes[name] if name in changes else getattr(old, name))
    return new


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in field order."""
    return list(_walk(tree))


def _walk(tree: Tree) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, State):
        for name in tree.__names__:
            yield from _walk(getattr(tree, name))
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _walk(part)


def map_leaves(fn: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same tree with `fn` of every tensor; plain values are shared."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, State):
        new = object.__new__(type(tree))
        for name in tree.__names__:
            object.__setattr__(new, name, map_leaves(fn, getattr(tree, name)))
        return new
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_leaves(fn, part) for part in tree)
    return tree


def alias(tree: Tree) -> Tree:
    """Another handle on the same tensors, for who runs a donating function on buffers of its own (`capture`)."""
    return map_leaves(lambda t: t, tree)


def clone(tree: Tree) -> Tree:
    """A copy that shares no tensor with the original."""
    return map_leaves(Tensor.clone, tree)


def signature(tree: Tree) -> Any:
    """Everything of a tree but its numbers: structure, shapes, dtypes, devices and plain values. Hashable."""
    if isinstance(tree, Tensor):
        return (tree.device, tree.dtype, tree.shape)
    if isinstance(tree, State):
        return (type(tree), *(signature(getattr(tree, name)) for name in tree.__names__))
    if isinstance(tree, (tuple, list)):
        return (type(tree), *map(signature, tree))
    return tree


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple) and len(value) > 4:
        return f"({_show(value[0])}, ... {len(value)} of them)"
    return repr(value)
