"""Device maps: what "auto" finds, what a map may say, and a model of which accelerate moves the parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from folders import same_weights, save, tensors, write_hf
from parity_table import Row, from_hf, ids

import lenskit as lk
from lenskit.checkpoints import devices
from lenskit.checkpoints.load import describe, give_weights
from lenskit.checkpoints.source import find
from lenskit.errors import InputError
from lenskit.models.base import Decoder
from lenskit.models.registry import family

load = lk.HookedTransformer.from_pretrained

Map = dict[str, Any]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(tmp_path: Path, model_type: str, request: pytest.FixtureRequest) -> Path:
    """A tiny random checkpoint of each family in turn, its embeddings tied or not."""
    return write_hf(tmp_path / "hf", model_type, tie_word_embeddings=request.param)


def on_meta(model_type: str, **attributes: Any) -> Decoder:
    cfg = from_hf(Row("", model_type, attributes))
    with torch.device("meta"):
        return Decoder(cfg, family(model_type, where="here").parts(cfg))


# -- which part goes where


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"": torch.device("cpu")}, {"": "disk"}], ids=str)
def test_one_device_for_all_is_as_good_as_no_map(folder: Path, device_map: Any) -> None:
    model, expected = load(folder, device_map=device_map), load(folder)
    assert same_weights(model, expected)
    with torch.no_grad():
        assert torch.equal(model(ids(2, 5)), expected(ids(2, 5)))
    assert "forward" not in model.__dict__  # accelerate has no part in it


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """What "auto" finds for a model where accelerators 0 and 1, and the CPU, have so many bytes."""

    def find(model: Decoder, dtype: torch.dtype | None = None, **n_bytes: int) -> dict[str, str]:
        memory = {"cpu" if name == "cpu" else int(name.removeprefix("gpu")): n for name, n in n_bytes.items()}
        monkeypatch.setattr(accelerate.utils, "get_balanced_memory", lambda *_, **__: memory)
        monkeypatch.setattr(devices, "usable", str)
        places = devices.places(model, None, "auto", dtype)
        return {part: str(devices.device_of(part, places)) for part in devices._parts(model)}

    return find


@pytest.mark.parametrize("tied", [True, False])
def test_auto_fills_accelerators_in_order_and_leaves_the_rest_to_the_cpu(
    model_type: str, tied: bool, found: Callable[..., dict[str, str]]
) -> None:
    model = on_meta(model_type, tie_word_embeddings=tied)
    block = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    beside = sum(parameter.nbytes for parameter in model.parameters()) - 3 * block
    everything, room = beside + 3 * block, 100  # bytes: what remains on each
    assert set(found(model, gpu0=2 * everything, cpu=10**9).values()) == {"0"}
    # accelerate keeps room on the first accelerator for one block that it moves there.
    two = found(model, gpu0=beside + 2 * block + room, gpu1=2 * block + room, cpu=10**9)
    assert (two["embed"], two["blocks.0"], two["blocks.1"]) == ("0", "0", "1")
    assert two["unembed"] == ("0" if tied else two["unembed"])
    three = found(model, gpu0=beside + 2 * block + room, cpu=10**9)
    assert (three["embed"], three["blocks.0"], three["blocks.2"]) == ("0", "0", "cpu")
    assert set(found(model, gpu0=1, cpu=10**9).values()) == {"cpu"}
    assert set(found(model, gpu0=1, cpu=1).values()) == {"cpu"}  # on disk, that is mapped into memory


def test_auto_reckons_with_the_dtype_to_come(folder: Path, found: Callable[..., dict[str, str]]) -> None:
    save(folder, {name: tensor.bfloat16() for name, tensor in tensors(folder).items()})
    source = find(folder)
    described = describe(source)
    with torch.device("meta"):
        model = Decoder(described.cfg, described.family.parts(described.cfg))
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())  # in float32
    assert "cpu" in found(model, gpu0=n_bytes * 2 // 3, cpu=10**9).values()
    assert set(found(model, torch.float16, gpu0=n_bytes * 2 // 3, cpu=10**9).values()) == {"0"}


def test_a_map_is_handed_to_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("lenskit.checkpoints.load.dispatch", lambda *arguments: calls.append(arguments))
    model = load(folder, device_map={"": "cpu", "blocks.1": "disk"})
    assert calls == [(model, {"": torch.device("cpu"), "blocks.1": torch.device("cpu")})]


def test_weights_come_with_the_dtype_that_was_reckoned_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, {name: tensor.bfloat16() for name, tensor in tensors(folder).items()})
    source = find(folder)
    described = describe(source)
    asked: list[torch.dtype | None] = []
    monkeypatch.setattr(devices, "_auto", lambda _, dtype: asked.append(dtype) or {"": torch.device("cpu")})
    for dtype in (None, torch.float16):
        with torch.device("meta"):
            model = Decoder(described.cfg, described.family.parts(described.cfg))
        give_weights(model, source, described, device=None, dtype=dtype, device_map="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {asked[-1]}
    assert asked == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_meta_device_reads_nothing(folder: Path, dtype: torch.dtype | None) -> None:
    source = find(folder)
    described = describe(source)
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        model = Decoder(described.cfg, described.family.parts(described.cfg))
    give_weights(model, source, described, device="meta", dtype=dtype, device_map=None)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", dtype or torch.float32)}


@pytest.mark.parametrize(
    ("device_map", "fragments"),
    [
        ({}, ("no device for embed, ",)),
        ({"embed": "cpu", "blocks": "cpu"}, ("no device for ", "unembed")),
        (
            {"embed": "cpu", "blocks.0": "cpu", "blocks.2": "cpu", "ln_final": "cpu"},
            ("blocks.1, unembed",),
        ),
        ({"": "cpu", "transformer.h": "cpu"}, ("transformer.h, which is no part",)),
        ({"": "cpu", "blocks.7": "cpu"}, ("blocks.7, which is no part",)),
        ({"": "cpu", "blocks.1.attn": "cpu"}, ("blocks.1.attn, which is no part", '"blocks.3" for a whole one')),
        ({"": "gpu"}, ("device 'gpu' cannot be used",)),
        ("balanced", ("'balanced'", '"auto"')),
        ("cuda", ("'cuda'", "device='cuda'")),
    ],
    ids=str,
)
def test_a_map_that_does_not_fit(folder: Path, device_map: Any, fragments: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, device_map=device_map)
    for fragment in (*fragments, "to do:"):
        assert fragment in str(caught.value)


def test_a_map_and_a_device_exclude_each_other(folder: Path) -> None:
    with pytest.raises(InputError, match=r"device='cpu' and device_map='auto'"):
        load(folder, device="cpu", device_map="auto")


# -- parts that run elsewhere


MAPS: dict[str, Map] = {
    "a block offloaded": {"": "acc", "blocks.1": "cpu"},
    "all blocks offloaded": {"": "acc", "blocks": "cpu"},
    "all but a block offloaded": {"": "cpu", "blocks.1": "acc"},
    "embedding offloaded": {"": "acc", "embed": "cpu"},
    "unembedding offloaded": {"": "acc", "unembed": "cpu", "ln_final": "cpu"},
    "only the blocks run there": {"": "cpu", "blocks": "acc"},
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_offloaded_parts_compute_the_same(
    folder: Path, device_map: Map, dispatched: Callable[[Path, Map], lk.HookedTransformer]
) -> None:
    model, expected = dispatched(folder, device_map), load(folder)
    for layer, block in enumerate(model.blocks):
        offloaded = device_map.get(f"blocks.{layer}", device_map.get("blocks", device_map[""])) == "cpu"
        assert all(parameter.is_meta is offloaded for parameter in block.parameters())
    assert model.device == torch.device("cpu")
    before = [parameter.is_meta for parameter in model.blocks.parameters()]
    for given in (ids(2, 6), [[3, 4, 5, 6], [7, 8]]):  # with padding, too
        actual, logits = model.run_with_cache(given), expected.run_with_cache(given)
        assert torch.equal(actual[0], logits[0])
        with torch.no_grad():
            assert torch.equal(model(given), expected(given))
        assert actual[1].keys() == logits[1].keys()
        assert all(torch.equal(actual[1][name], activation) for name, activation in logits[1].items())
    assert [p.is_meta for p in model.blocks.parameters()] == before  # offloaded again


@torch.no_grad()
def test_points_on_demand_and_hooks_of_offloaded_blocks(
    folder: Path, dispatched: Callable[[Path, Map], lk.HookedTransformer]
) -> None:
    """They read weights in other ways than by calling the part that has them."""
    model, expected = dispatched(folder, {"": "acc", "blocks": "cpu"}), load(folder)
    on_demand = [name for name, point in expected.hook_points.items() if point.on_demand]
    assert any("hook_result" in name for name in on_demand)
    logits, cache = model.run_with_cache(ids(2, 6), on_demand)
    other_logits, other_cache = expected.run_with_cache(ids(2, 6), on_demand)
    assert torch.equal(logits, other_logits)
    assert all(torch.equal(cache[name], other_cache[name]) for name in on_demand)
    hooks = [
        ("blocks.*.attn.hook_v", lambda act, hook: act * 0.5),
        ("blocks.1.ln1.hook_scale", lambda act, hook: act + 1),
        ("blocks.2.attn.hook_pattern", lambda act, hook: act.roll(1, -1)),
        ("blocks.0.mlp.hook_post", lambda act, hook: act.square()),
    ]
    edited = model.run_with_hooks(ids(2, 6), hooks).logits
    assert torch.equal(edited, expected.run_with_hooks(ids(2, 6), hooks).logits)
    assert not torch.equal(edited, logits)


def test_gradients_reach_through_offloaded_blocks(
    folder: Path, dispatched: Callable[[Path, Map], lk.HookedTransformer]
) -> None:
    model, expected = dispatched(folder, {"": "acc", "blocks.1": "cpu"}), load(folder)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, each in (("offloaded", model), ("whole", expected)):
        hook = ("blocks.*.hook_resid_pre", lambda grad, hook, name=name: seen.setdefault(name, []).append(grad))
        each.run_with_hooks(ids(2, 6), bwd_hooks=[hook]).logits.square().sum().backward()
    assert len(seen["whole"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen["offloaded"], seen["whole"], strict=True))


def test_an_offloaded_model_is_not_saved(
    folder: Path, tmp_path: Path, dispatched: Callable[[Path, Map], lk.HookedTransformer]
) -> None:
    model = dispatched(folder, {"": "acc", "blocks.1": "cpu"})
    with pytest.raises(InputError, match=r"parameters on the meta device, blocks.1(.|\n)*without offload"):
        model.save_pretrained(tmp_path / "saved")


def test_the_first_device_of_the_map_is_where_offloaded_parts_run(folder: Path, monkeypatch: Any) -> None:
    calls: list[Map] = []
    monkeypatch.setattr(accelerate, "dispatch_model", lambda _, on, **options: calls.append({**options, "on": on}))
    places = {"": "cuda:1", "blocks.0": "cpu", "blocks.2": "cuda:2", "embed": "cuda:0", "unembed": "cpu"}
    model = load(folder)
    devices.dispatch(model, {part: torch.device(device) for part, device in places.items()})
    assert calls[0]["main_device"] == "cuda:0"  # the embedding's
    assert calls[0]["preload_module_classes"] == [type(model.blocks[0]).__name__]
    expected = {"embed": "cuda:0", "blocks.0": "cpu", "blocks.1": "cuda:1", "blocks.2": "cuda:2", "unembed": "cpu"}
    assert calls[0]["on"].items() >= {**expected, "ln_final": "cuda:1"}.items()
    assert not any(part.startswith("hook") for part in calls[0]["on"])
    devices.dispatch(
        model, {"": torch.device("cpu"), "blocks": torch.device("cuda:3"), "unembed": torch.device("cuda:0")}
    )
    assert calls[1]["main_device"] == "cuda:3"
    assert calls[1]["on"]["embed"] == torch.device("cpu") != "cpu"  # looked up there, not moved
