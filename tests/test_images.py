"""Pictures: equal to transformers' PIL image processor, and safe with whatever is called a picture."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm.errors import ConfigError, ImageError
from mllm.images import MAX_PIXELS, ImageConfig, grid, open_image, patches, rgb, tokens

try:  # transformers 5.4 and later
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
except ImportError:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor

SMALL = ImageConfig(min_pixels=4 * 32 * 32, max_pixels=64 * 32 * 32)


def processor(config: ImageConfig) -> Any:
    return Processor(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=config.patch,
        merge_size=config.merge,
        temporal_patch_size=config.temporal,
        image_mean=list(config.mean),
        image_std=list(config.std),
    )


def theirs(image: Image.Image, config: ImageConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """transformers' pixel values without the repeated frame, and its grid."""
    # Naming the layout: 5.3 takes a picture of one row for channels first.
    out = processor(config)(images=[image], return_tensors="np", input_data_format="channels_last")
    values = out["pixel_values"].reshape(-1, 3, config.temporal, config.patch**2)
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, -1])
    frames, rows, cols = out["image_grid_thw"][0].tolist()
    assert frames == 1
    return values[:, :, 0].reshape(len(values), -1), (rows, cols)


def normalised(image: Image.Image, config: ImageConfig) -> np.ndarray:
    values = patches(image, config).astype(np.float32).reshape(-1, 3, config.patch**2) / np.float32(255)
    mean, std = (np.array(v, np.float32)[:, None] for v in (config.mean, config.std))
    return ((values - mean) / std).reshape(len(values), -1)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def palette(transparency: int | bytes | None) -> Image.Image:
    image = noise(50, 40, "L").convert("P")
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def transparent() -> dict[str, Image.Image]:
    keyed = noise(41, 37)
    keyed.info["transparency"] = keyed.getpixel((0, 0))
    return {
        "RGBA": noise(67, 45, "RGBA"),
        "LA": noise(45, 67, "LA"),
        "palette, one index clear": palette(7),
        "palette, a table of alphas": palette(bytes(range(256))),
        "colour key": keyed,
    }


def composites() -> bool:
    """Whether the installed transformers puts transparency onto white (5.23 does, 5.17 drops it)."""
    return bool(theirs(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), SMALL)[0].max() > 0)


def same_as_transformers(image: Image.Image, config: ImageConfig) -> None:
    want, shape = theirs(image, config)
    assert grid(image.size, config) == shape
    np.testing.assert_allclose(normalised(image, config), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (9, 1), (199, 1), (1, 200), (37, 61), (333, 97), (640, 480), (1000, 30)]
)
def test_patches_of_odd_sizes_equal_transformers(size: tuple[int, int]) -> None:
    same_as_transformers(noise(*size), ImageConfig())


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_every_opaque_mode_equals_transformers(mode: str) -> None:
    same_as_transformers(noise(60, 40, mode), SMALL)


