"""Loading, the memory of a forward pass, and imports: what has to be measured in fresh processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from benchmark_models import ABSENT
from benchmark_probe import ENVIRONMENT
from benchmark_report import LENSKIT, SDPA, TL, Bar, Row
from benchmark_sizes import LARGE, LONG, LONG_POS, TINY, Size
from safetensors.torch import save_file

MB = 10**6

IMPORTS = {"torch": "torch", LENSKIT: "lenskit", TL: "transformer_lens"}


def probe(name: str, **arguments: Any) -> dict[str, Any]:
    """The result of a probe (see benchmark_probe.py) in a process of its own."""
    script = Path(__file__).with_name("benchmark_probe.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps({"probe": name, **arguments})],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"probe {name} {arguments} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rounds(probes: Mapping[str, Callable[[], dict[str, Any]]], n: int) -> dict[str, list[dict[str, Any]]]:
    """Every probe n times, in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in probes}
    for number in range(n):
        for name in probes if number % 2 else reversed(probes):
            found[name].append(probes[name]())
    return found


def middle(results: list[dict[str, Any]], field: str) -> float:
    return float(median(result[field] for result in results))


# -- imports


def imports(repeats: int) -> list[Row]:
    """`import lenskit` against `import torch`, in CPU time."""
    modules = {who: module for who, module in IMPORTS.items() if who not in ABSENT}
    for module in modules.values():  # from here on, compiled files are there and in the page cache
        probe("imports", module=module)
    found = rounds({who: lambda m=module: probe("imports", module=m) for who, module in modules.items()}, repeats)
    base = middle(found["torch"], "cpu_s")
    brought = found[LENSKIT][0]["brought"]
    section = "Hook points and import"
    return [
        Row(
            section,
            "import, CPU time",
            "import torch",
            {who: middle(found[who], "cpu_s") / base for who in modules if who != "torch"},
            Bar(1.2),
            spread=_spread([r["cpu_s"] / base for r in found[LENSKIT]]),
            details={"cpu_s": {who: [round(r["cpu_s"], 3) for r in found[who]] for who in modules}},
        ),
        Row(
            section,
            "of transformers and plotly, imported with it",
            "one of them",
            {who: float(len(found[who][0]["brought"])) for who in modules if who != "torch"},
            Bar(0.0),
            details={"imported": brought},
        ),
    ]


