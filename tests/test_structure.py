"""The shape of the code base: what may import what, what may be named where, and what importing costs."""

import ast
import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import lenskit as lk

ROOT = Path(lk.__file__).parent
FILES = {
    ".".join(("lenskit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
EVERY_FILE = pytest.mark.parametrize("module", FILES)

# From the bottom up. A module belongs to the longest prefix that fits it, and imports from its own layer or lower.
LAYERS = [
    ["version", "errors"],
    ["extras"],
    ["recording"],
    ["hooks"],
    ["modules"],
    ["weights"],
    ["models.base", "models.config", "models.hf_config", "models.weight_access", "models.common"],
    ["models"],  # the families
    ["models.registry"],
    ["checkpoints"],
    ["inputs"],
    ["cache"],
    ["interventions"],
    ["choosing", "sampling"],
    ["generation"],
    ["batching"],
    ["tracing"],
    ["text_access"],
    ["elsewhere"],
    ["preparing"],
    ["transformer"],
    ["analysis"],
    ["viz"],
    ["remote"],
    ["server"],
    ["resumable"],
    ["demo", "commands", "extraction"],
    ["cli"],
    ["", "__main__"],
]
NO_FAMILIES = ("__init__", "base", "common", "config", "hf_config", "registry", "weight_access")
FAMILIES = [module for module, path in FILES.items() if path.parent.name == "models" and path.stem not in NO_FAMILIES]


def layer_of(module: str) -> int:
    name = module.removeprefix("lenskit").removeprefix(".")
    fitting = {
        prefix: index
        for index, layer in enumerate(LAYERS)
        for prefix in layer
        if name == prefix or (prefix and name.startswith(prefix + "."))
    }
    assert fitting, f"{module} has no layer: give it one in LAYERS, and in docs/architecture.md"
    return fitting[max(fitting, key=len)]


def imports(module: str) -> set[str]:
    """The modules of lenskit that a module imports, or names as a string to import later."""
    found: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in FILES else str(node.module))
        elif isinstance(node, ast.Constant) and node.value in FILES and node.value != "lenskit":
            found.add(node.value)
    return {name for name in found if name.partition(".")[0] == "lenskit"}


# -- imports


@EVERY_FILE
def test_imports_go_only_downward(module: str) -> None:
    for imported in imports(module):
        assert imported in FILES
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, from a layer above it"


def test_no_imports_in_a_circle() -> None:
    list(TopologicalSorter({module: imports(module) for module in FILES}).static_order())


def test_the_rules_above_see_imports() -> None:
    assert "lenskit.errors" in imports("lenskit.hooks")
    assert "lenskit.models.llama" in imports("lenskit.models.registry")  # by name, loaded when asked for
    assert "lenskit.checkpoints.load" in imports("lenskit.transformer")  # from a package
    assert layer_of("lenskit.models.llama") < layer_of("lenskit.models.registry")
    assert layer_of("lenskit.models.base") < layer_of("lenskit.models.llama")


@EVERY_FILE
def test_imports_are_at_the_top(module: str) -> None:
    for function in ast.walk(TREES[module]):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            inside = [node.lineno for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not inside, f"{FILES[module]}:{inside[0]} imports inside a function or class"


def test_families_are_independent() -> None:
    for family in FAMILIES:
        assert not imports(family) & (set(FAMILIES) - {family})


# -- names

ARCHITECTURES = re.compile(
    r"(?<![a-z])(gpt|llama|mistral|mixtral|qwen|gemma|phi|olmo|falcon|pythia|neox|bloom|mpt|bert|opt|deepseek|cohere|"
    r"mamba|granite|stablelm|starcoder|baichuan|internlm|exaone|smollm|nemotron|minicpm|glm|grok|codegen|t5)(?![a-z])",
    re.IGNORECASE,
)
# The one name that a config file spells out: a type of rotary scaling, which other families use too.
ALLOWED = '"llama3"'


def architectures(text: str) -> list[str]:
    # Identifiers may join a name with underscores or digits, or by capitals: GPT2Attention, llama_norm.
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text.replace(ALLOWED, ""))
    return [found.group() for found in ARCHITECTURES.finditer(re.sub(r"[_\d]", " ", parted))]


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("lenskit.modules")])
def test_no_leaf_names_an_architecture(module: str) -> None:
    for number, line in enumerate(FILES[module].read_text(encoding="utf-8").splitlines(), 1):
        assert not architectures(line), f"{FILES[module]}:{number}: {line.strip()}"


def test_the_rule_above_sees_names() -> None:
    for line in ("class LlamaNorm:", "def gpt2_mask():", "# as in Qwen 2", '"a llama"', "GPTNeoXRotary", "x_mistral"):
        assert architectures(line)
    for line in ("adopted, optional, graphic", f"{ALLOWED}: smoothed", "option", "morphism"):
        assert not architectures(line)


