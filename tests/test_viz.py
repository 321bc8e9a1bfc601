"""Tables side by side: each is drawn as it would be alone, in colours that can be compared."""

import pytest
import torch

import lenskit as lk
from lenskit import viz


def test_tables_side_by_side_share_their_colours() -> None:
    figure = viz.heat_maps({"one": torch.tensor([[0.5, -1.0]]), "two": torch.tensor([[4.0, 2.0]])}, diverging=True)
    assert [(trace.zmin, trace.zmax) for trace in figure.data] == [(-4, 4), (-4, 4)]
    assert len({trace.xaxis for trace in figure.data}) == 2
    rising = viz.heat_maps({"one": torch.rand(2, 3), "two": torch.rand(2, 3)}, most=1.0)
    assert [(trace.zmin, trace.zmax) for trace in rising.data] == [(0, 1), (0, 1)]


def test_each_table_keeps_its_numbers_and_labels() -> None:
    tables = {"<first>": torch.tensor([[0.25, 0.5]]), "second": torch.tensor([[1.0, 0.75]])}
    figure = viz.heat_maps(tables, columns=["a", "b"], row_title="layer", column_title="head")
    notes = {(note.xref, note.text) for note in figure.layout.annotations}
    for axis, name, cells in (("x", "<first>", ["0.25", "0.50"]), ("x2", "second", ["1.00", "0.75"])):
        assert {text for xref, text in notes if xref == axis} == set(cells)
        assert ("paper", name.replace("<", "&lt;").replace(">", "&gt;")) in notes
    assert [axis.title.text for axis in (figure.layout.xaxis, figure.layout.xaxis2)] == ["head", "head"]
    assert figure.layout.xaxis2.ticktext == ("a", "b")
    assert figure.layout.yaxis.title.text == "layer"  # once is enough
    assert not figure.layout.yaxis2.title.text
    alone = viz.heat_map(tables["second"], columns=["a", "b"], row_title="layer", column_title="head")
    assert figure.layout.font == alone.layout.font
    assert figure.data[1].hovertemplate == alone.data[0].hovertemplate


def test_large_tables_have_one_colour_bar_in_the_place_of_numbers() -> None:
    figure = viz.heat_maps({"one": torch.rand(32, 32), "two": torch.rand(32, 32)})
    assert [trace.showscale for trace in figure.data] == [False, True]
    assert len(figure.layout.annotations) == 2  # what stands above


def test_no_tables_are_refused() -> None:
    with pytest.raises(lk.errors.InputError, match="no tables"):
        viz.heat_maps({})


def test_a_table_of_another_shape_is_refused() -> None:
    with pytest.raises(lk.errors.InputError):
        viz.heat_maps({"one": torch.rand(2, 3), "two": torch.rand(2, 4)}, columns=["a", "b", "c"])
