"""The keys' table."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from lenskit.errors import InputError
from lenskit.server.database import Entry, keys


class Keys:
    """The keys' table. A key is 256 random bits, of which only a hash is kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._writing = engine, engine.execution_options(writes=True)

    def add(self, name: str, limits: Mapping[str, int]) -> str:
        """A new key; it is shown now and never again.

        Raises:
            InputError: there is one of this name.
        """
        key = f"lk_{secrets.token_urlsafe(32)}"
        values = {"name": name, "hash": _hash(key), "limits": json.dumps(dict(limits)), "created": time.time()}
        with self._writing.begin() as connection:
            if connection.execute(sa.select(keys.c.name).where(keys.c.name == name)).first() is not None:
                raise InputError(
                    f"there is a key named {name!r} already",
                    got=repr(name),
                    expected="a new name",
                    fix=f"remove that one first: lenskit keys remove {name}",
                )
            connection.execute(sa.insert(keys).values(values))
        return key

    def remove(self, name: str) -> bool:
        """Remove a key; whether there was one."""
        with self._writing.begin() as connection:
            return connection.execute(sa.delete(keys).where(keys.c.name == name)).rowcount == 1

    def all(self) -> Sequence[Entry]:
        """Names, limits and times."""
        with self._engine.begin() as connection:
            return connection.execute(sa.select(keys.c.name, keys.c.limits, keys.c.created).order_by(keys.c.name)).all()

    def find(self, key: str) -> tuple[str, dict[str, int]] | None:
        """Whose key it is, and the limits that it was given."""
        with self._engine.begin() as connection:
            row = connection.execute(sa.select(keys.c.name, keys.c.limits).where(keys.c.hash == _hash(key))).first()
        return None if row is None else (row.name, json.loads(row.limits))


def _hash(key: str) -> str:
    return sha256(key.encode()).hexdigest()
