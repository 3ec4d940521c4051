"""Errors a user can act on: each carries one sentence that says what was found and what was wanted.

The command line prints that sentence and ends with exit code 2; library code lets them pass as ordinary exceptions.
They also derive from the built-in exception of their kind, so `except ValueError` works as it does for the rest of the
package.
"""

from __future__ import annotations

import importlib
from typing import Any


class ClusterQError(Exception):
    """Base of all errors that have a remedy outside the code.

    Attributes:
        told: of several processes another one tells the user.
    """

    told = False


class ModelError(ClusterQError, ValueError):
    """A network that cannot be built, loaded or quantized."""


class DataError(ClusterQError, ValueError):
    """An evaluation set that cannot be read or does not fit the network."""


class CheckpointError(ClusterQError, ValueError):
    """A checkpoint that is damaged, incomplete, of an unknown format, or does not fit the network."""


class OutputError(ClusterQError, OSError):
    """Results that cannot be written: folder exists, no permission, disk full."""


class DivergenceError(ClusterQError, ArithmeticError):
    """A loss or a statistic became NaN or infinite."""


class RunInterrupted(ClusterQError):
    """A signal ended a run after its state was saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class MissingPackageError(ClusterQError, ImportError):
    """An optional package that the request needs is not installed."""


def require(module: str, *, purpose: str, extra: str | None = None) -> Any:
    """Import an optional module.

    Args:
        module: dotted name, such as `"torchvision.models"`.
        purpose: what needs it, for the message.
        extra: extra of this package that brings it, such as `"viz"`.

    Raises:
        MissingPackageError: its package is not installed.
    """
    package = module.split(".", 1)[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".", 1)[0] != package:
            raise
        install = f"pip install 'clusterq[{extra}]'" if extra else f"pip install {package}"
        raise MissingPackageError(
            f"{purpose} needs the package {package!r}, which is not installed: {install}"
        ) from None
