"""Expressions: computations over activations, as data.

`Act(name)` stands for an activation. Arithmetic on it, indexing, and the functions of a closed list compute nothing:
they build a graph of nodes, which is checked before the model runs (`shape_of`), computed while it runs (`evaluate`),
and written to files (`as_json.py`).
"""

from lenskit.interventions.expressions.activations import Act, Grad, Ref
from lenskit.interventions.expressions.evaluation import (
    UnknownShape,
    bind,
    evaluate,
    is_python,
    leaves,
    modules,
    rewritten,
    shape_of,
    shape_of_node,
)
from lenskit.interventions.expressions.nodes import Applied, Call, Expression, Leaf, ModuleCall, order

__all__ = [
    "Act",
    "Applied",
    "Call",
    "Expression",
    "Grad",
    "Leaf",
    "ModuleCall",
    "Ref",
    "UnknownShape",
    "bind",
    "evaluate",
    "is_python",
    "leaves",
    "modules",
    "order",
    "rewritten",
    "shape_of",
    "shape_of_node",
]
