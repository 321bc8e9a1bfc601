"""The database: its tables and how it is reached. SQLite (WAL) for one server, Postgres for several."""

import time
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from lenskit.errors import InputError

POOL = 20  # connections that are kept open

Entry = Any  # a row of a table; its columns are its attributes

_tables = sa.MetaData()
jobs = sa.Table(
    "jobs",
    _tables,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), unique=True, nullable=False),
    sa.Column("key", sa.String(64), nullable=False),  # whose it is
    sa.Column("idempotency", sa.String(200)),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("verb", sa.String(20), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("alone", sa.Boolean, nullable=False),  # whether it may not share a batch
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("worker", sa.String(64)),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Column("body", sa.LargeBinary),  # until it is finished
    sa.Column("cost", sa.Text, nullable=False),
    sa.Column("expected_bytes", sa.BigInteger, nullable=False),  # of the result, at most
    sa.Column("error", sa.Text),
    sa.Column("result_bytes", sa.BigInteger),  # None: there is none, or not any more
    sa.UniqueConstraint("key", "idempotency"),
    sa.Index("by_model", "model", "status", "seq"),
    sa.Index("by_key", "key", "status"),
    sa.Index("by_key_and_time", "key", "created", "tokens"),
    sa.Index("by_key_and_size", "key", "result_bytes"),
)
keys = sa.Table(
    "keys",
    _tables,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("hash", sa.String(64), unique=True, nullable=False),
    sa.Column("limits", sa.Text, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
)


turns = sa.Table(
    "turns",
    _tables,
    sa.Column("model", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("served", sa.Float, nullable=False),  # when a job of this key was last begun
)
workers = sa.Table(
    "workers",
    _tables,
    sa.Column("name", sa.String(300), primary_key=True),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("beat", sa.Float, nullable=False),  # its last sign of life, by the database's clock
    sa.Column("memory", sa.Text, nullable=False),
)


def is_shared(url: str) -> bool:
    """Whether several servers may use the database: any that is no SQLite file."""
    return not url.startswith("sqlite")


def only_server_of(url: str) -> FileLock | None:
    """Take a database that is one server's alone, until the process ends; nothing for one that is shared.

    Raises:
        InputError: another server has it.
    """
    path = sa.make_url(url).database if not is_shared(url) else None
    if not path or path == ":memory:":
        return None
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            "another server uses this database",
            got=path,
            expected="a folder of its own for each server",
            fix="choose another --folder; servers can share a Postgres database",
        ) from None
    return lock


def connect(url: str) -> Engine:
    """The database behind an SQLAlchemy URL, with its tables.

    Raises:
        InputError: neither SQLite nor Postgres.
    """
    if url.startswith(("postgres://", "postgresql://")):
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    if not url.startswith(("sqlite", "postgresql")):
        raise InputError(
            "this database is of no kind that the server knows",
            got=repr(url.partition("://")[0]),
            expected="sqlite:///path/to/file.db, or postgresql://user@host/name",
            fix="leave database out for SQLite in the server's folder",
        )
    try:
        if not is_shared(url):
            engine = sa.create_engine(url, pool_size=POOL)
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            engine = sa.create_engine(url, pool_pre_ping=True, pool_size=POOL)
    except ModuleNotFoundError as error:
        raise InputError(
            "Postgres needs a driver", got=str(error), expected="psycopg", fix="pip install 'lenskit-interp[ray]'"
        ) from error
    with engine.execution_options(writes=True).begin() as connection:
        one_at_a_time(connection, "tables")
        _tables.create_all(connection)
    return engine


def one_at_a_time(connection: Connection, what: str) -> None:
    """Wait until no other transaction is at this: SQLite has one that writes at a time anyway."""
    if connection.dialect.name == "postgresql":
        number = int.from_bytes(sha256(f"lenskit {what}".encode()).digest()[:8], "big", signed=True)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))


def now(connection: Connection) -> float:
    """Seconds since 1970; by the one clock of a database that several machines share."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))).scalar_one())


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own transactions would begin too late
    for pragma in ("busy_timeout=20000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """One that will write has to say so at once: of two that read first, one could not. What reads is one statement."""
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
