"""Leaves of expressions: an activation (`Act`), one that a `Read` has named (`Ref`), and its gradient (`Grad`)."""

from collections.abc import Callable
from typing import Any, final

from lenskit.errors import ExpressionError
from lenskit.interventions.expressions.nodes import Leaf
from lenskit.interventions.expressions.text import Text
from lenskit.interventions.selectors import Selector, Selectors


@final
class Act(Leaf):
    """An activation, where its hook point has it: after the ops on that point that come earlier in the list.

    Args:
        at: a hook point's name, perhaps with a negative layer: "blocks.-1.hook_resid_post".
        prompts, tokens, heads, dims: which part; an int drops its axis, a slice or list keeps it.
        steps: of a generation: an int; the step at hand if left out.

    Raises:
        ExpressionError: `at` is not one name, or `steps` not one step.
        SelectorError: a selector that is no int, slice or list of ints.
    """

    __slots__ = ("at", "selectors")

    at: str
    selectors: Selectors

    def __init__(
        self,
        at: str,
        *,
        prompts: Selector = None,
        tokens: Selector = None,
        heads: Selector = None,
        dims: Selector = None,
        steps: int | None = None,
    ) -> None:
        if not isinstance(at, str) or not at or any(sign in at for sign in "*?["):
            raise ExpressionError(
                "an Act is one activation",
                got=f"at={at!r}",
                expected='one hook point\'s name, such as "blocks.3.hook_mlp_out" or "blocks.-1.hook_resid_post"',
                fix="write an Act for each, and join them with torch.stack or torch.cat",
            )
        if not (steps is None or type(steps) is int):
            raise ExpressionError(
                f"Act({at!r}) is of one step",
                got=f"steps={steps!r}",
                expected="an int, or nothing for the step at hand",
                fix="write an Act for each step",
            )
        selectors = Selectors.of(
            prompts=prompts, tokens=tokens, heads=heads, dims=dims, steps=steps, where=f"Act({at!r})"
        )
        self._set(inputs=(), at=at, selectors=selectors)

    def text(self, known: Callable[[Any], Text | None]) -> Text:
        return Text(f"Act({self.at!r}{self.selectors})")


@final
class Ref(Leaf):
    """An activation as an earlier `Read` found it: before the ops that come between the two.

    Args:
        name: the `Read`'s.

    Raises:
        ExpressionError: the name is no text.
    """

    __slots__ = ("name",)

    name: str

    def __init__(self, name: str) -> None:
        self._set(inputs=(), name=_checked("a Ref", name))

    def text(self, known: Callable[[Any], Text | None]) -> Text:
        return Text(f"Ref({self.name!r})")


@final
class Grad(Leaf):
    """The gradient of a `Backward`'s loss with respect to an activation, in the shape of what the `Read` selects.

    Args:
        name: of the `Read`, which comes earlier in the list.
        of: the `Backward`'s name.

    Raises:
        ExpressionError: a name is no text.
    """

    __slots__ = ("name", "of")

    name: str
    of: str

    def __init__(self, name: str, *, of: str = "loss") -> None:
        self._set(inputs=(), name=_checked("a Grad", name), of=_checked("a Grad's loss", of))

    def text(self, known: Callable[[Any], Text | None]) -> Text:
        return Text(f"Grad({self.name!r}, of={self.of!r})")


def _checked(what: str, name: object) -> str:
    if isinstance(name, str) and name:
        return name
    raise ExpressionError(
        f"{what} needs a name",
        got=repr(name)[:100],
        expected="the name= of an op that comes earlier in the list",
        fix='write lk.Read(lk.Act("blocks.0.hook_resid_post"), name="x") and lk.Ref("x")',
    )
