"""What the benchmark measures in a fresh process: `python benchmark_probe.py '{"probe": "load", ...}'` prints JSON.

How memory is measured. The size asked about is resident memory, mapped files included. The kernel keeps its peak
(VmHWM); writing 5 to /proc/self/clear_refs sets that peak back to the present, so no growth between two samples is
missed. Where there is no such file a thread samples every millisecond instead. Two things would blur the difference
between "before" and "peak": freed memory that malloc keeps and later uses again, and imports that only happen at the
first use. So malloc is told to give freed blocks of 64 KiB and more straight back to the system (`ENVIRONMENT`,
which also switches off its habit of raising that threshold), what it still holds is trimmed, and before the
measurement a tiny model of the same kind is loaded and run. Peaks are then within a few megabytes of the tensors alive
at once, and the same in every run; left to itself, malloc adds a tenth to five sixths, another share each time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of the process that runs a probe, set by the one that starts it: malloc reads it only once.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(64 * 2**10),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**10),
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Grown:
    """Bytes of resident memory over what there was at the start of the block: at its peak, and at its end."""

    peak: int = 0
    end: int = 0


@contextmanager
def growth() -> Iterator[Grown]:
    """How the process grows in the block."""
    grown = Grown()
    gc.collect()
    _trim()
    before = _resident()
    with _peak() as peak:
        yield grown
        grown.end = _resident() - before
    grown.peak = peak() - before


@contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """Largest resident memory within the block, in bytes, once it is over."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        with _sampled_peak() as peak:
            yield peak
        return
    found: list[int] = []
    yield lambda: found[0]
    found.append(_status("VmHWM"))


@contextmanager
def _sampled_peak() -> Iterator[Callable[[], int]]:
    largest = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            largest[0] = max(largest[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: largest[0]
    finally:
        over.set()
        thread.join()


def _resident() -> int:
    if sys.platform == "linux":
        return _status("VmRSS")
    import psutil  # accelerate brings it

    return psutil.Process().memory_info().rss


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def _trim() -> None:
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:  # a C library other than GNU's
            return


def load(library: str, folder: str, tiny: str, dtype: str | None) -> dict[str, Any]:
    """Loading a checkpoint, then a first forward pass that, with the sums after it, touches every weight."""
    import torch

    torch.set_num_threads(1)
    read = _loader(library, getattr(torch, dtype) if dtype else None)
    tokens = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        start = time.process_time()
        read(tiny)(tokens)
        first_use = time.process_time() - start
        with growth() as using:  # whose peak is that of the part after the inner block, which resets the record
            start, wall = time.process_time(), time.monotonic()
            with growth() as loading:
                model = read(folder)
            cpu_s, wall_s = time.process_time() - start, time.monotonic() - wall
            model(tokens)
            for parameter in model.parameters():
                parameter.sum()
    return {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "first_use_cpu_s": first_use,
        "load_peak": loading.peak,
        "load_end": loading.end,
        "used_peak": max(using.peak, loading.peak),
        "used_end": using.end,
    }


def _loader(library: str, dtype: Any) -> Callable[[str], Any]:
    if library == "lenskit":
        import lenskit

        return lambda folder: lenskit.HookedTransformer.from_pretrained(folder, dtype=dtype)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()


def convert(folder: str, dest: str) -> dict[str, Any]:
    """Writing a lenskit checkpoint."""
    import lenskit

    start = time.process_time()
    with growth() as converting:
        lenskit.convert(folder, dest)
    return {"cpu_s": time.process_time() - start, "peak": converting.peak}


def forward(library: str, size: dict[str, Any], pos: int) -> dict[str, Any]:
    """A forward pass over `pos` tokens, with random weights that are in memory before."""
    import torch
    from benchmark_sizes import Size

    torch.set_num_threads(1)
    run = _new_model(library, Size(**size))
    with torch.no_grad():
        run(torch.zeros(1, 4, dtype=torch.long))
        tokens = torch.randint(size["d_vocab"], (1, pos))
        with growth() as running:
            logits = run(tokens)
    logits = getattr(logits, "logits", logits)
    return {"peak": running.peak, "end": running.end, "logits": logits.nbytes}


def _new_model(library: str, size: Any) -> Callable[[Any], Any]:
    if library == "TransformerLens":
        import transformer_lens

        config = transformer_lens.HookedTransformerConfig(**size.transformer_lens_config())
        return transformer_lens.HookedTransformer(config).eval()
    if library == "lenskit":
        from lenskit import HookedTransformer
        from lenskit.models.registry import family

        hf = size.hf_config()
        return HookedTransformer(family(hf.model_type, where="the benchmark").config.from_hf(hf.to_dict())).eval()
    import transformers

    made = transformers.AutoModelForCausalLM.from_config(size.hf_config(), attn_implementation="sdpa").eval()
    return lambda tokens: made(tokens, use_cache=False)


def imports(module: str) -> dict[str, Any]:
    """Importing a module, and which heavy ones came with it."""
    start = time.process_time()
    __import__(module)
    cpu_s = time.process_time() - start
    return {"cpu_s": cpu_s, "brought": [name for name in ("transformers", "plotly") if name in sys.modules]}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "load": load,
    "convert": convert,
    "forward": forward,
    "imports": imports,
}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    print(json.dumps(PROBES[arguments.pop("probe")](**arguments)))


if __name__ == "__main__":
    main()
