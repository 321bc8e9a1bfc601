"""Modules that load when they are first needed: heavy ones, and those of optional extras."""

import importlib
from typing import Any

from lenskit.errors import MissingExtraError


def load(module: str, *, extra: str | None = None) -> Any:
    """Import a module now.

    Args:
        module: its dotted name.
        extra: lenskit's extra that installs it; None for core dependencies.

    Raises:
        MissingExtraError: it belongs to an extra that is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if extra is None:
            raise
        raise MissingExtraError(
            f"{module} is not installed",
            got=str(error),
            expected=f"the packages of lenskit's extra [{extra}]",
            fix=f"pip install 'lenskit-interp[{extra}]'",
        ) from error
