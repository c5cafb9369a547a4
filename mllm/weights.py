"""Parameter classes. Their field declarations are the one place where parameter shapes are written down:
`build` makes a whole tree from them, `random` fills it with noise, `checkpoint.load` from files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import attrs
import torch
from torch import Tensor

from mllm.config import Config
from mllm.state import State, each, leaves, state, tensor

S = TypeVar("S", bound=State)
Make = Callable[[str, tuple[int, ...]], Tensor]  # (path of a field, its shape) -> the tensor


@state
class Layer(State):
    """One decoder layer. `qkv` and `gate_up` are fused so that a step reads four matrices a layer, not seven."""

    norm_in: Tensor = tensor("E")
    qkv: Tensor = tensor("C E")
    q_norm: Tensor = tensor("D")
    k_norm: Tensor = tensor("D")
    out: Tensor = tensor("E A")
    norm_mlp: Tensor = tensor("E")
    gate_up: Tensor = tensor("G E")
    down: Tensor = tensor("E F")


class Stacks(NamedTuple):
    """The weights of all layers, by the names of `Layer`: each [L ...]."""

    norm_in: Tensor
    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    out: Tensor
    norm_mlp: Tensor
    gate_up: Tensor
    down: Tensor


def stacked(layers: tuple[Layer, ...]) -> Stacks | None:
    """The weights of all layers, where those of a name lie one after the other in memory, as `room` lays them."""
    stacks = stacks_of(layers, Stacks._fields)
    return None if stacks is None else Stacks(**stacks)


def stacks_of(parts: Sequence[State], names: Sequence[str]) -> dict[str, Tensor] | None:
    """The tensors of these names of all parts, by name, each as one [n ...]; None where those of one lie apart."""
    stacks = {}
    for name in names:
        stack = as_one([getattr(part, name) for part in parts])
        if stack is None:
            return None
        stacks[name] = stack
    return stacks


def as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """n tensors of a shape as one [n ...], where they lie one after the other in memory."""
    first, *others = tensors
    begin, apart = first.data_ptr(), first.nbytes
    storage = first.untyped_storage().data_ptr()
    if not first.is_contiguous() or any(
        x.data_ptr() != begin + i * apart or x.shape != first.shape or x.untyped_storage().data_ptr() != storage
        for i, x in enumerate(others, 1)
    ):
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


@state
class TextWeights(State):
    """The decoder. `head` is `embed` itself where the model ties them."""

    embed: Tensor = tensor("V E")
    layers: tuple[Layer, ...] = each(Layer, "L")
    norm: Tensor = tensor("E")
    head: Tensor = tensor("V E")


@state
class Block(State):
    """One layer of the vision encoder. Rows of `qkv` that make a pair, which is rotated, are neighbours: `paired`. The
    layer norms before `qkv` and `up` have no weights: they are in those, by `weight_after_norm` and `bias_after_norm`."""

    qkv: Tensor = tensor("Cv Ev")
    qkv_bias: Tensor = tensor("Cv")
    out: Tensor = tensor("Ev Ev")
    out_bias: Tensor = tensor("Ev")
    up: Tensor = tensor("Fv Ev")
    up_bias: Tensor = tensor("Fv")
    down: Tensor = tensor("Ev Fv")
    down_bias: Tensor = tensor("Ev")


AFTER_NORM = re.compile(r"vision\.blocks\.\d+\.(qkv|up)(_bias)?")
"""The fields of a block that hold their part of the layer norm before them."""


@state
class Merger(State):
    """Neighbouring patches to one feature of the decoder's width, normalised patch by patch."""

    norm: Tensor = tensor("Ev")
    norm_bias: Tensor = tensor("Ev")
    up: Tensor = tensor("Mv Mv")
    up_bias: Tensor = tensor("Mv")
    down: Tensor = tensor("E Mv")
    down_bias: Tensor = tensor("E")


@state
class TapMerger(State):
    """The merger of a deepstack tap: as `Merger`, but it normalises the merged patches."""

    norm: Tensor = tensor("Mv")
    norm_bias: Tensor = tensor("Mv")
    up: Tensor = tensor("Mv Mv")
    up_bias: Tensor = tensor("Mv")
    down: Tensor = tensor("E Mv")
    down_bias: Tensor = tensor("E")


@state
class VisionWeights(State):
    """The vision encoder. `patch` is the checkpoint's kernel summed over its frames: an image is one frame,
    repeated, so both frames meet the same pixels."""

    patch: Tensor = tensor("Ev U")
    patch_bias: Tensor = tensor("Ev")
    position: Tensor = tensor("W Ev")
    blocks: tuple[Block, ...] = each(Block, "Lv")
    merger: Merger
    taps: tuple[TapMerger, ...] = each(TapMerger, "J")


