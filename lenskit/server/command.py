"""What `lenskit serve` and `lenskit keys` do."""

import json
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import uvicorn
from rich.console import Console
from rich.table import Table

from lenskit.errors import InputError
from lenskit.server.app import application
from lenskit.server.config import Config, KeyLimits, Model, data_home, read_config
from lenskit.server.database import connect
from lenskit.server.keys import Keys
from lenskit.server.metrics import Metrics
from lenskit.server.service import Service

SECONDS_TO_CLOSE = 5


def serve(
    models: Sequence[str], *, config: Path | None, elsewhere: Callable[[Config], None] | None, **given: Any
) -> None:
    """Serve until interrupted.

    Args:
        models: names, or NAME=SOURCE.
        config: a TOML file.
        elsewhere: serves in another way than in processes of this machine.
        given: of `Config`, by name; None is nothing.

    Raises:
        LenskitError: a configuration that makes no sense, a model that cannot be loaded.
    """
    settings = read_config(config, models=[_model(text) for text in models] or None, **given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if elsewhere is not None:
        elsewhere(settings)
        return
    if growing := [model.name for model in settings.models if model.max_replicas is not None]:
        raise InputError(
            "only on Ray the number of replicas changes",
            got=f"max_replicas for {', '.join(growing)}",
            expected="replicas alone",
            fix="leave max_replicas out, or serve with --ray",
        )
    metrics = Metrics()
    service = Service(settings, metrics.count)
    _greet(settings, service)
    server = uvicorn.Server(
        uvicorn.Config(
            application(service, metrics),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        )
    )
    for stop in (signal.SIGINT, signal.SIGTERM):  # one that started us in the background may have it ignored
        signal.signal(stop, server.handle_exit)
    server.run()
    if not server.started:
        raise InputError(
            "the server could not start",
            got=f"an address that cannot be had: {settings.host}:{settings.port}",
            expected="a free port",
            fix="choose another --port, or end what listens there",
        )


def _model(text: str) -> Model:
    name, _, source = text.partition("=")
    if not name or text.endswith("="):
        raise InputError("no model", got=repr(text), expected="NAME, or NAME=SOURCE", fix="write demo-gpt2")
    return Model(name=name, source=source)


def _greet(config: Config, service: Service) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(f"lenskit serves {', '.join(service.served)} at http://{config.host}:{config.port}")
    if config.use_keys and not service.keys.all():
        console.print("There is no key yet: lenskit keys add NAME (or --no-keys, on loopback)", style="yellow")


# -- keys


def add_key(name: str, *, limits: Sequence[str], folder: Path | None, database: str | None) -> None:
    """Make a key and print it, this once."""
    given = _limits(limits)
    key = _keys(folder, database).add(name, given)
    print(key)
    Console(stderr=True).print(f"This is {name}'s key; it is shown now, and never again.", style="dim")


def remove_key(name: str, *, folder: Path | None, database: str | None) -> None:
    """Remove a key: what comes with it from now on is refused."""
    if not _keys(folder, database).remove(name):
        raise InputError(
            "there is no such key", got=repr(name), expected="a name of lenskit keys list", fix="look there"
        )
    print(f"removed {name}")


def list_keys(*, folder: Path | None, database: str | None) -> None:
    """Print names and limits."""
    table = Table("name", "limits", box=None, header_style="dim")
    for row in _keys(folder, database).all():
        own: Mapping[str, int] = json.loads(row.limits)
        table.add_row(row.name, ", ".join(f"{name}={n:,}" for name, n in own.items()) or "the server's")
    Console().print(table)


def _keys(folder: Path | None, database: str | None) -> Keys:
    where = data_home() / "server" if folder is None else folder
    if database is None:
        where.mkdir(parents=True, exist_ok=True)
        where.chmod(0o700)
    return Keys(connect(database or f"sqlite:///{where.absolute() / 'server.db'}"))


def _limits(texts: Sequence[str]) -> dict[str, int]:
    found = dict(text.partition("=")[::2] for text in texts)
    known = set(KeyLimits.model_fields)
    try:
        checked = KeyLimits(**found)
    except pydantic.ValidationError as error:
        raise InputError(
            "these are no limits",
            got=", ".join(texts),
            expected=", ".join(f"{name}=NUMBER" for name in sorted(known)),
            fix="write --limit tokens_per_minute=100000",
        ) from error
    return {name: getattr(checked, name) for name in found}