@pytest.mark.parametrize(("mode", "kind"), [("1", bool), ("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_pixels_that_are_not_bytes_equal_transformers(mode: str, kind: type) -> None:
    ramp = np.linspace(0, 70000, 60 * 40).reshape(40, 60).clip(0, 65535)
    image = Image.fromarray((ramp > 30000) if kind is bool else ramp.astype(kind))
    assert image.mode == mode
    same_as_transformers(image, SMALL)


def test_a_palette_image_equals_transformers() -> None:
    same_as_transformers(palette(None), SMALL)


@pytest.mark.parametrize("kind", list(transparent()))
def test_transparency_equals_transformers_on_white(kind: str) -> None:
    image = transparent()[kind]
    if composites():
        same_as_transformers(image, SMALL)
    full = np.asarray(image.convert("RGBA"), np.float64)
    alpha = full[..., 3:] / 255
    by_hand = full[..., :3] * alpha + 255 * (1 - alpha)
    assert alpha.min() < 1
    assert np.abs(np.asarray(rgb(image)) - by_hand).max() <= 1  # Pillow rounds in integers
    same_as_transformers(rgb(image), SMALL)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    patch=st.sampled_from([4, 14, 16]),
    merge=st.integers(1, 3),
    temporal=st.integers(1, 3),
    low=st.integers(1, 20000),
    high=st.integers(20000, 200000),
)
def test_patches_equal_transformers_for_any_size_and_config(
    width: int, height: int, patch: int, merge: int, temporal: int, low: int, high: int
) -> None:
    means = ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    config = ImageConfig(
        patch=patch, merge=merge, temporal=temporal, min_pixels=low, max_pixels=high, mean=means[0], std=means[1]
    )
    image = noise(width, height)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ImageError, match="200:1"):
            grid(image.size, config)
        with pytest.raises(ValueError, match="200"):
            theirs(image, config)
        return
    want, shape = theirs(image, config)
    assert grid(image.size, config) == shape
    assert tokens(shape, config) * merge**2 == len(want)
    np.testing.assert_allclose(normalised(image, config), want, rtol=0, atol=2e-6)


def test_a_patch_is_channel_then_row_then_column_and_merged_patches_are_neighbours() -> None:
    config = ImageConfig(patch=2, merge=2, min_pixels=1, max_pixels=10**6)
    rows, cols = np.mgrid[:4, :8].astype(np.uint8)
    got = patches(Image.fromarray(np.stack([rows, cols, rows * 0 + 9], -1)), config)
    assert got.shape == (8, 12)
    assert got.dtype == np.uint8
    assert got[0].tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 9, 9, 9, 9]
    assert [(p[0], p[4]) for p in got.tolist()] == [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]


def test_patches_leave_the_picture_and_exif_as_they_are() -> None:
    image = noise(128, 64)
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    assert grid(image.size, SMALL) == (4, 8)
    patches(image, SMALL)
    assert image.tobytes() == before


# --- opening -----------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A greyscale PNG of any declared size around `data`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def real_81_megapixels() -> bytes:
    press, zeros = zlib.compressobj(), bytes(9001 * 10)
    return png(9000, 9000, b"".join(press.compress(zeros) for _ in range(900)) + press.flush())


def huge_canvas_webp() -> bytes:
    """An animation of 1x1 frames that declares a canvas of 16383 x 16383."""
    data = bytearray(encoded(noise(1, 1), "WEBP", save_all=True, append_images=[noise(1, 1, seed=1)]))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (16382).to_bytes(3, "little") * 2
    return bytes(data)


