"""Scopes: hooks are attached for the length of a `with` block, in the thread that opened it, and then leave."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident

from lenskit.errors import HookError
from lenskit.hooks import Attachment, HookFunction, HookPoint, Kind, attach, detach
from lenskit.interventions.ops import Function, Hook, as_ops
from lenskit.interventions.sites import resolve


@contextmanager
def attached(attachments: Sequence[tuple[HookPoint, Attachment]]) -> Iterator[None]:
    """Functions on points, in order, for the length of the block; only these leave at its end, however it ends."""
    try:
        attach(attachments)
        yield
    finally:
        detach(attachments)


def on_points(points: Iterable[HookPoint], function: HookFunction, kind: Kind) -> list[tuple[HookPoint, Attachment]]:
    """One function on many points, in this thread's passes."""
    attachment = Attachment(function, kind, get_ident())
    return [(point, attachment) for point in points]


def on_sites(hooks: Sequence[Hook], points: Mapping[str, HookPoint], kind: Kind) -> list[tuple[HookPoint, Attachment]]:
    """Users' (site, function) pairs on the points that the sites name.

    Args:
        points: the model's, by name.

    Raises:
        HookError: an entry is no such pair.
        UnknownHookPointError: a site matches nothing.
    """
    found: list[tuple[HookPoint, Attachment]] = []
    for index, op in enumerate(as_ops(hooks)):
        if not isinstance(op, Function):
            raise HookError(
                f"hooks[{index}] is not a function",
                got=f"{op!r}, which is about one run",
                expected="pairs (name, glob or predicate; function of (activation, hook))",
                fix="pass it to run_with_hooks, run_with_cache or generate",
            )
        found += on_points(resolve(op.at, points), op.function, kind)
    return found