@state
class Weights(State):
    """All parameters of a model; `vision` is None where it has no encoder."""

    text: TextWeights
    vision: VisionWeights | None

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, a tied head counted once."""
        return sum({t.data_ptr(): t.nbytes for t in leaves(self)}.values())


def paired(qkv: Tensor, heads: int) -> Tensor:
    """The rows of queries, keys and values [3*heads*Dv ...] of an encoder as `Block` has them, from where the two of a pair
    are half a head apart. Scores are the same in either order of a head's numbers, and neighbours are rotated where they
    are made."""
    q_k, v = qkv[: len(qkv) // 3 * 2], qkv[len(qkv) // 3 * 2 :]
    halves = q_k.view(2 * heads, 2, -1, *qkv.shape[1:])
    return torch.cat((halves.transpose(1, 2).flatten(0, 2), v))


def weight_after_norm(weight: Tensor, norm: Tensor | float = 1.0, *, dtype: torch.dtype) -> Tensor:
    """The weight [N K] that does with (x - mean) / deviation what `weight`, f32, does after a layer norm with `norm` [K].

    Each row sums up to 0, which takes the mean off by itself: the product may be one of x as it is, and divided afterwards.
    In 16 bits as well: the numbers of a row that are nearest to 0 take what rounding left, which a mean of three deviations
    would make twice the error of all else.
    """
    weight = weight * norm
    weight = weight - weight.mean(1, keepdim=True)
    if dtype == weight.dtype:
        return weight
    rounded = weight.to(dtype)
    nearest = rounded.abs().topk(max(1, weight.shape[1] // 32), largest=False).indices
    left = rounded.float().sum(1, keepdim=True) / nearest.shape[1]
    return rounded.scatter_(1, nearest, rounded.gather(1, nearest) - left.to(dtype))


def bias_after_norm(bias: Tensor, weight: Tensor, norm_bias: Tensor) -> Tensor:
    """The bias [N] of that product, of the bias [N] and weight [N K] of the one after a layer norm with `norm_bias` [K]."""
    return bias + weight @ norm_bias


def build(config: Config, make: Make) -> Weights:
    """The parameter tree of `config` with every tensor made by `make(path, shape)`.

    A path reads like `text.layers.3.qkv`. A tied head is not made: it is the embedding.
    """
    tied = config.text.tie_word_embeddings
    text = _build(TextWeights, config.sizes, make, "text.", skip="head" if tied else None)
    vision = _build(VisionWeights, config.sizes, make, "vision.") if config.vision else None
    return Weights(text=text, vision=vision)


def _build(cls: type[S], sizes: Mapping[str, int], make: Make, prefix: str, skip: str | None = None) -> S:
    values: dict[str, Any] = {}
    for f in attrs.fields(cast(Any, cls)):  # `state` makes it a class of attrs'
        if f.name == skip:
            continue
        if "dims" in f.metadata:
            values[f.name] = make(prefix + f.name, tuple(sizes[dim] for dim in f.metadata["dims"]))
        elif "each" in f.metadata:
            part, count = f.metadata["each"], sizes[f.metadata["count"]]
            values[f.name] = [_build(part, sizes, make, f"{prefix}{f.name}.{i}.") for i in range(count)]
        else:
            values[f.name] = _build(Merger, sizes, make, f"{prefix}{f.name}.")
    if skip == "head":
        values["head"] = values["embed"]
    return cls(**values)


def room(config: Config, *, device: str | torch.device, dtype: torch.dtype) -> Make:
    """Makes empty tensors. Those of one name of all decoder layers, and of all mergers, lie one after the other in memory,
    for kernels that go on from one to the next."""
    stacks: dict[str, Tensor] = {}

    def make(path: str, shape: tuple[int, ...]) -> Tensor:
        place = _place(path, config)
        if place is None:
            return torch.empty(shape, dtype=dtype, device=device)
        name, index, count = place
        if name not in stacks:
            stacks[name] = torch.empty(count, *shape, dtype=dtype, device=device)
        return stacks[name][index]

    return make


def _place(path: str, config: Config) -> tuple[str, int, int] | None:
    """(the stack that a parameter is part of, its place there, how many there are); None where it stands alone. The merger
    comes before those of the taps."""
    if found := re.fullmatch(r"(text\.layers)\.(\d+)\.(\w+)", path):
        return f"{found[1]}.{found[3]}", int(found[2]), config.text.num_hidden_layers
    if found := re.fullmatch(r"vision\.(?:merger|taps\.(\d+))\.((?:up|down)\w*)", path):
        return f"mergers.{found[2]}", 0 if found[1] is None else 1 + int(found[1]), 1 + config.sizes["J"]
    return None


def elements(config: Config) -> int:
    """Elements of all parameters of a model, a tied head counted once; nothing is allocated."""
    counts: list[int] = []

    def make(path: str, shape: tuple[int, ...]) -> Tensor:
        counts.append(math.prod(shape))
        return torch.empty(shape, device="meta")

    build(config, make)
    return sum(counts)


def random(config: Config, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype) -> Weights:
    """Weights of the right shapes with no meaning: normal with deviation 0.02, norms around 1.

    For tests and benchmarks, which then need no download. The same seed gives the same weights on one device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    empty = room(config, device=device, dtype=dtype)

    def make(path: str, shape: tuple[int, ...]) -> Tensor:
        made = empty(path, shape).normal_(0.0, 0.02, generator=generator)
        name = path.rpartition(".")[2]
        if AFTER_NORM.fullmatch(path) and not name.endswith("bias"):
            made.copy_(weight_after_norm(made.float(), dtype=dtype))
        is_scale = "norm" in name and not name.endswith("bias")
        return made.add_(1.0) if is_scale else made

    return build(config, make)
