"""Sites: the ways to say which hook points are meant."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from lenskit.errors import UnknownHookPointError
from lenskit.hooks import HookPoint

Site = str | Callable[[str], bool] | Sequence["Site"]


def resolve(site: Site, points: Mapping[str, HookPoint]) -> list[HookPoint]:
    """The hook points that a site names, in the order of the forward pass.

    Args:
        site: a name ("blocks.0.attn.hook_q"), a name with a negative layer ("blocks.-1.hook_resid_post"),
            a glob ("blocks.*.hook_resid_post"), a predicate on names, or a list of these.
        points: the model's, by name.

    Raises:
        UnknownHookPointError: the site, or an entry of the list, matches none.
    """
    names = _matches(site, points)
    if isinstance(site, str):
        return [points[name] for name in names]
    return [point for name, point in points.items() if name in names]


def _matches(site: Site, points: Mapping[str, HookPoint]) -> Collection[str]:
    """Names; those that one text matches are in order."""
    if isinstance(site, str):
        if site in points:
            return (site,)
        pattern = _count_layers(site, points)
        if pattern in points:
            return (pattern,)
        if any(sign in pattern for sign in "*?["):
            return _glob(pattern, tuple(points)) or _no_match(repr(site), points, near=site)
        return _no_match(repr(site), points, near=site)
    if callable(site):
        return {name for name in points if site(name)} or _no_match(describe(site), points)
    if isinstance(site, Iterable):
        return {name for entry in site for name in _matches(entry, points)} or _no_match("an empty list", points)
    return _no_match(f"{site!r} (a {type(site).__name__})", points)


def describe(site: Site) -> str:
    """The site as text, for messages."""
    return f"predicate {getattr(site, '__qualname__', site)}" if callable(site) else repr(site)


@lru_cache(maxsize=256)  # a script asks the same of every prompt
def _glob(pattern: str, names: tuple[str, ...]) -> Collection[str]:
    return tuple(name for name in names if fnmatchcase(name, pattern))


def _count_layers(name: str, points: Mapping[str, HookPoint]) -> str:
    """The name with a negative layer counted from the end."""
    found = re.match(r"blocks\.-(\d+)\.(.*)", name)
    if not found:
        return name
    n_layers = 1 + max((point.layer for point in points.values() if point.layer is not None), default=-1)
    layer = n_layers - int(found[1])
    return f"blocks.{layer}.{found[2]}" if layer >= 0 else name


def _no_match(what: str, points: Mapping[str, HookPoint], near: str | None = None) -> Collection[str]:
    close = difflib.get_close_matches(near, points, n=3, cutoff=0.6) if near else []
    last = list(points)[-1] if points else "none"
    raise UnknownHookPointError(
        f"no hook point matches {what}",
        got=what,
        expected=f"one of the {len(points)} points that run, such as {', '.join(close) or last}",
        fix="model.hook_names() lists them; globs (blocks.*.hook_q) and negative layers (blocks.-1) work too",
    )
