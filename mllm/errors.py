"""Every exception that `mllm` raises on purpose.

Two families: what a caller can mend by changing an input (`ValueError`), and what is a mistake in the
order of calls (`RuntimeError`); beside them a package that is not there (`ImportError`). A message says what, where,
expected, got, and what to do about it.
"""

from __future__ import annotations


class MllmError(Exception):
    """Base of every error below: `except mllm.errors.MllmError` catches them all and nothing else."""


class ConfigError(MllmError, ValueError):
    """A `config.json` that this runtime would not compute exactly, or one that makes no sense."""


class CheckpointError(MllmError, ValueError):
    """Weight files that are broken, incomplete, or not those of the configured model."""


class ImageError(MllmError, ValueError):
    """A picture that cannot be decoded or is outside the declared limits."""


class PromptError(MllmError, ValueError):
    """A prompt that can never run: wrong placeholders, or longer than the context or the pool."""


class MemoryBudgetError(MllmError, ValueError):
    """Weights, KV pool and what runs beside them do not fit; the message is the arithmetic and what to change."""


class ShapeError(MllmError, ValueError):
    """A tensor whose shape, dtype or device is not the one its field declares."""


class TableError(MllmError, ValueError):
    """A request table asked for something that contradicts what it holds."""


class DonatedError(MllmError, RuntimeError):
    """A state object was read after a stage consumed it."""


class CaptureError(MllmError, RuntimeError):
    """A captured function was called in a way that its recording cannot serve."""


class MissingPackageError(MllmError, ImportError):
    """An optional package is needed for what was asked; the message says what to install."""

    @classmethod
    def of(cls, error: ImportError, *, needs: str, install: str) -> MissingPackageError:
        """Of what an import raised: `needs`, like "plots need", the package, and what pip is to `install`.

        A package that is there and cannot be imported says itself what is wrong.
        """
        if isinstance(error, ModuleNotFoundError):
            return cls(f"{needs} {error.name}: pip install {install}")
        return cls(f"{needs} what cannot be imported here (pip install {install}): {error}")
