"""Where the server is and by which key one is known there: what was given, else the environment, else a file.

The file is `lenskit/config.toml` in the folder of the user's settings ($XDG_CONFIG_HOME, or ~/.config):

    url = "https://lens.example.org"
    api_key = "lk_..."

A key is never shown, and one from the file goes to the server of the file alone.
"""

import os
import re
import stat
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lenskit.errors import InputError, KeyRefusedError

URL, KEY = "LENSKIT_URL", "LENSKIT_API_KEY"  # in the environment
KNOWN = ("url", "api_key")


@dataclass(frozen=True)
class Settings:
    """A server's address, without a slash at its end, and the key; None for a server that asks for none."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    @property
    def is_here(self) -> bool:
        """Whether the server runs on this machine, where no proxy is on the way."""
        host = urlsplit(self.url).hostname or ""
        return host == "localhost" or host == "::1" or host.startswith("127.")


def settings(url: str | None = None, api_key: str | None = None) -> Settings:
    """What to connect with.

    Raises:
        InputError: no URL, one that is no server's address, or a file that says something else.
        KeyRefusedError: a key that can be none.
    """
    file = config_file()
    held = _read(file)
    chosen = url if url is not None else os.environ.get(URL) or held.get("url")
    if chosen is None:
        raise InputError(
            "which server to connect to was not said",
            got=f"no url, no {URL} in the environment, and none in {file}",
            expected="a server's address",
            fix='write lk.connect("https://lens.example.org")',
        )
    address = _checked_url(chosen)
    key = api_key if api_key is not None else os.environ.get(KEY) or None
    if key is None and "api_key" in held and held.get("url") in (None, chosen, address):
        key = held["api_key"]
    return Settings(address, None if key is None else _checked_key(key))


def config_file() -> Path:
    """The file of the user's settings, whether it is there or not."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lenskit" / "config.toml"


def _read(file: Path) -> Mapping[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no TOML
        raise _bad_file(file, f"{type(error).__name__}: {error}") from None
    wrong = [name for name, value in data.items() if name not in KNOWN or not isinstance(value, str)]
    if wrong:  # a value may be a key, so none is shown
        raise _bad_file(file, f"{', '.join(wrong)}, which is unknown or no text")
    if "api_key" in data and os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        warnings.warn(f"{file} holds an API key and others can read it: chmod 600 {file}", stacklevel=4)
    return data


def _bad_file(file: Path, got: str) -> InputError:
    return InputError(f"{file} cannot be used", got=got, expected='url = "..." and api_key = "..."', fix="correct it")


def _checked_url(url: str) -> str:
    shown = re.sub(r"//[^/@]*@", "//...@", url) if isinstance(url, str) else repr(url)
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except (ValueError, AttributeError):
        fine = False
    if not fine or "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            "this is no server's address",
            got=shown,
            expected="http:// or https://, a host, perhaps a port and a path; a key has a place of its own",
            fix='write lk.connect("https://lens.example.org", api_key=...)',
        )
    return url.rstrip("/")


def _checked_key(key: str) -> str:
    if isinstance(key, str) and re.fullmatch(r"[\x21-\x7e]+", key):
        return key
    raise KeyRefusedError(
        "the API key can be none",
        got=f"{len(key)} characters, of which some are blank or no ASCII" if isinstance(key, str) else "no text",
        expected="what the server's maker of keys printed, as it was: lk_...",
        fix=f"copy it again, into api_key=, {KEY}, or {config_file()}",
    )
