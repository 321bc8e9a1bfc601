"""A real server, in processes of its own, on a port of loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx

SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class ServerProcess:
    """`lenskit serve`, started, killed and started again over the same folder."""

    def __init__(self, folder: Path, *models: str, keys: bool = True, **environment: Any) -> None:
        self.folder, self.models, self.keys, self.port = folder, models or ("demo-gpt2",), keys, free_port()
        self.environment = {f"LENSKIT_SERVER_{name.upper()}": str(value) for name, value in environment.items()}
        self.log = folder / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, ready: bool = True) -> "ServerProcess":
        arguments = ["serve", *self.models, "--port", str(self.port), "--folder", str(self.folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lenskit", *arguments, *([] if self.keys else ["--no-keys"])],
                env={**os.environ, **self.environment, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + SECONDS
        while ready and not self.is_ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        return self

    def is_ready(self) -> bool:
        """Whether every model has its weights."""
        try:
            found = httpx.get(f"{self.url}/metrics", timeout=5).text
        except httpx.HTTPError:
            return False
        return sum(
            line.startswith("lenskit_workers_ready") and line.endswith(" 1.0") for line in found.splitlines()
        ) == len(self.models)

    def key(self, name: str, *limits: str) -> str:
        """A new key."""
        arguments = ["keys", "add", name, "--folder", str(self.folder)]
        for limit in limits:
            arguments += ["--limit", limit]
        made = subprocess.run([sys.executable, "-m", "lenskit", *arguments], capture_output=True, text=True, check=True)
        return made.stdout.strip()

    def kill(self) -> None:
        """At once, as a machine that loses its power would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(SECONDS)

    def stop(self) -> None:
        """As an operator would."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(SECONDS)

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        assert self.process is not None
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        return [int(pid) for pid in children.split()]
