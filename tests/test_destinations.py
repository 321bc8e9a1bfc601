"""Writing to a folder: what may be in the way, and what is left of a write that does not come to its end."""

import errno
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from folders import ROOT, contents, in_a_process, same_weights, write_big, write_hf
from safetensors import SafetensorError

import lenskit as lk
from lenskit.checkpoints import write
from lenskit.errors import CheckpointError, CheckpointNotFoundError

load = lk.HookedTransformer.from_pretrained


@pytest.fixture
def folder(tmp_path: Path, model_type: str) -> Path:
    """A tiny random Hugging Face checkpoint of each family in turn."""
    return write_hf(tmp_path / "hf", model_type)


# -- destinations


@pytest.mark.parametrize("verb", [lk.convert, lk.export], ids=["convert", "export"])
def test_a_destination_in_the_way_is_left_alone(
    folder: Path, tmp_path: Path, verb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "save_file", lambda *_, **__: pytest.fail("something was written"))
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("kept")
    full.mkdir()
    (full / "notes").write_text("kept")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{file} is in the way\n.*a file"):
        verb(folder, file)
    with pytest.raises(CheckpointError, match=rf"{full} is in the way\n.*a folder with notes"):
        verb(folder, full)
    with pytest.raises(CheckpointError, match="in the way"):
        verb(folder, folder)
    with pytest.raises(CheckpointError, match=rf"{file}/below could not be written"):
        verb(folder, file / "below")
    with pytest.raises(CheckpointNotFoundError):
        verb(tmp_path / "none", tmp_path / "dest")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("verb", [lk.convert, lk.export], ids=["convert", "export"])
def test_destinations_that_will_do(folder: Path, tmp_path: Path, verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    inside = folder / "sub"  # of its own source
    for dest in ("link", tmp_path / "not" / "yet" / "there", "relative", inside):
        assert verb(folder, dest) == Path(dest)
        assert same_weights(load(Path(dest)), load(folder))
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    assert (tmp_path / "link").is_symlink()


# -- interrupts


def left_behind(folder: Path) -> list[str]:
    """Whatever is beside the source."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


@pytest.mark.parametrize("verb", [lk.convert, lk.export], ids=["convert", "export"])
@pytest.mark.parametrize("nth", [0, 1, 2])
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        RuntimeError("a bug"),
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
    ],
    ids=["interrupt", "bug", "disk full", "disk full, said by safetensors"],
)
def test_an_interrupted_write_leaves_nothing(
    folder: Path, verb: Any, nth: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def save_file(*args: Any, _save_file: Any = write.save_file, **kwargs: Any) -> None:
        calls.append(args)
        _save_file(*args, **kwargs)
        if len(calls) > nth:
            raise error

    monkeypatch.setattr(write, "save_file", save_file)
    monkeypatch.setattr(write, "SHARD_BYTES", 10_000)
    full = isinstance(error, OSError | SafetensorError)
    with pytest.raises(CheckpointError if full else type(error)) as caught:
        verb(folder, folder.with_name("dest"))
    assert left_behind(folder) == []
    if full:
        assert caught.value.__cause__ is error
        assert f"{folder.with_name('dest')} could not be written" in str(caught.value)
        assert "No space left on device" in str(caught.value)


def test_a_manifest_comes_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a folder which a killed process left is no checkpoint."""
    seen: list[list[str]] = []

    def write_json(path: Path, data: Any) -> None:
        seen.append(sorted(p.name for p in path.parent.iterdir()))
        path.write_text(json.dumps(data))

    monkeypatch.setattr(write, "_write_json", write_json)
    for verb, last in ((lk.convert, "weights.safetensors"), (lk.export, "model.safetensors")):
        verb(folder, folder.with_name(verb.__name__))
        assert last in seen.pop()


SLOW_CONVERT = """
import sys, time
from lenskit.checkpoints import write
write.SHARD_BYTES = 1_000
save_file = write.save_file
def slowly(*args, **kwargs):
    save_file(*args, **kwargs)
    print("wrote", flush=True)
    time.sleep(0.5)
write.save_file = slowly
getattr(write, sys.argv[3])(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_killed_process_leaves_no_folder_that_looks_whole(folder: Path, tmp_path: Path, verb: str) -> None:
    dest = tmp_path / "dest"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_CONVERT, folder, dest, verb], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["wrote\n"] * 2
        process.send_signal(signal.SIGKILL)
    assert not dest.exists()
    for name in left_behind(folder):
        assert name.startswith(".dest.partial-")
        with pytest.raises(CheckpointNotFoundError, match="is not a checkpoint"):
            load(tmp_path / name)
    assert same_weights(load(getattr(lk, verb)(folder, dest)), load(folder))  # and is in nobody's way


def test_of_two_at_once_one_wins(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, dest = threading.Barrier(2), tmp_path / "dest"
    outcomes: list[object] = []

    def save_file(*args: Any, _save_file: Any = write.save_file, **kwargs: Any) -> None:
        _save_file(*args, **kwargs)
        both.wait(30)

    def run() -> None:
        try:
            outcomes.append(lk.convert(folder, dest))
        except CheckpointError as error:
            outcomes.append(error)

    monkeypatch.setattr(write, "save_file", save_file)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dest in outcomes
    assert [str(error).splitlines()[0] for error in outcomes if error != dest] == [f"{dest} is in the way"]
    assert left_behind(folder) == ["dest"]
    assert same_weights(load(dest), load(folder))


# -- memory

PEAK = """
import sys
import lenskit as lk
from lenskit.checkpoints import write
write.SHARD_BYTES = 40 * 2**20
lk.HookedTransformer.from_pretrained("demo-llama")  # whatever is imported by now does not count

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
getattr(write, sys.argv[3])(sys.argv[1], sys.argv[2])
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("verb", ["convert", "export"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_writing_needs_the_memory_of_a_shard(tmp_path: Path, verb: str, form: str) -> None:
    folder, n_bytes = write_big(tmp_path / "hf", form, vocab_size=8_000, num_hidden_layers=4)
    assert n_bytes > 300 * 2**20
    peak = int(in_a_process(PEAK, folder, tmp_path / "dest", verb))
    assert peak < (50 if form == "safetensors" else 50 + 64 + 20) * 2**20
