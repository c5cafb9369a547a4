"""Drawn pictures with questions whose answers are known: what the model "signs" is trained, tested and shown on.

`example(kind, seed)` is a pure function: the same picture, question and answer on every machine. Kinds:

* `shapes`: describe the coloured shapes and their places, in reading order
* `text`: what does the sign say, up to 12 characters
* `count`: how many of a thing, 0 to 9
* `place`: what is left of, right of, above or below a shape
* `where`: where is a shape, or what is at a place
* `change`: two pictures; what changed from the first to the second
* `chat`: text alone

Training uses seeds below `HELD_OUT`; `held_out(kind, index)` uses those from there on. It also uses one kind of
picture that is never a test: `alike`, whose shapes share colours and names, with questions of the kinds `place`,
`where` and `count`. In the other pictures a colour alone mostly tells which shape is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import evolve, frozen
from PIL import Image

from mllm.signs import words
from mllm.signs.compose import Rng, changed, pick, shape_scene, sign_scenes, text_for_a_sign
from mllm.signs.scenes import COLOURS, PLACES, SHAPES, Scene, Shape, grid, render

KINDS = ("shapes", "text", "count", "place", "where", "change", "chat")
TRAINED = (*KINDS, "alike")
HELD_OUT = 1 << 40


@frozen
class Example:
    """One question about `images` (none, one or two), and its only right answer."""

    kind: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str


def example(kind: str, seed: int) -> Example:
    """The example that `seed` stands for. Seeds from `HELD_OUT` on are never trained on."""
    return examples(kind, seed)[0]


def held_out(kind: str, index: int) -> Example:
    """The held-out example number `index`."""
    return example(kind, HELD_OUT + index)


def examples(kind: str, seed: int, more: int = 0) -> list[Example]:
    """`example(kind, seed)`, and up to `more` further ones, of any kind, that share its pictures."""
    if kind not in TRAINED:
        raise ValueError(f"kind: expected one of {', '.join(TRAINED)}, got {kind!r}")
    # The further questions have a generator of their own, so that the first example never depends on `more`
    key = [TRAINED.index(kind), seed]
    return _MAKERS[kind](np.random.default_rng([*key, 0]), np.random.default_rng([*key, 1]), more)


def messages(item: Example) -> list[dict[str, Any]]:
    """The question as Hugging Face chat messages, pictures first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in item.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": item.question}]}]


# Questions about one picture of shapes ------------------------------------------------------------------------------


