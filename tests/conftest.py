"""What all tests share: no network, one thread, reproducible properties, shapes checked, and small models."""

# ruff: noqa: E402 (some of it has to happen before the imports)

import importlib
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import jaxtyping
import pytest
from beartype import beartype
from hypothesis import HealthCheck, settings


def _names_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_a_shape(part) for part in get_args(hint))


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, on the annotations that name shapes: the others are mypy's, and a user's wrong type has to meet
    lenskit's own message, not beartype's."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _names_a_shape(hint)}
    return beartype(function) if function.__annotations__ else function


# Before lenskit is first imported: every function of it that says shapes is held to them, in the tests only.
install_checks = partial(jaxtyping.install_import_hook, "lenskit", f"{__name__}.check_shapes")
checks = install_checks()

import accelerate
import torch
from parity_table import WRITTEN_OUT, Row, from_hf, perturb
from postgres import Postgres
from server_process import ServerProcess
from transformers.utils import logging

import lenskit as lk
from lenskit.checkpoints import devices

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

settings.register_profile(
    "lenskit", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lenskit")


@pytest.fixture(scope="session")
def demo_gpt2() -> lk.HookedTransformer:
    """The embedded GPT-2, trained, with a tokenizer. Read only: all tests share it."""
    return lk.HookedTransformer.from_pretrained("demo-gpt2")


@pytest.fixture(scope="session")
def demo_llama() -> lk.HookedTransformer:
    """The embedded LLaMA, trained, with grouped queries and a tokenizer. Read only: all tests share it."""
    return lk.HookedTransformer.from_pretrained("demo-llama")


@pytest.fixture(scope="session", params=WRITTEN_OUT)
def model_type(request: pytest.FixtureRequest) -> str:
    """Two families in turn, which differ in most parts. Parity tests run over all of them."""
    return request.param


@pytest.fixture(scope="session")
def tiny() -> Callable[..., lk.HookedTransformer]:
    """`tiny("llama", head_dim=5)`: a fresh model of three layers whose every weight, gain and bias is random.

    Keyword arguments are attributes of Hugging Face's config.
    """

    def make(model_type: str, *, seed: int = 0, **attributes: Any) -> lk.HookedTransformer:
        model = lk.HookedTransformer(from_hf(Row("tiny", model_type, attributes)))
        perturb(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def shared(model_type: str, tiny: Callable[..., lk.HookedTransformer]) -> lk.HookedTransformer:
    """A tiny model of each of the two in turn. Read only: all tests share it."""
    return tiny(model_type)


@pytest.fixture
def fresh(model_type: str, tiny: Callable[..., lk.HookedTransformer]) -> lk.HookedTransformer:
    """A tiny model of each of the two in turn, of the test's own."""
    return tiny(model_type)


class Accelerator:
    """A device's name for lenskit, which the CPU plays for accelerate."""

    def __str__(self) -> str:
        return "accelerator"


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | str, dict[str, Any]], lk.HookedTransformer]:
    """A model of a folder whose parts run where a map of "cpu" and "acc" says.

    The CPU plays the accelerator "acc": accelerate takes `torch.device("cpu")` for a device to compute on, and "cpu",
    the string, for the place from which offloaded weights come when their part runs.
    """
    dispatch_model = accelerate.dispatch_model

    def played(model: Any, on: dict[str, Any], *, main_device: str, **options: Any) -> None:
        assert main_device == "accelerator"
        on = {part: torch.device("cpu") if device == "accelerator" else device for part, device in on.items()}
        dispatch_model(model, on, main_device=torch.device("cpu"), **options)

    def make(folder: Path | str, device_map: dict[str, Any]) -> lk.HookedTransformer:
        model = lk.HookedTransformer.from_pretrained(folder)
        names = {"cpu": torch.device("cpu"), "acc": Accelerator()}
        devices.dispatch(model, {part: names[device] for part, device in device_map.items()})
        return model

    monkeypatch.setattr(accelerate, "dispatch_model", played)
    return make


def _take_lenskit() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "lenskit"}


@contextmanager
def imported_again() -> Iterator[ModuleType]:
    """lenskit as users have it, newly imported, and without the checks of shapes; then the other one is back.

    The two have different classes; do not mix them.
    """
    global checks
    checked = _take_lenskit()
    checks.uninstall()
    try:
        yield importlib.import_module("lenskit")
    finally:
        _take_lenskit()
        sys.modules.update(checked)
        checks = install_checks()


@pytest.fixture(scope="module")
def unchecked() -> Iterator[ModuleType]:
    """lenskit without the checks of shapes, for torch.compile, which would trace them."""
    with imported_again() as unchecked:
        yield unchecked


@pytest.fixture
def new_import() -> Iterator[ModuleType]:
    """lenskit as it is in a process where nobody did anything with it yet."""
    with imported_again() as new:
        yield new


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server of both embedded models, with keys; each file's own."""
    process = ServerProcess(tmp_path_factory.mktemp("server"), "demo-gpt2", "demo-llama")
    yield process.start()
    process.stop()


@pytest.fixture(scope="module")
def key(server: ServerProcess) -> str:
    """One of its keys."""
    return server.key("somebody")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Each worker process's own."""
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    yield server
    server.stop()
