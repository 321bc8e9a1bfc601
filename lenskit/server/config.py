"""What the server is told: by arguments, the environment (LENSKIT_SERVER_...), and a TOML file, in this order."""

import os
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

import pydantic
from pydantic import BaseModel, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from lenskit.errors import InputError

MIB = 2**20


class Model(BaseModel, extra="forbid"):
    """A model that is served.

    name: under which clients ask for it. source: an embedded name, a folder or a hub id; the name if left out.
    device, device_map, dtype, revision: as `from_pretrained`'s. replicas: worker processes.
    On Ray alone, max_replicas: how many there may be while many jobs wait; gpus, cpus: that each replica takes.
    """

    name: str = Field(min_length=1)
    source: str = ""
    device: str | None = None
    device_map: str | dict[str, str] | None = None
    dtype: str | None = None
    revision: str | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    gpus: float = Field(0, ge=0)
    cpus: float = Field(1, ge=0)

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        return self

    @property
    def where(self) -> str:
        """What `from_pretrained` is given."""
        return self.source or self.name


class JobLimits(BaseModel, extra="forbid"):
    """What one job may cost.

    body_bytes: of the request. rows, tokens: of its batch, those that are generated included.
    token_layers: passes x tokens x layers. result_bytes: of what is saved.
    expression_bytes: of all that the expressions of one step compute. ops: of the plan, nodes of expressions included.
    """

    body_bytes: int = Field(64 * MIB, ge=1)
    rows: int = Field(512, ge=1)
    tokens: int = Field(2**18, ge=1)
    token_layers: int = Field(2**25, ge=1)
    result_bytes: int = Field(1024 * MIB, ge=1)
    expression_bytes: int = Field(2048 * MIB, ge=1)
    ops: int = Field(5000, ge=1)


class KeyLimits(BaseModel, extra="forbid"):
    """What a key may have, unless it was given limits of its own.

    queued_jobs: that have not begun. tokens_per_minute: of the jobs accepted within a minute.
    result_bytes: of the results that are kept.
    """

    queued_jobs: int = Field(1000, ge=1)
    tokens_per_minute: int = Field(2_000_000, ge=1)
    result_bytes: int = Field(20 * 1024 * MIB, ge=1)


class Config(BaseSettings):
    """All of it; see docs/server.md.

    folder: of the database and the results, unless they are elsewhere. database: an SQLAlchemy URL.
    keys_database: of the keys; the same if left out. results: a folder or an fsspec URL.
    keep_hours: how long results are kept. use_keys: False lets everybody in, on loopback only.
    batch_rows, batch_tokens: of what runs together. upload_seconds: how long a client may be silent while it sends.
    attempts: how often a job is begun whose worker dies. silent_seconds: after which a worker counts as dead that says
    nothing in a database that several servers share.
    """

    model_config = SettingsConfigDict(env_prefix="LENSKIT_SERVER_", env_nested_delimiter="__", extra="forbid")

    models: list[Model] = Field(min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    folder: Path = Field(default_factory=lambda: data_home() / "server")
    database: str = ""
    keys_database: str = ""
    results: str = ""
    keep_hours: float = Field(24.0, gt=0)
    use_keys: bool = True
    batch_rows: int = Field(64, ge=1)
    batch_tokens: int = Field(2**15, ge=1)
    upload_seconds: float = Field(30.0, gt=0)
    attempts: int = Field(3, ge=1)
    silent_seconds: float = Field(15.0, ge=5)
    job: JobLimits = JobLimits()
    key: KeyLimits = KeyLimits()

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder.absolute() / 'server.db'}"

    @property
    def keys_url(self) -> str:
        return self.keys_database or self.database_url

    @property
    def results_url(self) -> str:
        return self.results or str(self.folder.absolute() / "results")

    @property
    def on_loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's to itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def data_home() -> Path:
    """Where lenskit keeps what is its user's."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lenskit"


def read_config(file: Path | None, **given: Any) -> Config:
    """What was given, the environment, and a file.

    Args:
        given: by name; None is nothing.

    Raises:
        InputError: something that makes no sense, or no models.
    """
    told = {name: value for name, value in given.items() if value is not None}
    try:
        written: dict[str, Any] = {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
        unset = {name: value for name, value in written.items() if not _in_environment(name)}
        config = Config(**{**unset, **told})
    except (pydantic.ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _refused(error, file) from error
    names = [model.name for model in config.models]
    if len(set(names)) < len(names):
        raise _bad("two models of one name", ", ".join(names), "different names", "set source, and name them apart")
    if not config.use_keys and not config.on_loopback:
        raise _bad(
            "a server that others can reach needs keys",
            f"no keys, and host {config.host}",
            "keys, or a loopback address",
            "add one with lenskit keys add NAME, or serve on 127.0.0.1",
        )
    return config


def _in_environment(name: str) -> bool:
    prefix = f"LENSKIT_SERVER_{name}".upper()
    return any(variable.upper() in (prefix,) or variable.upper().startswith(prefix + "__") for variable in os.environ)


def _refused(error: Exception, file: Path | None) -> InputError:
    where = "the server's configuration" if file is None else str(file)
    got = str(error)
    if isinstance(error, pydantic.ValidationError):
        found = error.errors()
        got = "; ".join(f"{'.'.join(map(str, part['loc'])) or 'all'}: {part['msg']}" for part in found[:5])
    return _bad(f"{where} makes no sense", got, "what docs/server.md lists", "correct it")


def _bad(what: str, got: str, expected: str, fix: str) -> InputError:
    return InputError(what, got=got, expected=expected, fix=fix)
