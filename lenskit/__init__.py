"""lenskit: transformers rewritten to be read, with every activation a named hook point."""

from lenskit import errors
from lenskit.cache import ActivationCache
from lenskit.checkpoints.write import convert, export
from lenskit.errors import LenskitError
from lenskit.hooks import HookPoint
from lenskit.transformer import HookedTransformer, Result
from lenskit.version import __version__

__all__ = [
    "ActivationCache",
    "HookPoint",
    "HookedTransformer",
    "LenskitError",
    "Result",
    "__version__",
    "convert",
    "errors",
    "export",
]
