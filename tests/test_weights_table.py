"""Weight tables: closed, read in both directions, and true for every variant of every family."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from folders import identical
from hypothesis import given
from hypothesis import strategies as st
from parity_table import ROWS, Row, from_hf, new_hf_model, on_disk, read
from torch import Tensor

from lenskit.errors import MissingTensorError, UnknownTensorError
from lenskit.models.base import Decoder
from lenskit.models.registry import family
from lenskit.weights import Placement, Rule, WeightTable, drop, weight


@dataclass(frozen=True)
class Joined(Rule):
    """Two parameters that lie on disk as one: what a family may add."""

    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[0].chunk(2)

    def store(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat(list(tensors))]


TABLE = WeightTable(
    (
        weight("net.embed", "embed.weight"),
        weight("net.{l}.w", "blocks.{l}.w", transpose=True),
        Joined(("net.{l}.kv",), ("blocks.{l}.k", "blocks.{l}.v")),
        drop("net.{l}.mask"),
        drop("head"),
    ),
    n_layers=2,
    prefix="net.",
)
NAMES = ["net.embed", "net.0.w", "net.1.w", "net.0.kv", "net.1.kv"]


def ours(placements: list[Placement]) -> list[str]:
    return [name for placement in placements for name in placement.ours]


def test_a_table_repeats_the_rules_of_a_layer() -> None:
    assert [p.on_disk[0] for p in TABLE.placements()] == [
        "net.embed", "net.0.w", "net.1.w", "net.0.kv", "net.1.kv", "net.0.mask", "net.1.mask", "head",
    ]  # fmt: skip
    assert ours(list(TABLE.placements())) == [
        "embed.weight", "blocks.0.w", "blocks.1.w", "blocks.0.k", "blocks.0.v", "blocks.1.k", "blocks.1.v",
    ]  # fmt: skip


@pytest.mark.parametrize("dropped", [[], ["net.1.mask"], ["net.0.mask", "net.1.mask", "head"]])
def test_what_is_dropped_may_be_there_or_not(dropped: list[str]) -> None:
    found = TABLE.match([*NAMES, *dropped], "here")
    assert sorted(name for p in found for name in p.on_disk) == sorted([*NAMES, *dropped])
    assert ours(found) == ours(list(TABLE.placements()))


def test_the_prefix_is_on_every_name_or_on_none() -> None:
    bare = [name.removeprefix("net.") for name in NAMES]
    assert [p.on_disk[0] for p in TABLE.match([*bare, "head"], "here")] == [*bare, "head"]
    with pytest.raises(
        MissingTensorError, match=r"2 tensors missing(.|\n)*without net.1.w, net.1.kv; it has 1.kv, 1.w"
    ):
        TABLE.match([*NAMES[:2], NAMES[3], "1.w", "1.kv"], "here")


def test_a_table_is_closed() -> None:
    with pytest.raises(UnknownTensorError, match=r"here: 4 tensors that nothing reads\n.*a, b, c and 1 more"):
        TABLE.match([*NAMES, *"abcd"], "here")
    with pytest.raises(
        MissingTensorError, match=r"here: 1 tensor missing\n.*4 tensors, without net.1.w\n(.|\n)*config.json"
    ):
        TABLE.match([name for name in NAMES if name != "net.1.w"], "here")
    with pytest.raises(MissingTensorError, match=r"5 tensors missing\n.*0 tensors, without embed, 0.w, 1.w and 2 more"):
        TABLE.match([], "here")


@given(st.sets(st.sampled_from(NAMES)), st.sets(st.text(min_size=1), max_size=3))
def test_a_match_reads_every_tensor_or_refuses(present: set[str], others: set[str]) -> None:
    names = present | others
    dropped = {p.on_disk[0] for p in TABLE.placements() if not p.ours}
    if not set(NAMES) <= names:
        with pytest.raises(MissingTensorError):
            TABLE.match(names, "here")
    elif names - set(NAMES) - dropped:
        with pytest.raises(UnknownTensorError):
            TABLE.match(names, "here")
    else:
        assert {name for p in TABLE.match(names, "here") for name in p.on_disk} == names


def test_rules_are_their_own_inverses() -> None:
    on_disk = {name: torch.randn(4, 3) for name in NAMES}
    parameters: dict[str, Tensor] = {}
    for placement in TABLE.match(on_disk, "here"):
        parameters |= zip(placement.ours, placement.rule.load([on_disk[n] for n in placement.on_disk]), strict=True)
    assert parameters["blocks.0.w"].shape == (3, 4)
    assert parameters["blocks.1.v"].shape == (2, 3)
    back = dict(TABLE.to_disk(parameters))
    assert back.keys() == on_disk.keys()
    assert all(identical(back[name], tensor) for name, tensor in on_disk.items())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_variants_tensors_become_its_parameters_and_again_tensors(row: Row) -> None:
    """Against the names and shapes of Hugging Face's own model, on the meta device."""
    cfg, found = from_hf(row), family(row.model_type, where="here")
    with torch.device("meta"):
        hf = new_hf_model(row)
        theirs = on_disk(hf, hf.state_dict())
        model = Decoder(cfg, found.parts(cfg))
    table = found.weights(cfg)
    parameters = dict(model.named_parameters(remove_duplicate=cfg.tie_embeddings))
    placed: dict[str, Tensor] = {}
    for placement in table.match(theirs, str(row)):
        placed |= zip(placement.ours, placement.rule.load([theirs[name] for name in placement.on_disk]), strict=True)
    assert {name: tensor.shape for name, tensor in placed.items()} == {n: p.shape for n, p in parameters.items()}
    theirs = read(row.model_type, cfg, theirs)
    assert {name: tensor.shape for name, tensor in table.to_disk(placed)} == {n: t.shape for n, t in theirs.items()}
