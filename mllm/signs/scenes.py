"""What a drawn picture holds, as plain data, and how to draw it with Pillow and its embedded font.

A `Scene` is a ground (gradient and noise) with shapes in the cells of a 3 x 3 grid, or with one sign. `render` is a
pure function of it. Sizes are in pixels, angles in degrees, colours are RGB triples.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (215, 35, 35),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 45),
    "green": (40, 150, 65),
    "blue": (45, 85, 215),
    "purple": (135, 55, 170),
    "pink": (250, 150, 195),
    "black": (20, 20, 20),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "ring", "square", "diamond", "triangle", "star", "cross")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)


@frozen
class Shape:
    """One coloured shape. `size` is a share of the cell's shorter side, `shift` of the cell, from its middle."""

    name: str
    colour: str
    cell: tuple[int, int]  # row, column
    size: float = 0.7
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    tint: Colour = (0, 0, 0)  # added to the colour

    @property
    def words(self) -> str:
        return f"{self.colour} {self.name}"


@frozen
class Sign:
    """One line of text, its middle at a share `at` of the picture, on a `plate` if that is a colour."""

    text: str
    size: int  # of the font
    ink: Colour
    plate: Colour | None = None
    angle: float = 0.0
    at: tuple[float, float] = (0.5, 0.5)


@frozen
class Scene:
    """Everything that a picture shows; `size` is width, height."""

    size: tuple[int, int]
    ground: tuple[Colour, Colour]
    slope: float = 0.0  # direction of the gradient
    noise: int = 0  # amplitude, 0 to 255
    seed: int = 0  # of the noise
    shapes: tuple[Shape, ...] = ()
    sign: Sign | None = None


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    picture = Image.fromarray(_ground(scene))
    for shape in scene.shapes:
        _draw_shape(picture, shape)
    if scene.sign is not None:
        _draw_sign(picture, scene.sign)
    return picture


def _ground(scene: Scene) -> np.ndarray:
    """A linear gradient under uniform noise, as uint8 [height, width, 3]."""
    width, height = scene.size
    turn = math.radians(scene.slope)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(math.cos(turn))
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32) * np.float32(math.sin(turn))
    along = (x[None, :] + y[:, None]) / np.float32(abs(math.cos(turn)) + abs(math.sin(turn))) + np.float32(0.5)
    start, end = (np.array(colour, dtype=np.float32) for colour in scene.ground)
    pixels = (start + along[:, :, None] * (end - start)).astype(np.int16)
    if scene.noise:
        even = np.frombuffer(np.random.default_rng(scene.seed).bytes(pixels.size), np.uint8).reshape(pixels.shape)
        pixels += (even.astype(np.int16) * np.int16(2 * scene.noise + 1) >> 8) - np.int16(scene.noise)
    return pixels.clip(0, 255).astype(np.uint8)


def _corners(name: str) -> list[tuple[float, float]]:
    """The outline of a shape with straight sides, around (0, 0), within the unit circle or so."""
    if name == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if name == "diamond":
        return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
    if name == "triangle":
        return [(0, -0.9), (0.95, 0.75), (-0.95, 0.75)]
    if name == "star":
        radii = (1.0, 0.42) * 5
        turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]
    if name == "cross":
        a, b = 0.32, 0.92
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    raise ValueError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")


def _draw_shape(picture: Image.Image, shape: Shape) -> None:
    """Paint one shape, smooth at its edges: a mask is drawn three times too large and shrunk."""
    width, height = picture.size[0] / 3, picture.size[1] / 3
    row, column = shape.cell
    middle = (width * (column + 0.5 + shape.shift[0]), height * (row + 0.5 + shape.shift[1]))
    radius = shape.size * room(picture.size) / 2
    side, scale = 2 * math.ceil(radius + 1), 3
    mask = Image.new("L", (side * scale, side * scale))
    pen, centre, r = ImageDraw.Draw(mask), side * scale / 2, radius * scale
    if shape.name in ("circle", "ring"):
        r *= 0.9
        pen.ellipse((centre - r, centre - r, centre + r, centre + r), fill=255)
        if shape.name == "ring":
            r *= 0.55
            pen.ellipse((centre - r, centre - r, centre + r, centre + r), fill=0)
    else:
        turn = math.radians(shape.angle)
        c, s = math.cos(turn), math.sin(turn)
        points = [(centre + r * (x * c - y * s), centre + r * (x * s + y * c)) for x, y in _corners(shape.name)]
        pen.polygon(points, fill=255)
    ink = tuple(min(255, max(0, a + b)) for a, b in zip(COLOURS[shape.colour], shape.tint, strict=True))
    at = (round(middle[0] - side / 2), round(middle[1] - side / 2))
    picture.paste(ink, (*at, at[0] + side, at[1] + side), mask.reduce(scale))


def grid(size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows and columns whose cells are large enough for shapes: all three, or only the middle one."""
    width, height = size
    return ((0, 1, 2) if height >= 96 else (1,)), ((0, 1, 2) if width >= 96 else (1,))


def room(size: tuple[int, int]) -> float:
    """The shorter side of a cell, at most 160; a row or column that is alone has the whole side's room."""
    rows, columns = grid(size)
    return min(size[0] / len(columns), size[1] / len(rows), 160.0)


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's embedded font; a Pillow without FreeType has only a bitmap one, which cannot be scaled."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("pictures need a Pillow that was built with FreeType, as the wheels are")
    return font


def text_size(text: str, size: int, angle: float = 0.0) -> tuple[int, int]:
    """Width and height of a sign's plate around the text, turned by `angle`."""
    left, top, right, bottom = _font(size).getbbox(text)
    width, height = right - left + size * 0.7, bottom - top + size * 0.6
    turn = math.radians(abs(angle))
    c, s = math.cos(turn), math.sin(turn)
    return math.ceil(width * c + height * s) + 2, math.ceil(width * s + height * c) + 2


def _draw_sign(picture: Image.Image, sign: Sign) -> None:
    """Paint the plate, if any, and the text, both turned about the sign's middle."""
    font = _font(sign.size)
    left, top, right, bottom = font.getbbox(sign.text)
    width, height = int(right - left) + round(sign.size * 0.7), int(bottom - top) + round(sign.size * 0.6)
    text = Image.new("L", (width, height))
    ImageDraw.Draw(text).text(((width - left - right) / 2, (height - top - bottom) / 2), sign.text, font=font, fill=255)
    layers = [(sign.ink, text)]
    if sign.plate is not None:
        plate = Image.new("L", (width, height))
        ImageDraw.Draw(plate).rounded_rectangle((0, 0, width - 1, height - 1), radius=sign.size // 5, fill=255)
        layers.insert(0, (sign.plate, plate))
    for colour, layer in layers:
        turned = layer.rotate(sign.angle, Image.Resampling.BICUBIC, expand=True) if sign.angle else layer
        x = round(sign.at[0] * picture.size[0] - turned.size[0] / 2)
        y = round(sign.at[1] * picture.size[1] - turned.size[1] / 2)
        picture.paste(colour, (x, y, x + turned.size[0], y + turned.size[1]), turned)
