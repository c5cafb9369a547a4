"""A model that is ready to run, and how one is made: `load`, `dummy`, `prompt`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen

from mllm import budget, checkpoint, devices, families, prompts, signs, weights
from mllm.budget import MEM_FRACTION_STATIC, MemoryProfile
from mllm.config import Config
from mllm.errors import CheckpointError, ConfigError
from mllm.image_config import ImageConfig
from mllm.kernels.ops import Ops
from mllm.kernels.tables import tables_for
from mllm.prompts import Prompt
from mllm.shelf import Shelf
from mllm.tokenizer import Tokenizer
from mllm.weights import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@frozen(eq=False, kw_only=True)
class Model:
    """Constants that the stages close over.

    `ops` and the tables after it are what `mllm.kernels.tables.Tables` says of its device. `tokenizer` is None where
    the folder has none, `images` (how pictures become patches) where the model reads only text. `memory` is how the
    memory of its device was shared out when the weights had been loaded.
    """

    config: Config
    weights: Weights
    ops: Ops
    memory: MemoryProfile
    decode_ops: Callable[[int], Ops] | None = None
    prompt_ops: Callable[[int], Ops] | None = None
    vision_ops: Ops | None = None
    tokenizer: Tokenizer | None = None
    images: ImageConfig | None = None
    name: str = ""
    shelf: Shelf = field(factory=Shelf, init=False)  # what calls leave to the next one

    def step_ops(self, rows: int) -> Ops:
        """The ops of a decode step of `rows` rows."""
        return self.decode_ops(rows) if self.decode_ops else self.ops

    @property
    def pads(self) -> bool:
        """Whether batches are padded to sizes that come again (`mllm.buckets`), for the sake of recordings."""
        return self.prompt_ops is not None

    @property
    def device(self) -> torch.device:
        return self.weights.text.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.text.embed.dtype

    def __repr__(self) -> str:
        gigabytes = self.weights.nbytes / 1e9
        return f"Model({self.name!r}, {gigabytes:.2f} GB of {self.dtype} on {self.device})"


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    mem_fraction_static: float = MEM_FRACTION_STATIC,
    ignore_config: Collection[str] = (),
    progress: bool | None = None,
) -> Model:
    """Load a local Hugging Face folder: `config.json`, safetensors (sharded or not), and a tokenizer if it has one.

    Without a path it is "signs", the small model that ships with the package (`mllm.signs`).
    `device` is cpu, cuda, or cuda:1 where that is PyTorch's current one. `dtype` "auto" keeps what config.json or else
    the files say. `mem_fraction_static` is the share of the memory that is available now which weights and KV pool
    together may take. `ignore_config` names keys of config.json to pass over. `progress` shows a bar on standard error;
    None: where that is a terminal. Nothing is downloaded.

    Raises `ConfigError` and `CheckpointError` naming file and key or tensor, `MemoryBudgetError` with the arithmetic,
    `MissingPackageError` for a package that the device needs, and `ValueError` for the other arguments.
    """
    budget.check_fraction(mem_fraction_static)
    folder = signs.FOLDER if path is None else Path(path)
    config, images = _read(folder, ignore_config)
    kind = _dtype(config.dtype if dtype == "auto" else dtype)
    place = devices.parse(device)
    before = _planned(config, images, place, kind or torch.bfloat16, mem_fraction_static).available_before
    tokenizer = Tokenizer.load(folder)  # first, since one that is broken takes no time to find
    made = checkpoint.load(folder, config, device=place, dtype=kind, progress=progress)
    return Model(
        config=config,
        weights=made,
        memory=_profile(config, images, made, before, mem_fraction_static),
        **tables_for(device, made.text.embed.dtype)._asdict(),
        tokenizer=tokenizer,
        images=images,
        name="signs" if path is None else folder.name,
    )


def dummy(
    config: str | Config,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "bfloat16",
    mem_fraction_static: float = MEM_FRACTION_STATIC,
    seed: int = 0,
) -> Model:
    """A model of the right shapes with random weights, for tests and benchmarks: no download, no tokenizer.

    `config` is a `Config` or the name of a public model: qwen3-0.6b, -1.7b, -4b, -8b, qwen3-vl-2b, -4b, -8b.
    The other arguments are as in `load`; equal seeds give equal weights on one kind of device. Raises `ConfigError` for an
    unknown name, and `MemoryBudgetError`, `MissingPackageError` and `ValueError` as `load` does.
    """
    budget.check_fraction(mem_fraction_static)
    name = config if isinstance(config, str) else "dummy"
    parsed = families.preset(config) if isinstance(config, str) else config
    images = _image_config(None, parsed, name)
    kind = _dtype(parsed.dtype if dtype == "auto" else dtype) or torch.bfloat16
    place = devices.parse(device)
    before = _planned(parsed, images, place, kind, mem_fraction_static).available_before
    made = weights.random(parsed, seed=seed, device=place, dtype=kind)
    return Model(
        config=parsed,
        weights=made,
        memory=_profile(parsed, images, made, before, mem_fraction_static),
        **tables_for(device, made.text.embed.dtype)._asdict(),
        images=images,
        name=name,
    )


def plan(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    mem_fraction_static: float = MEM_FRACTION_STATIC,
) -> MemoryProfile:
    """How the memory would be shared out if a model were made now; nothing is loaded.

    `path` is a folder, the name of a public model's shapes as in `dummy`, or None for the embedded model. Raises as
    `load` does.
    """
    place = devices.parse(device)
    if isinstance(path, str) and path in families.PRESETS and not Path(path).is_dir():
        config, images = families.preset(path), _image_config(None, families.preset(path), path)
    else:
        config, images = _read(signs.FOLDER if path is None else Path(path), ())
    kind = _dtype(config.dtype if dtype == "auto" else dtype) or torch.bfloat16
    return _planned(config, images, place, kind, mem_fraction_static)


def prompt(model: Model, messages: Any) -> Prompt:
    """Chat messages in the Hugging Face form to a prompt; images are PIL images. See `mllm.prompts.from_messages`."""
    if model.tokenizer is None:
        raise CheckpointError(f"{model.name} has no tokenizer; pass token ids instead: mllm.Prompt(tokens=[...])")
    image_token = model.config.image_token_id if model.config.vision else None
    return prompts.from_messages(messages, model.tokenizer, image_token, model.config.video_token_id)


def _read(folder: Path, ignore: Collection[str]) -> tuple[Config, ImageConfig | None]:
    """What the JSON files of a checkpoint folder say."""
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise CheckpointError(f"{folder}: not a folder; models are local Hugging Face folders, nothing is downloaded")
    config = families.read(folder, ignore=ignore)
    return config, _image_config(ImageConfig.read(folder, ignore=ignore), config, str(folder))


def _planned(
    config: Config, images: ImageConfig | None, device: torch.device, dtype: torch.dtype, mem_fraction_static: float
) -> MemoryProfile:
    """The budget as it will be, from shapes: what cannot fit is refused before a weight is read or made."""
    size, before = weights.elements(config) * dtype.itemsize, budget.available(device)
    return budget.profile(
        config, images, device=device, memory=budget.describe(device), dtype=dtype, available_before=before,
        available_after=before - size, weight_bytes=size, mem_fraction_static=mem_fraction_static,
    )  # fmt: skip


def _profile(
    config: Config, images: ImageConfig | None, made: Weights, before: int, mem_fraction_static: float
) -> MemoryProfile:
    """The budget once the weights are there; `before`: bytes that were available before."""
    embed = made.text.embed
    return budget.profile(
        config, images, device=embed.device, memory=budget.describe(embed.device), dtype=embed.dtype,
        available_before=before, available_after=budget.available(embed.device), weight_bytes=made.nbytes,
        mem_fraction_static=mem_fraction_static,
    )  # fmt: skip


def _image_config(read: ImageConfig | None, config: Config, source: str) -> ImageConfig | None:
    """How pictures become patches; the encoder and the preprocessing must agree on their size."""
    vision = config.vision
    if vision is None:
        return None
    sizes = {"patch": vision.patch_size, "merge": vision.spatial_merge_size, "temporal": vision.temporal_patch_size}
    if read is None:
        return ImageConfig(**sizes)
    for name, expected in sizes.items():
        if getattr(read, name) != expected:
            raise ConfigError(
                f"{source}: the image processor has {name} {getattr(read, name)}, config.json has {expected}"
            )
    return read


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    if name is None or name in DTYPES.values():
        return name  # type: ignore[return-value]
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)} or the torch dtype, got {name!r}")
    return DTYPES[name]
