"""`Saved`: what the `Save` ops of a run kept, by key."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor

from lenskit.errors import NotSavedError


class NeverRan:
    """Stands where a step was to be saved that the generation did not reach."""

    def __init__(self, step: int, steps_run: int) -> None:
        self.step, self.steps_run = step, steps_run


class Saved(Mapping[str, Any]):
    """What was saved, by the hook point's full name or the `name=` that the `Save` has.

    A value is a tensor, a list of tensors (one a step that ran), or, where a named `Save` is about several points,
    another `Saved` by point. `saved["blocks.-1.hook_resid_post"]` counts layers from the end.

    Args:
        values: by key.
        n_layers: of the model.
    """

    def __init__(self, values: dict[str, Any] | None = None, *, n_layers: int = 0) -> None:
        self._values = values or {}
        self.n_layers = n_layers

    @classmethod
    def of(cls, values: dict[str, Any], n_layers: int) -> Self:
        """From values of which some are dictionaries by point."""
        nested = {key: cls(v, n_layers=n_layers) if isinstance(v, dict) else v for key, v in values.items()}
        return cls(nested, n_layers=n_layers)

    def __getitem__(self, key: str) -> Any:
        value = self._values.get(self._full(key), self)
        if value is self:
            raise NotSavedError(
                f"nothing was saved as {key!r}",
                got=repr(key),
                expected=f"one of {', '.join(self._values) or 'nothing: no op saves anything'}",
                fix=f"add lk.Save({key!r}) to the hooks",
            )
        if isinstance(value, NeverRan):
            raise NotSavedError(
                f"step {value.step} of {key!r} never ran",
                got=f"a generation that was over after {value.steps_run} steps",
                expected=f"more than {value.step} steps",
                fix="save a slice of steps, which gives a list of those that ran; or look at steps_run first",
            )
        return value

    def entry(self, key: str) -> Any:
        """What stands there, also where it is a step that never ran."""
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._full(key) in self._values

    def _full(self, key: str) -> str:
        """The key with a negative layer counted from the end."""
        if key in self._values:
            return key
        return re.sub(r"^blocks\.-(\d+)\.", lambda m: f"blocks.{self.n_layers - int(m[1])}.", str(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Saved({', '.join(f'{key}: {_summary(value)}' for key, value in self._values.items())})"


def _summary(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, list):
        shapes = [_summary(entry) for entry in value]
        alike = len(set(shapes[1:])) == 1 and len(shapes) > 3
        return f"{len(value)} x [{', '.join([*shapes[:2], '...'] if alike else shapes)}]"
    if isinstance(value, Saved):
        return "{" + ", ".join(value) + "}"
    return "never ran"
