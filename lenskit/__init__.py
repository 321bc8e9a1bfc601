"""lenskit: transformers rewritten to be read, with every activation a named hook point."""

from lenskit import errors
from lenskit.cache import ActivationCache
from lenskit.checkpoints.write import convert, export
from lenskit.errors import LenskitError
from lenskit.generation import Generation
from lenskit.hooks import HookPoint
from lenskit.interventions.expressions import Act, Grad, Ref
from lenskit.interventions.expressions.random_numbers import rand, rand_like, randn, randn_like
from lenskit.interventions.forward import Past, Result
from lenskit.interventions.gradient_ops import Backward, SetGrad
from lenskit.interventions.ops import Add, Read, Save, Scale, Set, Stop
from lenskit.interventions.plan import Plan
from lenskit.remote.asynchronous import connect_async
from lenskit.remote.connection import connect
from lenskit.transformer import HookedTransformer
from lenskit.version import __version__

__all__ = [
    "Act",
    "ActivationCache",
    "Add",
    "Backward",
    "Generation",
    "Grad",
    "HookPoint",
    "HookedTransformer",
    "LenskitError",
    "Past",
    "Plan",
    "Read",
    "Ref",
    "Result",
    "Save",
    "Scale",
    "Set",
    "SetGrad",
    "Stop",
    "__version__",
    "connect",
    "connect_async",
    "convert",
    "errors",
    "export",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
]
