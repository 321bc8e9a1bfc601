"""Begin a new architecture family: its file, its line in the registry, and its row in the parity table.

    python scripts/new_model.py NAME --config path/to/config.json [--tensors FILE] [--nearest FAMILY]

NAME is the `model_type` of the config. FILE says what tensors a checkpoint has: a .safetensors file, a
model.safetensors.index.json, or a text with a name a line. The skeleton is the nearest family's file under the new
name, with a list of what has to be done in its opening lines: attributes that the nearest family does not read, tensors
that its table does not know, and those that it misses. Where there is nothing to do but the name, it works as it is.
Nothing that is there is written over. docs/adding-a-model.md goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lenskit.checkpoints.nearest import Near, ranked
from lenskit.errors import LenskitError, MissingTensorError, UnknownTensorError
from lenskit.models.registry import MODULES, family

ROOT = Path(__file__).resolve().parent.parent
TINY_SIZES = {  # of attributes that say how large a model is
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "num_hidden_layers": 3, "n_layer": 3, "num_attention_heads": 4,
    "n_head": 4, "num_key_value_heads": 2, "intermediate_size": 44, "vocab_size": 59, "max_position_embeddings": 40,
    "n_positions": 40,
}  # fmt: skip


class Refused(Exception):
    """What cannot be done, in words for the terminal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the model_type")
    parser.add_argument("--config", type=Path, required=True, help="a config.json of the architecture")
    parser.add_argument("--tensors", type=Path, help="the names of a checkpoint's tensors")
    parser.add_argument("--nearest", help="the family to begin with; the nearest if left out")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    arguments = parser.parse_args()
    try:
        write(arguments.name, arguments.config, arguments.tensors, arguments.nearest, arguments.root)
    except (Refused, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def write(name: str, config_file: Path, tensors: Path | None, nearest: str | None, root: Path) -> None:
    """See that all can be written, then write it."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise Refused(f"{name!r} is no model_type: lower-case letters, digits and _")
    file, registry, table = (
        root / "lenskit/models" / f"{name}.py",
        root / "lenskit/models/registry.py",
        root / "tests/parity_table.py",
    )
    if name in MODULES or file.exists():
        raise Refused(f"there is a family {name} already: {file}")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise Refused(f"{config_file} is no config: a JSON object is expected")
    near = _near({**config, "model_type": name}, nearest)
    names = None if tensors is None else tensor_names(tensors)
    todo = _todo(near, config, names)
    skeleton = _skeleton(name, near.model_type, config, todo)
    registered = _registered(registry.read_text(encoding="utf-8"), name)
    rows = _with_rows(table.read_text(encoding="utf-8"), name, near, config)
    file.write_text(skeleton, encoding="utf-8")
    registry.write_text(registered, encoding="utf-8")
    table.write_text(rows, encoding="utf-8")
    print(f"wrote {file.relative_to(root)}, from {near.model_type}, the nearest family (nearness {near.nearness:.2f})")
    print("a line in lenskit/models/registry.py; TINY and a default row in tests/parity_table.py")
    print(*(f"to do: {line}" for line in todo), sep="\n")
    print(f"then: python -m pytest tests/test_parity.py -k {name}; docs/adding-a-model.md has the other steps")


def _near(config: dict[str, Any], wanted: str | None) -> Near:
    if wanted is None:
        return ranked(config)[0]
    if wanted not in MODULES:
        raise Refused(f"there is no family {wanted}; there are {', '.join(MODULES)}")
    return ranked(config, [wanted])[0]


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors that a file holds or lists."""
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            return [name for name in json.loads(stream.read(length)) if name != "__metadata__"]
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return list(json.loads(text)["weight_map"])
    return [line.strip() for line in text.splitlines() if line.strip()]


def _todo(near: Near, config: dict[str, Any], names: Iterable[str] | None) -> list[str]:
    """What the nearest family's file does not do for this one."""
    lines = ["name the paper, and what is unusual"]
    lines += [
        f"the attribute {name} = {json.dumps(config.get(name))}: read, ignore or refuse it" for name in near.lacking
    ]
    if names is None:
        return [*lines, "see that the names in weights(cfg) are those on disk (--tensors tells)"]
    found = family(near.model_type, where="the nearest")
    try:
        cfg = found.config.from_hf(_complete(near, config))
        table = found.weights(cfg)
    except (LenskitError, KeyError, TypeError, ValueError) as error:
        return [*lines, f"its config is not {near.model_type}'s ({type(error).__name__}): compare the tensors by hand"]
    known = {one for placement in table.placements() for one in placement.on_disk}
    on_disk = set(names)
    try:
        table.match(on_disk, "the checkpoint")
    except (MissingTensorError, UnknownTensorError):
        lines += [f"the tensor {one}: a rule in weights(cfg)" for one in _abstract(on_disk - known)]
        lines += [f"no tensor {one}: take its rule out" for one in _abstract(known - on_disk) if "inv_freq" not in one]
    return lines


def _complete(near: Near, config: dict[str, Any]) -> dict[str, Any]:
    """The config as the nearest family's class has it, without what that lacks."""
    load = importlib.import_module("lenskit.checkpoints.load")
    raw = {key: value for key, value in config.items() if key not in near.lacking}
    completed: dict[str, Any] = load.complete({**raw, "model_type": near.model_type}, where="the config")
    return completed


def _abstract(names: Iterable[str]) -> list[str]:
    """With {l} for the number of a layer, each once."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "{l}", name, count=1) for name in names})


def _skeleton(name: str, nearest: str, config: dict[str, Any], todo: list[str]) -> str:
    source = Path(importlib.import_module(MODULES[nearest]).__file__ or "").read_text(encoding="utf-8")
    found = family(nearest, where="the nearest")
    theirs = found.config.__name__.removesuffix("Config")
    camel = "".join(part.capitalize() for part in name.split("_"))
    body = source[source.index('"""', 3) + 3 :]
    body = re.sub(rf"\b{theirs}(?=[A-Z]\w*\b)", camel, body)
    body = body.replace(f'model_type: ClassVar[str] = "{nearest}"', f'model_type: ClassVar[str] = "{name}"')
    classes = config.get("architectures") or [f"{camel}ForCausalLM"]
    body = re.sub(r'hf_class="\w+"', f'hf_class="{classes[0]}"', body)
    listed = "\n".join(f"- {line}" for line in todo)
    return f'"""{camel}.\n\nTODO; this is {nearest}.py under another name:\n\n{listed}\n"""{body}'


def _registered(text: str, name: str) -> str:
    start = text.index("MODULES = {\n") + len("MODULES = {\n")
    end = text.index("}\n", start)
    lines = [*text[start:end].splitlines(), f'    "{name}": "lenskit.models.{name}",']
    return text[:start] + "\n".join(sorted(lines, key=str.strip)) + "\n" + text[end:]


def _with_rows(text: str, name: str, near: Near, config: dict[str, Any]) -> str:
    """The parity table with a tiny config and its row: small sizes, and everything else as in the config."""
    sizes = {key: size for key, size in TINY_SIZES.items() if key in config}
    others = {key: config[key] for key in near.lacking if isinstance(config.get(key), bool | int | float | str)}
    entry = ", ".join(f"{json.dumps(key)}: {value!r}" for key, value in {**sizes, **others}.items())
    end = text.index("}  # fmt: skip\nMODEL_TYPES")
    text = f'{text[:end]}    "{name}": {{{entry}}},  # fmt: skip\n{text[end:]}'
    end = re.compile(r"^\]", re.MULTILINE).search(text, text.index("ROWS = [")).start()  # type: ignore[union-attr]
    return f'{text[:end]}    Row("default", "{name}"),\n{text[end:]}'


if __name__ == "__main__":
    main()