def test_all_is_sorted_and_true() -> None:
    assert lk.__all__ == sorted(lk.__all__)
    assert len(set(lk.__all__)) == len(lk.__all__)
    assert all(vars(lk)[name] is not None for name in lk.__all__)
    imported = {
        alias.asname or alias.name
        for node in TREES["lenskit"].body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(lk.__all__), "what __init__ imports is public, and the other way round"


def drawn(docstring: str) -> Iterator[tuple[str, str | None]]:
    """The classes of a drawn tree, each with its parent."""
    above: list[str] = []
    for line in docstring.splitlines():
        found = re.match(r"^((?:[│ ]   )*)(├── |└── )?([A-Z]\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4 + bool(found[2])
            above = [*above[:depth], found[3]]
            yield found[3], above[-2] if depth else None


def test_the_tree_of_errors_is_as_drawn() -> None:
    classes = {n: c for n, c in vars(lk.errors).items() if isinstance(c, type) and issubclass(c, lk.LenskitError)}
    tree = dict(drawn(lk.errors.__doc__))
    assert tree.keys() == classes.keys()
    for name, parent in tree.items():
        assert (parent is None) == (name == "LenskitError")
        assert parent is None or classes[parent] in classes[name].__bases__


BUILT_IN = {
    "InputError": ValueError, "ConfigError": ValueError, "CheckpointNotFoundError": FileNotFoundError,
    "HubError": OSError, "MissingTensorError": KeyError, "TensorShapeError": ValueError,
    "UnknownHookPointError": KeyError, "AxisError": ValueError, "ReplacementError": ValueError,
    "MissingExtraError": ImportError, "SelectorError": ValueError, "StepError": ValueError, "ValueFitError": ValueError,
    "ExpressionError": TypeError, "PlanFormatError": ValueError, "NotSavedError": KeyError,
    "GenerationError": ValueError, "UnreachableError": ConnectionError, "KeyRefusedError": PermissionError,
    "NoSuchJobError": LookupError, "JobUnfinishedError": TimeoutError,
    "NotCausalError": TypeError,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(name for name, _ in drawn(lk.errors.__doc__)))
def test_every_error_says_four_things_and_can_be_sent(name: str) -> None:
    """Also where it is a built-in error, whose own ways with messages differ."""
    kind = vars(lk.errors)[name]
    raised = kind("what", got="came", expected="right", fix="do")
    assert isinstance(raised, BUILT_IN.get(name, Exception))
    for error in (raised, pickle.loads(pickle.dumps(raised)), copy.copy(raised)):
        assert type(error) is kind
        assert str(error) == "what\n  got:      came\n  expected: right\n  to do:    do"
        assert (error.what, error.got, error.expected, error.fix) == ("what", "came", "right", "do")


# -- sizes and habits


def blocks() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{module}.{node.name}", method)
        for module in FAMILIES
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.ClassDef) and node.name.endswith("Block")
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
    ]


def test_every_family_writes_its_block_out() -> None:
    assert list(dict.fromkeys(name.rpartition(".")[0] for name, _ in blocks())) == FAMILIES


@pytest.mark.parametrize(("name", "forward"), blocks(), ids=[name for name, _ in blocks()])
def test_a_blocks_forward_is_at_most_ten_lines(name: str, forward: ast.FunctionDef) -> None:
    assert forward.end_lineno - forward.body[0].lineno + 1 <= 10
    assert not [node for node in ast.walk(forward) if isinstance(node, ast.If | ast.IfExp)], "no flags"


@EVERY_FILE
def test_files_are_small(module: str) -> None:
    assert n_lines(module) <= (180 if module in FAMILIES else 400)


def test_a_family_is_mostly_shorter() -> None:
    assert median(map(n_lines, FAMILIES)) < 120


def n_lines(module: str) -> int:
    return len(FILES[module].read_text(encoding="utf-8").splitlines())


@EVERY_FILE
def test_nobody_sniffs(module: str) -> None:
    calls = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "hasattr"]


def test_no_package_is_pinned_twice() -> None:
    """Of two files that pip is given together."""
    pins = [
        line.partition("==")[0].lower()
        for name in ("constraints.txt", "constraints-bench.txt")
        for line in (ROOT.parent / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert sorted(set(pins)) == sorted(pins)


def test_types_are_shipped() -> None:
    assert (ROOT / "py.typed").exists()


# -- importing

IN_A_FRESH_PROCESS = """
import socket, sys, threading

def refuse(*_):
    raise AssertionError("reached for the network")

socket.socket.connect = socket.getaddrinfo = refuse
import torch
before, threads = set(sys.modules), threading.active_count()
{code}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(loaded & {{"transformers", "plotly", "fastapi", "uvicorn", "typer", "rich", "accelerate"}}))
print(threading.active_count() - threads, "torch._dynamo" in sys.modules and "torch._dynamo" not in before)
"""


def fresh_process(code: str, *, warnings: str = "error") -> list[str]:
    """What the code makes a new interpreter print, warnings being errors."""
    run = subprocess.run(
        [sys.executable, "-W", warnings, "-c", IN_A_FRESH_PROCESS.format(code=code)],
        capture_output=True, text=True, timeout=300, cwd=ROOT.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout.splitlines()


def test_importing_loads_nothing_heavy_starts_nothing_and_is_silent() -> None:
    assert fresh_process("import lenskit") == ["", "0 False"]


def test_a_model_from_a_config_needs_no_transformers() -> None:
    code = (
        "import lenskit as lk\n"
        "from lenskit.models.llama import LlamaConfig\n"
        "sizes = dict(d_model=8, n_layers=1, n_heads=2, n_key_value_heads=1, d_head=4, d_mlp=8, d_vocab=9, n_ctx=8)\n"
        "lk.HookedTransformer(LlamaConfig(**sizes)).run_with_cache([[1, 2, 3]])\n"
    )
    assert fresh_process(code) == ["", "0 False"]


def test_an_embedded_model_runs_without_a_network() -> None:
    code = (
        "import lenskit as lk\n"
        "model = lk.HookedTransformer.from_pretrained('demo-gpt2')\n"
        "print(model.to_string(int(model('The Eiffel Tower is in the city of')[0, -1].argmax())))\n"
    )
    assert fresh_process(code)[0] == " Paris"