def _spread(values: list[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if len(values) > 1 else None


# -- loading


@dataclass(frozen=True)
class LoadCase:
    """Who loads which folder, as which dtype. at: what the table calls it; two contenders may share a row."""

    at: str
    contender: str
    folder: str
    dtype: str | None = None


LOAD_CASES = (
    LoadCase("HF folder", LENSKIT, "hf"),
    LoadCase("HF folder", SDPA, "hf"),
    LoadCase("HF folder, dtype=bfloat16", LENSKIT, "hf", "bfloat16"),
    LoadCase("HF folder, dtype=bfloat16", SDPA, "hf", "bfloat16"),
    LoadCase("converted checkpoint", LENSKIT, "converted"),
)


def loading(repeats: int) -> list[Row]:
    """Peak memory and CPU time of loading a checkpoint of more than a gigabyte."""
    with checkpoints() as folders:
        converted = probe("convert", folder=folders["hf"], dest=folders["converted"])
        found = rounds({case: _load(case, folders) for case in LOAD_CASES}, repeats)
        size = Path(folders["hf"], "model.safetensors.index.json")
        on_disk = json.loads(size.read_text(encoding="utf-8"))["metadata"]["total_size"]
    by_place: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for case, results in found.items():
        by_place.setdefault(case.at, {})[case.contender] = results
    rows = [row for at, results in by_place.items() for row in _load_rows(at, results)]
    hf = middle(by_place[LOAD_CASES[0].at][SDPA], "cpu_s")
    for at, results in by_place.items():
        seconds = {who: middle(taken, "cpu_s") / hf for who, taken in results.items()}
        details = {"cpu_s": {w: [r["cpu_s"] for r in t] for w, t in results.items()}}
        details["wall_s"] = {w: [r["wall_s"] for r in t] for w, t in results.items()}
        details["first_use_cpu_s"] = {w: [r["first_use_cpu_s"] for r in t] for w, t in results.items()}
        rows.append(Row(SECTION, f"{at}: CPU time of loading", "HF, float32", seconds, details=details))
    values = {LENSKIT: converted["peak"] / on_disk}
    rows.append(Row(SECTION, "lk.convert: peak memory", "its weights", values))
    return rows


SECTION = "Loading 1.1 GB"


def _load(case: LoadCase, folders: Mapping[str, str]) -> Callable[[], dict[str, Any]]:
    library = "lenskit" if case.contender == LENSKIT else "hf"
    tiny = folders["tiny"]
    return lambda: probe("load", library=library, folder=folders[case.folder], tiny=tiny, dtype=case.dtype)


def _load_rows(at: str, results: Mapping[str, list[dict[str, Any]]]) -> Iterator[Row]:
    for what, field in (("peak memory, loaded", "load_peak"), ("peak memory, all weights used", "used_peak")):
        weights = results[LENSKIT][0]["weights"]
        values = {who: middle(taken, field) / weights for who, taken in results.items()}
        bar = Bar(1.05 + 150 * MB / weights, text="1.05 and 150 MB")
        spread = _spread([r[field] / weights for r in results[LENSKIT]])
        megabytes = {who: [round(r[field] / MB, 1) for r in taken] for who, taken in results.items()}
        dtypes = {who: taken[0]["dtypes"] for who, taken in results.items()}
        details = {"megabytes": megabytes, "weights": weights / MB, "dtypes": dtypes}
        yield Row(SECTION, f"{at}: {what}", "its weights", values, bar, spread, details)


@contextmanager
def checkpoints() -> Iterator[dict[str, str]]:
    """Folders with random weights in Hugging Face's format, and a path for the converted one."""
    folder = Path(tempfile.mkdtemp(prefix="lenskit-bench-"))
    try:
        for name, size in (("hf", LARGE), ("tiny", TINY)):
            write_checkpoint(folder / name, size)
        yield {name: str(folder / name) for name in ("hf", "tiny", "converted")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_checkpoint(folder: Path, size: Size, shard_bytes: int = 200 * MB) -> None:
    """Random float32 weights, shard after shard: never more than one is in memory."""
    config = size.hf_config()
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and 4 * sum(shapes[n].numel() for n in [*shards[-1], name]) > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
    for seed, (file, names) in enumerate(files.items()):
        generator = torch.Generator().manual_seed(seed)
        save_file({n: _random(shapes[n], generator) for n in names}, folder / file, metadata={"format": "pt"})
    total = 4 * sum(shape.numel() for shape in shapes.values())
    weight_map = {name: file for file, names in files.items() for name in names}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02


# -- a forward pass


def long_forward(repeats: int) -> list[Row]:
    """Extra memory of a forward pass over a long sequence, whose [query, key] matrices would be large."""
    rows = []
    for size in LONG:
        libraries = [LENSKIT, SDPA, *([TL] if size.family == "gpt2" and TL not in ABSENT else [])]
        found = rounds({who: _forward(who, size) for who in libraries}, repeats)
        base = middle(found[SDPA], "peak")
        rows.append(
            Row(
                f"Extra peak memory of a forward pass, 1×{LONG_POS} tokens",
                str(size),
                "HF sdpa",
                {who: middle(results, "peak") / base for who, results in found.items()},
                Bar(1.1),
                spread=_spread([r["peak"] / base for r in found[LENSKIT]]),
                details={"megabytes": {w: [round(r["peak"] / MB, 1) for r in rs] for w, rs in found.items()}},
            )
        )
    return rows


def _forward(who: str, size: Size) -> Callable[[], dict[str, Any]]:
    library = {LENSKIT: "lenskit", SDPA: "hf", TL: "TransformerLens"}[who]
    return lambda: probe("forward", library=library, size=asdict(size), pos=LONG_POS)
