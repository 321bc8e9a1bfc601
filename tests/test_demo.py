"""The demo: what it claims holds, and its page stands alone. The pictures: what they show is what they were given."""

import io
import json
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import lenskit as lk
from lenskit import demo, viz
from lenskit.errors import InputError, MissingExtraError
from lenskit.hooks import HookPoint


@pytest.fixture(scope="module")
def found(demo_gpt2: lk.HookedTransformer) -> demo.Findings:
    return demo.measure(demo_gpt2)


@pytest.fixture(scope="module")
def page(found: demo.Findings) -> str:
    return demo.page(found)


@pytest.fixture
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)


class Page(HTMLParser):
    """What a page loads, and the figures and words in it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.scripts = 0
        self.headings: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append((tag, dict(attrs)))
        self.loads += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        tag, attrs = self._open[-1]
        if tag == "script" and attrs.get("type") == "application/json":
            self.figures.append(json.loads(data))
        elif tag == "script":
            self.scripts += 1
        elif tag in ("h1", "h2"):
            self.headings.append(data)


def terminal(found: demo.Findings, width: int) -> str:
    out = io.StringIO()
    demo.show(found, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def say(found: demo.Findings, about: Callable[[demo.Findings], demo.Part]) -> str:
    return "\n".join(about(found).paragraphs)


# -- what it claims


def test_the_model_knows_the_fact(found: demo.Findings, demo_gpt2: lk.HookedTransformer) -> None:
    assert found.top[0].text == " Paris"
    shares = demo_gpt2(demo.PROMPT)[0, -1].softmax(-1).detach()
    assert found.top[0].probability == pytest.approx(float(shares.max()))
    assert [guess.probability for guess in found.top] == pytest.approx(shares.topk(5).values.tolist())


def test_the_lens_ends_at_the_answer_and_begins_elsewhere(found: demo.Findings) -> None:
    for (text, probability), (ours, share) in zip(found.lens[-1], found.top, strict=True):
        assert text == ours
        assert probability == pytest.approx(share, rel=1e-3)
    assert found.lens[0][0].text != found.top[0].text


def test_zeroed_values_change_the_loss_as_told(found: demo.Findings, demo_gpt2: lk.HookedTransformer) -> None:
    layer, head = divmod(int(found.ablation.rise.argmax()), demo_gpt2.cfg.n_heads)

    def zero(act: Tensor, hook: HookPoint) -> None:
        act[:, :, head] = 0.0

    losses, count = 0.0, 0
    for text in demo.TEXTS:
        tokens = demo_gpt2.to_tokens(text).tokens
        logits = demo_gpt2.run_with_hooks(tokens, [(f"blocks.{layer}.attn.hook_v", zero)]).logits[0, :-1].detach()
        losses += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        count += tokens.shape[1] - 1
    assert float(found.ablation.without[layer, head]) == pytest.approx(losses / count, abs=1e-4)
    assert found.ablation.rise[layer, head] > 0
    told = say(found, demo.tell_ablation)
    assert f"Layer {layer}, head {head} is missed most: without it, the loss is {losses / count:.3f}" in told


def test_the_patched_subject_brings_its_own_answer(found: demo.Findings, demo_gpt2: lk.HookedTransformer) -> None:
    it = found.patched
    assert len(demo_gpt2.to_str_tokens(it.prompt)) == len(demo_gpt2.to_str_tokens(demo.PROMPT))
    assert it.answer == " Paris" != it.before.text
    assert "".join(it.places).replace(" ", "") == demo.PROMPT.replace(" ", "")
    assert 0 in it.layers(0)  # the subject, where it enters: that is the other prompt
    assert it.shares[0, 0] == pytest.approx(found.top[0].probability, rel=1e-3)
    for layer, guesses in enumerate(it.guesses):
        for place, guess in enumerate(guesses):
            if guess.text == it.answer:
                assert float(it.shares[layer, place]) == pytest.approx(guess.probability, rel=1e-3)
            else:
                assert float(it.shares[layer, place]) < 0.5


def test_the_words_follow_what_is_measured(found: demo.Findings) -> None:
    it = found.patched
    other = demo.Guess(" Rome", 0.9)
    never = replace(found, patched=replace(it, guesses=[[other] * 3] * len(it.guesses)))
    assert "turns to `Paris` at no layer" in say(never, demo.tell_patched)
    paris = demo.Guess(" Paris", 0.9)
    moved = replace(found, patched=replace(it, guesses=[[paris, other, other], [paris] * 3, [other, other, paris]]))
    told = say(moved, demo.tell_patched)
    assert "turns to `Paris` at layers 0 and 1; at the words" in told
    assert "at layer 1; at the last token (`of`), at layers 1 and 2" in told
    assert "when layer 1 begins, the fact has come" in told

    at_once = replace(found, lens=[found.lens[-1]] * 3)
    assert "`Paris` is the likeliest token from layer 0 on." in say(at_once, demo.tell_lens)


def test_a_head_that_copies_is_shown_and_one_that_does_not_is_not(
    found: demo.Findings, demo_gpt2: lk.HookedTransformer
) -> None:
    none = replace(found, induction=replace(found.induction, scores=torch.full((4, 8), 0.02)))
    assert "none to speak of: the highest score is 0.02" in say(none, demo.tell_induction)
    assert len(demo.tell_induction(none).draw()) == 1

    def copies(pattern: Tensor, hook: HookPoint) -> None:
        pattern[:, 5] = 0.0
        half = pattern.shape[-1] // 2
        for query in range(2 * half):
            pattern[:, 5, query, query - half + 1 if query >= half else query] = 1.0

    with demo_gpt2.hooks([("blocks.2.attn.hook_pattern", copies)]):
        forced = demo.measure(demo_gpt2)
    told = say(forced, demo.tell_induction)
    assert "Layer 2, head 5 has the highest, 1.00. On 8 names" in told
    assert "from 8 of the 8" in told
    assert len(demo.tell_induction(forced).draw()) == 3


# -- the terminal


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_every_table_whole(found: demo.Findings, width: int) -> None:
    shown = terminal(found, width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "…" not in shown
    for part in demo.parts(found):
        assert part.heading in shown
        for row in part.cells:
            for cell in row:
                assert all(line in shown for line in cell.split("\n"))
    assert "`" not in shown


def test_every_cell_is_coloured(found: demo.Findings) -> None:
    out = io.StringIO()
    demo.show(found, Console(file=out, width=100, color_system="truecolor", force_terminal=True))
    cells = sum(len(row) * len(row[0].split("\n")) for part in demo.parts(found) for row in part.cells)
    assert len(re.findall(r"\x1b\[38;2;[\d;]+;48;2;", out.getvalue())) == cells


# -- the page


def test_the_page_stands_alone(page: str) -> None:
    parsed = Page(page)
    assert parsed.loads == []
    assert not re.search(r"@import|url\(", page.partition("<script>")[0])
    assert page.count("plotly.js v") == 1
    assert parsed.scripts == 2  # plotly, and the few lines that draw


def test_the_page_has_a_figure_and_words_for_each_part(found: demo.Findings, page: str) -> None:
    parsed = Page(page)
    parts = demo.parts(found)
    assert parsed.headings == ["Inside a small language model", *(part.heading for part in parts)]
    assert len(parsed.figures) in (len(parts), len(parts) + 1)  # one more where a head copies
    assert all(figure["data"] for figure in parsed.figures)
    assert page.count("<p>") >= 2 * len(parts)
    assert [annotation["text"] for annotation in parsed.figures[1]["layout"]["annotations"]][:1] == [
        viz.visible(found.lens[0][0].text) + "<br>" + viz.percent(found.lens[0][0].probability)
    ]


def test_the_demo_writes_tables_and_a_page_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the demo reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    out, file = io.StringIO(), tmp_path / "page.html"
    file.write_text("an older page")
    demo.run(file, console=Console(file=out, width=80))
    assert str(file) in out.getvalue().replace("\n", "")
    assert len(Page(file.read_text(encoding="utf-8")).figures) >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_without_plotly_the_tables_are_shown_and_the_page_is_said_to_need_it(
    tmp_path: Path, no_plotly: None, found: demo.Findings
) -> None:
    out = io.StringIO()
    demo.run(tmp_path / "page.html", console=Console(file=out, width=200))
    assert terminal(found, 200) in out.getvalue()
    assert "pip install 'lenskit-interp[viz]'" in out.getvalue()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_page_leaves_the_one_that_was_there(
    tmp_path: Path, found: demo.Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    file.write_text("an older page")

    def interrupted(self: Path, *args: object, **kwargs: object) -> None:
        with self.open("w") as part:
            part.write("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", lambda model: found)
    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(file, console=Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert file.read_text() == "an older page"


@pytest.mark.parametrize("where", ["", "no/such/folder.html"])
def test_a_page_that_cannot_be_written_is_refused_at_once(tmp_path: Path, where: str) -> None:
    with pytest.raises(InputError, match="the page cannot be written"):
        demo.run(tmp_path / where)


# -- pictures


def test_pictures_need_the_extra(no_plotly: None) -> None:
    for draw in (
        lambda: viz.heat_map(torch.zeros(2, 3)),
        lambda: viz.top_tokens_chart([("a", 1.0)]),
        lambda: viz.page("title", []),
    ):
        with pytest.raises(MissingExtraError, match=r"lenskit-interp\[viz\]"):
            draw()


def test_a_heat_map_shows_its_table() -> None:
    table = torch.tensor([[0.5, -2.0, float("nan")], [1.0, 0.0, 0.25]], requires_grad=True)
    figure = viz.heads_map(table, value="loss", diverging=True)
    heat = figure.data[0]
    assert [list(row) for row in heat.z] == [[0.5, -2.0, None], [1.0, 0.0, 0.25]]
    assert (heat.zmin, heat.zmax) == (-2.0, 2.0)
    assert [note.text for note in figure.layout.annotations] == ["0.50", "-2.00", "", "1.00", "0.00", "0.25"]
    assert figure.layout.yaxis.autorange == "reversed"


def test_a_large_heat_map_has_a_colour_bar_in_the_place_of_numbers() -> None:
    figure = viz.heads_map(torch.rand(32, 32), value="score")
    assert not figure.layout.annotations
    assert figure.data[0].showscale


def test_tokens_are_labels_even_where_one_comes_twice() -> None:
    tokens = ["The", " cat", " cat", "\n"]
    figure = viz.positions_map(torch.rand(3, 4), tokens, value="share")
    assert list(figure.layout.xaxis.ticktext) == ["The", "·cat", "·cat", "↵"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3]
    pattern = viz.pattern_map(torch.rand(4, 4), tokens)
    assert list(pattern.layout.xaxis.ticktext) == list(pattern.layout.yaxis.ticktext) == ["The", "·cat", "·cat", "↵"]


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="3 row and 2 column labels"):
        viz.positions_map(torch.rand(3, 4), ["a", "b"], value="share")


def test_tokens_that_look_like_markup_are_shown_as_they_are() -> None:
    token = "</script><b>&"
    heads = viz.heads_map(torch.zeros(1, 1), value=token)
    figures = [viz.lens_table([[(token, 0.5)]]), viz.top_tokens_chart([(token, 0.5)]), heads]
    written = viz.page(f"on {token}", [viz.Section(token, [token, *figures])])
    parsed = Page(written)
    assert parsed.headings == [f"on {token}", token]
    assert len(parsed.figures) == 3
    assert parsed.figures[1]["layout"]["yaxis"]["ticktext"] == ["&lt;/script&gt;&lt;b&gt;&amp;"]
    assert parsed.figures[0]["layout"]["annotations"][0]["text"].startswith("&lt;/script&gt;&lt;b&gt;&amp;<br>")


def test_small_probabilities_are_not_called_zero() -> None:
    assert [viz.percent(share) for share in (1.0, 0.1234, 0.0005, 0.00049)] == ["100.0%", "12.3%", "0.1%", "<0.1%"]
