"""Scenes made up at random: how large, on what ground, which shapes or what sign, and what changes in them.

Every function is a pure function of its generator's state and its arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import evolve

from mllm.signs import words
from mllm.signs.scenes import COLOURS, SHAPES, Colour, Scene, Shape, Sign, grid, room, text_size

SMALLEST, LARGEST = 64, 512  # of a picture's sides
LONGEST_TEXT = 12

Rng = np.random.Generator


def pick(rng: Rng, choices: Any) -> Any:
    """One of a sequence, as it is in the sequence (numpy's own choice would make an array of it)."""
    return choices[int(rng.integers(len(choices)))]


def _side(rng: Rng, low: float, high: float, lean: float = 1.0) -> int:
    """A length between the two, even on a log scale; a `lean` above 1 makes short ones likelier."""
    return round(low * (max(low, high) / low) ** (rng.random() ** lean))


def _size(rng: Rng) -> tuple[int, int]:
    """Width and height of a picture, at most four to one."""
    width = _side(rng, SMALLEST, LARGEST)
    height = _side(rng, max(SMALLEST, width / 4), min(LARGEST, width * 4))
    return width, height


def _ground(rng: Rng) -> dict[str, Any]:
    """A calm ground, light or dark: two colours, the direction between them, and noise."""
    level = rng.uniform(150, 245) if rng.random() < 0.65 else rng.uniform(15, 80)
    first = level + rng.uniform(-18, 18, 3)
    second = first + rng.uniform(-45, 45) + rng.uniform(-15, 15, 3)
    colours = tuple(tuple(int(v) for v in np.clip(c, 5, 250)) for c in (first, second))
    noise = int(rng.integers(0, 32)) if rng.random() < 0.8 else 0
    return {"ground": colours, "slope": float(rng.uniform(0, 360)), "noise": noise, "seed": int(rng.integers(1 << 31))}


def _distance(one: Colour, other: Colour) -> float:
    return float(np.linalg.norm(np.subtract(one, other)))


def _usable(ground: tuple[Colour, Colour]) -> list[str]:
    """The colours that stand out against both ends of the ground."""
    return [n for n, c in COLOURS.items() if min(_distance(c, ground[0]), _distance(c, ground[1])) > 95]


def _shape(rng: Rng, name: str, colour: str, cell: tuple[int, int], size: tuple[int, int]) -> Shape:
    smallest = min(0.8, max(0.5, 22 / room(size)))
    part, angle = float(rng.uniform(smallest, 0.85)), float(rng.uniform(-9, 9))
    shift = float(rng.uniform(-0.07, 0.07)), float(rng.uniform(-0.07, 0.07))
    red, green, blue = (int(v) for v in rng.integers(-8, 9, 3))
    return Shape(name, colour, cell, size=part, angle=angle, shift=shift, tint=(red, green, blue))


def shape_scene(rng: Rng, least: int, most: int, *, repeat: bool = False, alike: bool = False) -> Scene:
    """A scene of `least` to `most` shapes, as far as there is room; all different unless `repeat`.

    If they are to be `alike`, they have few colours and names, so that nearly every one shares either with another.
    """
    size, ground = _size(rng), _ground(rng)
    rows, columns = grid(size)
    cells = [(row, column) for row in rows for column in columns]
    count = min(len(cells), int(rng.integers(least, most + 1)))
    names, colours = list(SHAPES), _usable(ground["ground"])
    if repeat:
        names = [pick(rng, names) for _ in range(int(rng.integers(1, 4)))]
        colours = [pick(rng, colours) for _ in range(int(rng.integers(1, 4)))]
    if alike:
        names = list(rng.permutation(names)[: int(rng.integers(2, 6))])
        colours = list(rng.permutation(colours)[: int(rng.integers(1, 5))])
    kinds = [(str(name), str(colour)) for name in names for colour in colours]
    count = count if repeat else min(count, len(kinds))
    picked = rng.choice(len(kinds), count, replace=repeat)
    where = rng.choice(len(cells), count, replace=False)
    shapes = [_shape(rng, *kinds[int(k)], cells[int(c)], size) for k, c in zip(picked, where, strict=True)]
    return Scene(size=size, shapes=tuple(shapes), **ground)


def text_for_a_sign(rng: Rng, longest: int = LONGEST_TEXT) -> str:
    """A word or two, a number, or letters at random; never one that reads two ways."""
    while True:
        text = words.sign_text(rng, longest)
        if 1 <= len(text) <= longest and not words.ambiguous(text):
            return text


def sign_scenes(rng: Rng, *texts: str) -> list[Scene]:
    """The same scene with each of the texts on its sign; font, place and picture have room for all."""
    ground = _ground(rng)
    dark = float(np.mean(ground["ground"])) < 115
    angle = 0.0 if rng.random() < 0.25 else float(rng.uniform(-10, 10))
    largest = 96
    while any(max(text_size(text, largest, angle)) > LARGEST - 16 for text in texts):
        largest -= 2
    font = _side(rng, 22, largest, lean=1.3)
    boxes = [text_size(text, font, angle) for text in texts]
    box = max(b[0] for b in boxes), max(b[1] for b in boxes)
    width = _side(rng, max(SMALLEST, box[0] + 4, box[1] / 4 + 1), LARGEST, lean=1.5)
    height = _side(rng, max(SMALLEST, box[1] + 4, width / 4), min(LARGEST, width * 4), lean=2.0)
    x = 0.5 + float(rng.uniform(-0.5, 0.5)) * (width - box[0]) / width
    y = 0.5 + float(rng.uniform(-0.5, 0.5)) * (height - box[1]) / height
    plate, ink = None, words.ink(rng, dark)
    if rng.random() < 0.5:
        dark = bool(rng.random() < 0.5)
        plate, ink = words.ink(rng, not dark), words.ink(rng, dark)
    return [Scene((width, height), sign=Sign(t, font, ink, plate, angle, (x, y)), **ground) for t in texts]


def changed(rng: Rng, scene: Scene) -> Scene:
    """The scene with one thing changed; one in fifteen or so stays as it is."""
    rows, columns = grid(scene.size)
    taken = {shape.cell for shape in scene.shapes}
    free = [(r, c) for r in rows for c in columns if (r, c) not in taken]
    index = int(rng.integers(len(scene.shapes)))
    shape, rest = scene.shapes[index], scene.shapes[:index] + scene.shapes[index + 1 :]
    present = {s.words for s in scene.shapes}
    kinds = [(n, c) for n in SHAPES for c in _usable(scene.ground) if f"{c} {n}" not in present]
    how = pick(
        rng, ("colour", "name", "vanish", "appear", "appear", "move", "move", "colour", "name", "vanish", "none")
    )
    if how in ("appear", "move") and not free:
        how = "colour"
    if how == "none":
        return scene
    if how == "vanish":
        return evolve(scene, shapes=rest)
    if how == "appear":
        name, colour = pick(rng, kinds)
        return evolve(scene, shapes=(*scene.shapes, _shape(rng, name, colour, pick(rng, free), scene.size)))
    if how == "move":
        return evolve(scene, shapes=(*rest, evolve(shape, cell=pick(rng, free))))
    same = {"colour": lambda kind: kind[0] == shape.name, "name": lambda kind: kind[1] == shape.colour}[how]
    name, colour = pick(rng, [kind for kind in kinds if same(kind)])
    return evolve(scene, shapes=(*rest, evolve(shape, name=name, colour=colour)))
