"""Expressions: computations over activations, as data.

`Act(name)` stands for an activation. Arithmetic on it, indexing, and the functions of a closed list compute nothing:
they build a graph of nodes, which is checked before the model runs (`shape_of`), computed while it runs (`evaluate`),
and written to files (`as_json.py`).
"""

from lenskit.interventions.expressions.evaluation import acts, bind, evaluate, modules, shape_of
from lenskit.interventions.expressions.nodes import Act, Call, Expression, ModuleCall, order

__all__ = ["Act", "Call", "Expression", "ModuleCall", "acts", "bind", "evaluate", "modules", "order", "shape_of"]