def a(thing: str) -> str:
    """'a red circle', 'an orange star'."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def place_name(cell: tuple[int, int]) -> str:
    return PLACES[cell[0]][cell[1]]


def at_place(cell: tuple[int, int]) -> str:
    """'at the top left', 'on the right', 'in the centre'."""
    name = place_name(cell)
    return f"{'in' if name == 'centre' else 'on' if name in ('left', 'right') else 'at'} the {name}"


def describe(scene: Scene) -> str:
    """The right answer to 'Describe the shapes.'"""
    ordered = sorted(scene.shapes, key=lambda shape: shape.cell)
    return ", ".join(f"{a(shape.words)} {at_place(shape.cell)}" for shape in ordered) or "nothing"


def _ask_shapes(rng: Rng, scene: Scene) -> tuple[str, str]:
    return pick(rng, words.ASK_SHAPES), describe(scene)


def _ask_count(rng: Rng, scene: Scene) -> tuple[str, str]:
    """Mostly about things that are there; a tenth or so about colours and shapes drawn at random."""
    if scene.shapes and rng.random() < 0.9:
        shape = pick(rng, scene.shapes)
        name, colour = shape.name, shape.colour
        if rng.random() < 0.15:
            name = pick(rng, SHAPES)
    else:
        name, colour = pick(rng, SHAPES), pick(rng, tuple(COLOURS))
    form = rng.random()
    if form < 0.2:
        things, count = "shapes", len(scene.shapes)
    elif form < 0.5:
        things, count = plural(name), sum(s.name == name for s in scene.shapes)
    elif form < 0.75:
        things, count = f"{colour} shapes", sum(s.colour == colour for s in scene.shapes)
    else:
        things, count = f"{colour} {plural(name)}", sum((s.name, s.colour) == (name, colour) for s in scene.shapes)
    return pick(rng, words.ASK_COUNT).format(things), str(count)


DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def neighbour(scene: Scene, shape: Shape, direction: str) -> str | None:
    """What is on that side of the shape: the nearest in its row or column; 'nothing' if that whole side is empty.

    None where a person could disagree: nothing straight on, but something askew.
    """
    down, right = DIRECTIONS[direction]
    found, askew = [], False
    for other in scene.shapes:
        dy, dx = other.cell[0] - shape.cell[0], other.cell[1] - shape.cell[1]
        ahead, aside = (dx * right, dy) if right else (dy * down, dx)
        if ahead > 0 and aside == 0:
            found.append((ahead, other))
        askew = askew or ahead > 0
    if found:
        return a(min(found, key=lambda pair: pair[0])[1].words)
    return None if askew else "nothing"


def _ask_place(rng: Rng, scene: Scene) -> tuple[str, str] | None:
    """None if the scene allows no such question, or only ones whose answer is 'nothing' and the die is against it."""
    asked = [(s, d, neighbour(scene, s, d)) for s in scene.shapes for d in DIRECTIONS]
    something = [item for item in asked if item[2] not in (None, "nothing")]
    nothing = [item for item in asked if item[2] == "nothing"]
    chosen = nothing if rng.random() < 0.12 else something
    if not chosen:
        return None
    shape, direction, answer = pick(rng, chosen)
    to = "to the " if direction in ("left of", "right of") and rng.random() < 0.3 else ""
    return f"What is {to}{direction} the {shape.words}?", str(answer)


def _ask_where(rng: Rng, scene: Scene) -> tuple[str, str]:
    if scene.shapes and rng.random() < 0.5:
        shape = pick(rng, scene.shapes)
        return f"Where is the {shape.words}?", at_place(shape.cell)
    rows, columns = grid(scene.size)
    cell = (pick(rng, rows), pick(rng, columns))
    if scene.shapes and rng.random() < 0.7:
        cell = pick(rng, scene.shapes).cell
    there = [shape for shape in scene.shapes if shape.cell == cell]
    return f"What is {at_place(cell)}?", a(there[0].words) if there else "nothing"


# The makers: one per kind; the first example comes from `rng` alone, the further ones from `extra` --------------------

Maker = Callable[[Rng, Rng, int], list[Example]]
_ASK: dict[str, Callable[[Rng, Scene], tuple[str, str] | None]] = {
    "shapes": _ask_shapes, "count": _ask_count, "place": _ask_place, "where": _ask_where
}  # fmt: skip


def _scene_maker(kind: str, least: int, most: int, repeat: float = 0.0) -> Maker:
    """A maker for one question about shapes; the further ones ask anything that the scene allows."""

    def make(rng: Rng, extra: Rng, more: int) -> list[Example]:
        asked = None
        while asked is None:
            scene = shape_scene(rng, least, most, repeat=bool(rng.random() < repeat))
            asked = _ASK[kind](rng, scene)
        images = (render(scene),)
        different = len({shape.words for shape in scene.shapes}) == len(scene.shapes)
        others = [k for k in _ASK if (different or k == "count") and (k != "shapes" or 0 < len(scene.shapes) <= 6)]
        items = [Example(kind, images, *asked)]
        for _ in range(more):
            other = kind if extra.random() < 0.5 and kind != "shapes" else pick(extra, others)
            if (further := _ASK[other](extra, scene)) is not None:
                items.append(Example(other, images, *further))
        if more and extra.random() < 0.05:
            items[-1] = Example("text", images, pick(extra, words.ASK_TEXT), "There is no sign.")
        return items

    return make


def _alike_maker(rng: Rng, extra: Rng, more: int) -> list[Example]:
    """Pictures in which neither colour nor name alone says which shape is meant; no question twice."""
    asked = None
    while asked is None:
        scene = shape_scene(rng, 4, 8, alike=True)
        asked = _ask_place(rng, scene)
    images = (render(scene),)
    items = {asked: Example("place", images, *asked)}
    for _ in range(more):
        kind = pick(extra, ("place", "place", "place", "where", "count"))
        if (further := _ASK[kind](extra, scene)) is not None:
            items.setdefault(further, Example(kind, images, *further))
    return list(items.values())


def _text_maker(rng: Rng, extra: Rng, more: int) -> list[Example]:
    (scene,) = sign_scenes(rng, text_for_a_sign(rng))
    assert scene.sign is not None  # noqa: S101  by construction
    return [Example("text", (render(scene),), pick(rng, words.ASK_TEXT), scene.sign.text)]


def _change_maker(rng: Rng, extra: Rng, more: int) -> list[Example]:
    """The further examples show the pictures the other way round."""
    if rng.random() < 0.2:
        one, two = text_for_a_sign(rng, 8), text_for_a_sign(rng, 8)
        first, second = sign_scenes(rng, one, two)
    else:
        first = shape_scene(rng, 1, 5)
        second = changed(rng, first)
    second = evolve(second, noise=int(rng.integers(0, 32)), seed=int(rng.integers(1 << 31)))
    images = render(first), render(second)
    question = pick(rng, words.ASK_CHANGE)
    items = [Example("change", images, question, change(first, second))]
    if more:
        items.append(Example("change", images[::-1], question, change(second, first)))
    return items


def change(first: Scene, second: Scene) -> str:
    """The right answer to 'What changed?'"""
    if first.sign is not None and second.sign is not None and first.sign.text != second.sign.text:
        return f'the sign changed from "{first.sign.text}" to "{second.sign.text}"'
    before, after = ({(s.name, s.colour, s.cell) for s in scene.shapes} for scene in (first, second))
    gone, new = sorted(before - after), sorted(after - before)
    if not gone and not new:
        return "nothing changed"
    if not gone:
        name, colour, cell = new[0]
        return f"{a(f'{colour} {name}')} appeared {at_place(cell)}"
    name, colour, cell = gone[0]
    if not new:
        return f"the {colour} {name} {at_place(cell)} disappeared"
    new_name, new_colour, new_cell = new[0]
    if new_cell != cell:
        return f"the {colour} {name} moved from the {place_name(cell)} to the {place_name(new_cell)}"
    return f"the {colour} {name} " + (f"turned {new_colour}" if new_name == name else f"became {a(new_name)}")


def _chat_maker(rng: Rng, extra: Rng, more: int) -> list[Example]:
    return [Example("chat", (), *words.chat(r)) for r in (rng, *[extra] * more)]


_MAKERS: dict[str, Maker] = {
    "shapes": _scene_maker("shapes", 1, 6),
    "text": _text_maker,
    "count": _scene_maker("count", 0, 9, repeat=0.75),
    "place": _scene_maker("place", 2, 7),
    "where": _scene_maker("where", 1, 7),
    "change": _change_maker,
    "chat": _chat_maker,
    "alike": _alike_maker,
}
