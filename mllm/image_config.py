"""How pictures are resized, cut and normalised, read from the checkpoint's `preprocessor_config.json`.

The file is read closed-world: a key is a field, or must have the one value that `mllm.images` computes, or is
known to change nothing. Anything else is refused by name, because a silently ignored key means silently
different pixels.
"""

import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import Attribute, field, frozen

from mllm.errors import ConfigError
from mllm.files import read_object

MAX_PIXELS = 64 * 2**20  # pixels (width times height) that are ever decoded or resized to: 192 MiB as RGB


def _integer(low: int, high: int) -> Any:
    """An attrs validator: an int (never a bool) in [low, high]."""

    def check(instance: object, attribute: "Attribute[Any]", value: object) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{attribute.name} must be an integer from {low} to {high}, got {reprlib.repr(value)}")

    return check


def _channels(value: object) -> object:
    """A single number stands for all three channels, as in transformers; a list becomes a tuple."""
    if type(value) in (int, float):
        return (value,) * 3
    return tuple(value) if isinstance(value, Iterable) else value


def _finite(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    good = isinstance(value, tuple) and len(value) == 3
    good = good and all(type(v) in (int, float) and abs(v) < 1e30 for v in value)  # type: ignore[attr-defined]
    if not good:
        raise ConfigError(
            f"{attribute.name} must be three finite numbers (red, green, blue), got {reprlib.repr(value)}"
        )


@frozen(kw_only=True)
class ImageConfig:
    """Preprocessing of one picture. The defaults are those published with Qwen3-VL.

    patch: side of a square patch, in pixels.
    merge: the model merges merge x merge patches into one token.
    temporal: frames that the patch embedding spans; a still picture is one frame repeated.
    min_pixels, max_pixels: area (width times height) after resizing, in pixels.
    mean, std: of the red, green and blue channels, on the scale 0 to 1.

    Raises `ConfigError` for values that make no sense.
    """

    patch: int = field(default=16, validator=_integer(1, 256))
    merge: int = field(default=2, validator=_integer(1, 16))
    temporal: int = field(default=2, validator=_integer(1, 16))
    min_pixels: int = field(default=65536, validator=_integer(1, MAX_PIXELS))
    max_pixels: int = field(default=16777216, validator=_integer(1, MAX_PIXELS))
    mean: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5), converter=_channels, validator=_finite)
    std: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5), converter=_channels, validator=_finite)

    def __attrs_post_init__(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if min(self.std) <= 0:
            raise ConfigError(f"std must be above 0 in every channel, got {self.std}")

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this many pixels."""
        return self.patch * self.merge

    @classmethod
    def read(cls, folder: str | os.PathLike[str], *, ignore: Iterable[str] = ()) -> "ImageConfig":
        """The configuration in a checkpoint folder, or the defaults if the folder has none.

        `processor_config.json` wins over `preprocessor_config.json` when both describe pictures, as in
        transformers. `ignore` names keys to skip. Raises `ConfigError` naming the file and the key.
        """
        for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
            path = Path(folder) / name
            if not path.is_file():
                continue
            content = read_object(path, ConfigError)
            if part is not None and part not in content:
                continue  # files from before transformers 5 describe only the text side here
            return _from_dict(content if part is None else content[part], str(path), frozenset(ignore))
        return cls()


# What transformers' Qwen2-VL image processor takes for a key that its file leaves out (not Qwen3-VL's values).
ABSENT: dict[str, Any] = {
    "patch": 14,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
FIELDS = {
    "patch_size": "patch",
    "merge_size": "merge",
    "temporal_patch_size": "temporal",
    "image_mean": "mean",
    "image_std": "std",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
}
SIZES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}  # areas in truth, whatever they are called
REQUIRED: dict[str, tuple[object, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "resample": (3,),  # PIL.Image.Resampling.BICUBIC
    "rescale_factor": (1 / 255,),
    "image_processor_type": tuple(
        f"Qwen{kind}ImageProcessor{suffix}" for kind in ("2VL", "2_5_VL", "3VL") for suffix in ("", "Fast", "Pil")
    ),
}
IGNORED = frozenset(
    ("processor_class", "feature_extractor_type", "image_seq_length", "return_tensors", "device", "disable_grouping")
    + ("data_format", "input_data_format", "crop_size", "pad_size", "default_to_square", "size_divisor")
)


def _from_dict(content: object, source: str, ignore: frozenset[str]) -> ImageConfig:
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: image_processor must be a JSON object, got {type(content).__name__}")
    # null means "left out" to transformers, too
    given = {key: value for key, value in content.items() if value is not None and key not in ignore | IGNORED}
    fields = {**ABSENT, **_size(given.pop("size", {}), source)}
    unknown = []
    for key, value in given.items():
        if key in FIELDS:
            fields[FIELDS[key]] = value
        elif key not in REQUIRED:
            unknown.append(key)
        elif not any(type(value) is type(want) and value == want for want in REQUIRED[key]):
            wanted = " or ".join(repr(want) for want in REQUIRED[key])
            raise ConfigError(
                f"{source}: {key} must be {wanted}, got {reprlib.repr(value)}; mllm computes nothing else"
            )
    if unknown:
        raise ConfigError(f"{source}: unknown keys {sorted(unknown)}; name them in ignore_config to go on without")
    try:
        return ImageConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _size(size: object, source: str) -> dict[str, Any]:
    """The `size` entry as fields; it holds both bounds or is left out."""
    if size == {}:
        return {}
    if not isinstance(size, dict) or set(size) != set(SIZES):
        raise ConfigError(f"{source}: size must hold exactly {sorted(SIZES)}, got {reprlib.repr(size)}")
    return {SIZES[key]: value for key, value in size.items()}
