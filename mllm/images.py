"""From a PIL picture to the patches that the vision encoder reads: numpy and Pillow only.

Three steps, each usable alone: `open_image` (file or bytes to a checked, decoded picture), `grid` (header to
patch counts, without decoding) and `patches` (picture to `uint8 [X, 3*patch*patch]`). Normalising is left to the
device that runs the encoder, `(x / 255 - mean) / std` in float32: bytes are a quarter of the transfer.

Pixels equal those of transformers' PIL image processor, including transparency composited onto white.
"""

import io
import math
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mllm.errors import ImageError
from mllm.image_config import MAX_PIXELS, ImageConfig

__all__ = ["MAX_BYTES", "MAX_PIXELS", "ImageConfig", "check_image", "grid", "open_image", "patches", "rgb", "tokens"]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 256 * 2**20  # of an encoded file; nothing larger is read
MAX_RATIO = 200  # of the longer to the shorter side, transformers' limit

# What Pillow's decoders raise on broken files: OSError for most, the others from chunk and EXIF parsing. Warnings are
# listed because a caller may have turned them into errors.
BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Warning),
)


def check_image(image: object) -> Image.Image:
    """`image` itself if it is a PIL image; `TypeError` otherwise. A string is never opened or fetched."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike):
        raise TypeError(
            f"an image must be a PIL image, got the {type(image).__name__} {str(image)[:80]!r}; nothing is opened or "
            "fetched here: call mllm.images.open_image(path) and pass its result"
        )
    kind = f"{type(image).__module__}.{type(image).__qualname__}"
    raise TypeError(f"an image must be a PIL image, got {kind}; PIL.Image.fromarray makes one from uint8 pixels")


def grid(size: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """(rows, columns) of patches of a picture of `size` (width, height) in pixels; needs no decoded pixels.

    The sides are rounded to multiples of patch*merge pixels, then scaled so that the area lies between
    `min_pixels` and `max_pixels`, keeping the ratio as nearly as the rounding allows (Qwen's `smart_resize`).
    Raises `ImageError` for an empty side, a ratio above 200:1, or more than `MAX_PIXELS` pixels.
    """
    width, height = size
    _check_size(width, height)
    factor = config.factor
    rows, cols = round(height / factor), round(width / factor)
    area = rows * cols * factor**2
    if area > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        cols = max(1, math.floor(width / shrink / factor))
    elif area < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        cols = math.ceil(width * grow / factor)
    return rows * config.merge, cols * config.merge


def tokens(grid: tuple[int, int], config: ImageConfig) -> int:
    """Tokens of the language model that a picture of (rows, columns) patches becomes."""
    rows, cols = grid
    return rows * cols // config.merge**2


def pixels(image: Image.Image, config: ImageConfig) -> NDArray[np.uint8]:
    """The picture at the size that its patches have: `uint8 [height, width, 3]`. EXIF is not applied here.

    Raises `ImageError` if the picture cannot be decoded or is outside the limits of `grid`.
    """
    rows, cols = grid(check_image(image).size, config)
    size = cols * config.patch, rows * config.patch
    plain = rgb(image)
    return np.asarray(plain if plain.size == size else plain.resize(size, Image.Resampling.BICUBIC))


def patches(image: Image.Image, config: ImageConfig) -> NDArray[np.uint8]:
    """The picture as `uint8 [X, 3*patch*patch]`, one row per patch: channel, then row, then column in the patch.

    Patches that merge into one token are neighbours. The temporal axis is left out: a still picture is one
    frame repeated, so the patch embedding sums its temporal kernels instead. Raises `ImageError` as `pixels` does.
    """
    whole = pixels(image, config)
    (rows, cols), patch, merge = grid(image.size, config), config.patch, config.merge
    tiles = whole.reshape(rows // merge, merge, patch, cols // merge, merge, patch, 3)
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(rows * cols, 3 * patch**2)


def rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, the picture itself where it is that already; transparency is composited onto white, as in
    transformers 5.23 (earlier ones drop it)."""
    try:
        if "A" not in image.getbands() and image.info.get("transparency") is None:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
        layer = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    except BROKEN as error:
        raise _failure(f"a {image.size[0]} x {image.size[1]} {image.mode} image", error) from error


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """A PNG, JPEG or WebP file, or its bytes, as a decoded upright PIL image (the EXIF orientation is applied).

    Size is checked on the header, before decoding. Raises `ImageError` for everything that can be wrong with the
    file, `TypeError` for other kinds of source.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), len(source), f"{len(source)} bytes")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"open_image takes a path or bytes, got {type(source).__name__}")
    name = os.fspath(source)
    try:
        status = Path(name).stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device could be read for ever
            raise ImageError(f"{name}: not a regular file")
        with open(name, "rb") as file:
            return _decode(file, status.st_size, name)
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _decode(file: io.BufferedReader | io.BytesIO, length: int, name: str) -> Image.Image:
    if length > MAX_BYTES:
        raise ImageError(f"{name}: {length} bytes is more than the {MAX_BYTES} that are read")
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size)
            image.load()
            return ImageOps.exif_transpose(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except BROKEN as error:
        raise _failure(name, error) from None  # Pillow's own text may hold the address of a buffer


def _failure(name: str, error: BaseException) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"{name}: not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file")
    detail = f": {error}" if str(error) and "0x" not in str(error) else ""
    return ImageError(f"{name}: cannot be decoded ({type(error).__name__}{detail})")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image needs at least one pixel, got {width} x {height}")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is {width * height} pixels, more than {MAX_PIXELS}; scale it down first")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{width} x {height} is longer than {MAX_RATIO}:1; crop it first")


def coordinates(grid: tuple[int, int], config: ImageConfig) -> NDArray[np.int32]:
    """Where each patch stands, in the order of `patches`: int32 [4, X] of row, column, rows, columns."""
    rows, cols = grid
    merge = config.merge
    index = np.indices(grid, np.int32).reshape(2, rows // merge, merge, cols // merge, merge)
    place = index.transpose(0, 1, 3, 2, 4).reshape(2, rows * cols)
    return np.concatenate([place, np.broadcast_to(np.array([[rows], [cols]], np.int32), (2, rows * cols))])
