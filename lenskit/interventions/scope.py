"""Scopes: hooks are attached for the length of a `with` block, in the thread that opened it, and then leave."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident

from lenskit.errors import HookError
from lenskit.hooks import Attachment, HookFunction, HookPoint, Kind, attach, detach
from lenskit.interventions.sites import Site, resolve

Hook = tuple[Site, HookFunction]


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
    for index, hook in enumerate(hooks):
        if not (isinstance(hook, tuple) and len(hook) == 2 and callable(hook[1])):
            raise HookError(
                f"hooks[{index}] is not a hook",
                got=repr(hook),
                expected="a pair (name, glob or predicate; function of (activation, hook)); hooks is a list of them",
                fix='write hooks=[("blocks.0.attn.hook_v", lambda act, hook: act * 0)]',
            )
        found += on_points(resolve(hook[0], points), hook[1], kind)
    return found
