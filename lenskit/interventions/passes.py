"""Passes: in which order prompts go through the model, so that what a prompt needs of another has been computed.

Within one pass, a value is there for everything that comes later in the forward pass, or at a later step. Where
prompt B uses at layer 2 what prompt A computes at layer 10, A has to go first. Passes are as few as that allows:
a prompt's pass is the length of the longest chain of such needs that leads to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lenskit.errors import DependencyError


@dataclass(frozen=True, slots=True)
class Need:
    """Rows that use what other rows compute.

    strict: it is computed later than it is used, so the others must be through before.
    op, use, source: for messages: the op, where it uses the value, and whose value that is.
    """

    users: Sequence[int]
    sources: Sequence[int]
    strict: bool
    op: str
    use: str
    source: str


def order(n_rows: int, needs: Sequence[Need]) -> list[list[int]]:
    """The rows of each pass.

    Raises:
        DependencyError: a row needs its own future, or rows need each other's.
    """
    if not any(need.strict for need in needs):
        return [list(range(n_rows))]
    for need in needs:
        own = set(need.users) & set(need.sources)
        if need.strict and own:
            raise DependencyError(
                f"{need.op}: prompt {min(own)} needs its own future",
                got=f"{need.source}, which is computed after {need.use}, where it is used",
                expected="a value that is computed before the point and step at which it is used",
                fix="use an earlier point or step, or take the value from another prompt (prompts=...)",
            )
    level = [0] * n_rows
    because: list[tuple[Need, int] | None] = [None] * n_rows  # and whose level it was
    for _ in range(n_rows + 1):
        changed = None
        for need in needs:
            latest = max(need.sources, key=level.__getitem__)
            least = level[latest] + need.strict
            for row in need.users:
                if level[row] < least:
                    level[row], because[row], changed = least, (need, latest), row
        if changed is None:
            return [[row for row in range(n_rows) if level[row] == n] for n in range(max(level) + 1)]
    raise _circle(changed or 0, because)


def _circle(row: int, because: Sequence[tuple[Need, int] | None]) -> DependencyError:
    """Two of the needs that make the circle: walking back from a row that keeps rising, one is met twice."""
    walked: list[int] = []
    while row not in walked:
        walked.append(row)
        found = because[row]
        assert found is not None
        row = found[1]
    circle = walked[walked.index(row) :]
    needs = [found[0] for found in (because[r] for r in circle) if found is not None]
    one = next(need for need in needs if need.strict)
    other = next((need for need in needs if need is not one), one)
    return DependencyError(
        f"{one.op}: prompts {', '.join(map(str, sorted(circle)))} need each other's future",
        got=f"{one.source} is used at {one.use}, and {other.source} at {other.use}",
        expected="an order in which every value is computed before it is used",
        fix="drop one of the two, use an earlier point or step, or name the prompts of each op (prompts=...)",
    )