BOMBS = {
    "81 MP in a small file": real_81_megapixels,
    "400 MP header": lambda: png(20000, 20000),
    "a line of 2^31 - 1": lambda: png(1, 2**31 - 1),
    "webp canvas": huge_canvas_webp,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_open_reads_a_path_and_its_bytes_alike(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(33, 21), kind)
    (tmp_path / "x").write_bytes(data)
    for source in (data, tmp_path / "x", str(tmp_path / "x")):
        image = open_image(source)
        assert image.size == (33, 21)
        np.testing.assert_array_equal(image, Image.open(io.BytesIO(data)))


def test_open_turns_the_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image = noise(8, 4)
    upright = open_image(encoded(image, "PNG", exif=exif))
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    data = encoded(noise(16, 16), kind)
    with pytest.raises(ImageError, match=f"^{len(data)} bytes: not a readable PNG, JPEG or WEBP file$"):
        open_image(data)


@pytest.mark.parametrize("name", list(BOMBS))
@pytest.mark.filterwarnings("error")
def test_a_bomb_is_refused(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(BOMBS[name]())
    assert "pixels" in str(caught.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from getrusage in KiB")
def test_refusing_bombs_takes_under_50_mb(tmp_path: Path) -> None:
    for index, make in enumerate(BOMBS.values()):
        (tmp_path / str(index)).write_bytes(make())
    for kind in ("PNG", "WEBP"):
        noise(8, 8).save(tmp_path / "warm", kind)
        (tmp_path / "warm").rename(tmp_path / f"warm-{kind}")
    script = """
import resource, sys
from mllm.errors import ImageError
from mllm.images import open_image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for name in ("warm-PNG", "warm-WEBP"): open_image(name)
before = peak()
for name in map(str, range(int(sys.argv[1]))):
    try: open_image(name)
    except ImageError: refused += 1
print(refused, peak() - before)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(len(BOMBS))]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: S603
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    refused, grown = map(int, done.stdout.split())
    assert refused == len(BOMBS)
    assert grown < 50 * 1024


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (0, 5), (5, 0), (MAX_PIXELS + 1, 1), (9000, 9000)])
def test_a_size_outside_the_limits_is_an_image_error(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]}"):
        grid(size, ImageConfig())


def test_a_ratio_of_200_is_the_last_that_works() -> None:
    assert grid((200, 1), ImageConfig()) == (2, 228)
    assert open_image(encoded(noise(200, 1), "PNG")).size == (200, 1)
    with pytest.raises(ImageError, match="200:1"):
        open_image(encoded(noise(201, 1), "PNG"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_one_kind_of_error_without_addresses(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(64, 48), kind)
    for length in range(0, len(data) * 9 // 10, 97):
        (tmp_path / "cut").write_bytes(data[:length])
        for source, name in ((data[:length], f"{length} bytes"), (tmp_path / "cut", str(tmp_path / "cut"))):
            with pytest.raises(ImageError) as caught:
                open_image(source)
            assert str(caught.value).startswith(f"{name}: ")
            assert "0x" not in str(caught.value).removeprefix(name)


def outcome(data: bytes) -> str:
    try:
        return f"{open_image(data).size}"
    except ImageError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on EXIF that it skips
def test_damaged_bytes_open_or_are_an_image_error(data: st.DataObject) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    content = bytearray(encoded(noise(24, 16), kind, exif=exif))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert "0x" not in outcome(bytes(content))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_the_caller_made_an_error_is_an_image_error() -> None:
    cut = b"MM\0*\0\0\0\x08\xff\xff"  # 65535 entries of EXIF, and none is there
    with pytest.raises(ImageError, match="Corrupt EXIF data"):
        open_image(encoded(noise(24, 16), "PNG", exif=cut))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError, match=f"^{len(data)} bytes: "):
        open_image(data)


def test_a_missing_file_a_folder_and_a_pipe_are_image_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, text in (("none", "No such file"), (".", "not a regular file"), ("pipe", "not a regular file")):
        with pytest.raises(ImageError, match=text):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="null"):
        open_image("a\0b")
    with pytest.raises(ImageError, match="No such file"):
        open_image("https://example.com/x.png")


def test_a_file_above_the_byte_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match="1099511627776 bytes is more than"):
        open_image(tmp_path / "sparse")


def test_a_picture_opened_elsewhere_that_breaks_while_decoding_is_an_image_error() -> None:
    lazy = Image.open(io.BytesIO(encoded(noise(64, 64), "PNG")[:2000]))
    with pytest.raises(ImageError, match="a 64 x 64 RGB image: cannot be decoded"):
        patches(lazy, SMALL)


@pytest.mark.parametrize("thing", ["photo.png", "https://example.com/x.png", Path("photo.png"), b"png", None, 3])
def test_only_a_pil_image_is_an_image(thing: object) -> None:
    with pytest.raises(TypeError, match="must be a PIL image"):
        patches(thing, SMALL)  # type: ignore[arg-type]


def test_an_array_is_told_how_to_become_an_image() -> None:
    with pytest.raises(TypeError, match=r"numpy\.ndarray; PIL\.Image\.fromarray"):
        patches(np.zeros((4, 4, 3), np.uint8), SMALL)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path or bytes, got int"):
        open_image(3)  # type: ignore[arg-type]


# --- configuration -----------------------------------------------------------------------------------------------


def written(folder: Path, content: object, name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


def test_a_folder_without_the_file_gets_the_published_values(tmp_path: Path) -> None:
    assert ImageConfig.read(tmp_path) == ImageConfig()
    assert ImageConfig().factor == 32


def test_what_transformers_saves_is_read_back(tmp_path: Path) -> None:
    config = ImageConfig(
        patch=14, merge=3, min_pixels=5000, max_pixels=90000, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    processor(config).save_pretrained(tmp_path)
    assert ImageConfig.read(tmp_path) == config
    Processor().save_pretrained(tmp_path)
    ours = ImageConfig.read(tmp_path)
    assert (ours.patch, ours.min_pixels, ours.max_pixels) == (14, 56 * 56, 28 * 28 * 1280)


def test_the_published_file_and_its_older_spelling_agree(tmp_path: Path) -> None:
    common = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": 0.5}
    common |= {
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "device": None,
    }
    sizes = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    pixels = {"max_pixels": 16777216, "min_pixels": 65536}
    for spelling in (sizes, pixels, sizes | pixels):
        assert ImageConfig.read(written(tmp_path, common | spelling)) == ImageConfig()


def test_the_processor_file_wins_if_it_describes_pictures(tmp_path: Path) -> None:
    written(tmp_path, {"patch_size": 8})
    written(tmp_path, {"processor_class": "Qwen3VLProcessor"}, "processor_config.json")
    assert ImageConfig.read(tmp_path).patch == 8
    written(tmp_path, {"image_processor": {"patch_size": 12}}, "processor_config.json")
    assert ImageConfig.read(tmp_path).patch == 12


def test_a_key_left_out_is_what_transformers_takes(tmp_path: Path) -> None:
    ours, reference = ImageConfig.read(written(tmp_path, {})), Processor()
    assert ours.patch == reference.patch_size
    assert ours.mean == tuple(reference.image_mean)
    assert ours.std == tuple(reference.image_std)
    size = reference.size
    assert (ours.min_pixels, ours.max_pixels) == (size["shortest_edge"], size["longest_edge"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resample", 2),
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_convert_rgb", False),
        ("do_center_crop", True),
        ("do_resize", 1),
        ("rescale_factor", 1 / 127.5),
        ("image_processor_type", "CLIPImageProcessor"),
        ("patch_size", 0),
        ("patch_size", True),
        ("patch_size", 16.0),
        ("merge_size", -1),
        ("temporal_patch_size", 10**9),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_mean", [0.5, 0.5, 10**400]),
        ("image_std", [0.5] * 10**5),
        ("patch_size", ["x" * 10**6]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", "0.5"),
        ("min_pixels", 10**12),
        ("max_pixels", 10),
        ("size", {"height": 3, "width": 4}),
        ("size", [1, 2]),
        ("size", [1] * 10**5),
        ("dither", "blue"),
    ],
)
def test_a_value_that_would_compute_something_else_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    field = {"patch_size": "patch", "merge_size": "merge", "temporal_patch_size": "temporal"}
    name = field.get(key, key.removeprefix("image_") if key in ("image_mean", "image_std") else key)
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: .*{name}") as caught:
        ImageConfig.read(written(tmp_path, {key: value}))
    assert len(str(caught.value)) < 600


def test_an_unknown_key_can_be_ignored_by_name(tmp_path: Path) -> None:
    assert ImageConfig.read(written(tmp_path, {"dither": 1, "patch_size": 16}), ignore=["dither"]).patch == 16


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100000, "\udcff"])
def test_a_file_that_is_no_json_object_is_a_config_error(tmp_path: Path, text: str) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).write_text(text, errors="surrogateescape")
        with pytest.raises(ConfigError, match=name):
            ImageConfig.read(tmp_path)


def test_the_config_checks_itself() -> None:
    with pytest.raises(ConfigError, match="min_pixels 2 is above max_pixels 1"):
        ImageConfig(min_pixels=2, max_pixels=1)
    with pytest.raises(ConfigError, match="std"):
        evolve(ImageConfig(), std=(0.0, 1.0, 1.0))
