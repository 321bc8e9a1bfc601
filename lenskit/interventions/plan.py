"""`Plan`: interventions as data, compiled for a model and a batch, and, without Python functions, a file."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, final

from torch import Tensor, nn

from lenskit.errors import ExpressionError
from lenskit.hooks import HookPoint
from lenskit.interventions import plan_file
from lenskit.interventions.compiler import Compiler
from lenskit.interventions.expressions import bind, modules
from lenskit.interventions.geometry import Geometry
from lenskit.interventions.ops import Hook, Numbered, Op, as_ops
from lenskit.interventions.program import Program
from lenskit.models.base import Decoder

KEPT = 8  # compiled programs a plan remembers: as many geometries as a script runs in turn


@final
class Plan:
    """A list of interventions that is run again and again, saved, compared, or sent.

    Wherever `hooks=` is taken, a plan may stand. It remembers what it compiled, so running it on another batch of the
    same shape checks nothing again.

    Args:
        hooks: ops (`lk.Save`, `lk.Set`, ...) and pairs (site, function), which run in this order.

    Raises:
        HookError: an entry is neither.
    """

    def __init__(self, hooks: "Sequence[Op | Hook] | Plan" = ()) -> None:
        self.ops: tuple[Op, ...] = hooks.ops if isinstance(hooks, Plan) else as_ops(hooks)
        self._programs: OrderedDict[Any, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self.ops)

    def __repr__(self) -> str:
        return "Plan([" + "".join(f"\n    {op!r}," for op in self.ops) + ("\n" if self.ops else "") + "])"

    def compile(
        self, model: Decoder, points: Mapping[str, HookPoint], geometry: Geometry, *, n_steps: int | None
    ) -> Program:
        """The program for a model and a batch, from memory where there is one.

        Args:
            points: of the model, those that will run, in order.
            geometry: the batch's rows and tokens.
            n_steps: of the generation; None for a forward pass.

        Raises:
            PlanError, HookError: an op that cannot be carried out.
        """
        dtype = model.embed.weight.dtype
        key = (id(points), dtype, geometry.key, n_steps)
        program = self._programs.get(key)
        if program is None or program.points is not points:  # a program keeps its points, so no id comes twice
            program = Compiler(points, dtype, geometry, n_steps).compile(
                [_bound(Numbered(index, op), model) for index, op in enumerate(self.ops)]
            )
            self._programs[key] = program
            if len(self._programs) > KEPT:
                self._programs.popitem(last=False)
        return program

    # -- as data

    def to_json(self, model: nn.Module | None = None) -> dict[str, Any]:
        """The plan as plain data. Tensors are named by the hash of what they hold; `tensors()` has them.

        Args:
            model: whose modules the expressions apply (`model.unembed(...)`), if they do: they are written by name.

        Raises:
            PlanFormatError: a Python function or predicate, which is no data; it names the op.
        """
        return plan_file.to_json(self.ops, model)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that `to_json` names, by name."""
        return plan_file.tensors(self.ops)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Self:
        """The inverse of `to_json`.

        Raises:
            PlanFormatError: an unknown version, op, function or key; a tensor that is missing or is not the one named.
        """
        return cls(plan_file.from_json(data, tensors or {}))

    def save(self, path: str | Path, model: nn.Module | None = None) -> Path:
        """Write `path` (JSON) and, if there are tensors, the same name with .safetensors.

        Raises:
            PlanFormatError: a Python function or predicate; nothing is written.
        """
        return plan_file.save(self.ops, Path(path), model)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote; nothing in it is executed.

        Raises:
            PlanFormatError: it is no plan of a version that this library reads.
        """
        return cls(plan_file.load(Path(path)))

    def digest(self, model: nn.Module | None = None) -> str:
        """A hash (SHA-256, hexadecimal) of the plan: the same on every machine, another one for another plan."""
        return plan_file.digest(self.ops, model)


def _bound(numbered: Numbered, model: nn.Module) -> Op:
    """The op with modules in its expressions looked up by name, and checked to be the model's."""
    op = numbered.op
    applied = [module for expression in op.expressions for module in modules(expression)]
    if any(isinstance(module, str) for module in applied):
        try:
            return op.with_expressions([bind(expression, model.get_submodule) for expression in op.expressions])
        except ExpressionError as error:
            what = f"{numbered}: {error.what}"
            raise ExpressionError(what, got=error.got, expected=error.expected, fix=error.fix) from error
    for module in applied:
        if not any(module is own for own in model.modules()):
            raise ExpressionError(
                f"{numbered} applies a module of another model",
                got=f"a {type(module).__name__} that is no part of the model that runs",
                expected="a module of the model that runs, such as model.ln_final",
                fix="write the expression with this model, or load the plan from a file, where modules are names",
            )
    return op
