"""`lenskit demo`: four classic looks into a small model that ships with lenskit, as tables and as one HTML page.

First everything is measured, then told: each sentence with a number or a name in it is made from what was measured.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from rich.color import Color
from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lenskit import viz
from lenskit.analysis import Ablation, Guess, ablate_heads, induction_scores, logit_lens, patch_positions, top_tokens
from lenskit.errors import InputError, MissingExtraError
from lenskit.transformer import HookedTransformer

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MODEL = "demo-gpt2"
PAGE = Path("lenskit-demo.html")

FACT = "{} is in the city of"
PROMPT = FACT.format("The Eiffel Tower")
# Of these, the first that the model knows and whose name has as many tokens is what the prompt is patched into.
OTHERS = (
    "The Brandenburg Gate", "The Space Needle", "The Charles Bridge", "Hagia Sophia", "The Colosseum", "The Kremlin",
)  # fmt: skip
TEXTS = (
    "The Eiffel Tower is in the city of Paris.",
    "The Brandenburg Gate is located in the city of Berlin.",
    "Everyone knows that the Taj Mahal is in the country of India.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "After Tom and Anna came back from the park, Tom handed a book to Anna.",
)
NAMES = " Mary John Tom James Anna Peter Lucy Jack" * 2  # for the induction head: a token each
INDUCTION = 0.4  # the score from which on a head is called an induction head
NO_EFFECT = 0.01  # nats a token: a smaller change of the loss is called none


@dataclass(frozen=True)
class Patched:
    """The landmark's stream put into the other prompt, before each layer.

    prompt: the other one.                          before: its answer when nothing is patched.
    answer: the landmark's.                         places: its name, the words after that, the last token.
    guesses: [layer][place] what is answered then.  shares: [layer place] the probability of `answer` then.
    """

    prompt: str
    before: Guess
    answer: str
    places: tuple[str, ...]
    guesses: list[list[Guess]]
    shares: Float[Tensor, "layer place"]

    def layers(self, place: int) -> list[int]:
        """The layers before which that place's stream turns the answer into the landmark's."""
        return [layer for layer, row in enumerate(self.guesses) if row[place].text == self.answer]


@dataclass(frozen=True)
class Induction:
    """The scores of all heads; of the one that copies most, its pattern on names that come twice."""

    scores: Float[Tensor, "layer head"]
    layer: int
    head: int
    tokens: list[str]
    pattern: Float[Tensor, "query_pos key_pos"]


@dataclass(frozen=True)
class Findings:
    """All that the demo tells."""

    top: list[Guess]
    lens: list[list[Guess]]
    ablation: Ablation
    patched: Patched
    induction: Induction


# -- measuring


@torch.no_grad()
def measure(model: HookedTransformer) -> Findings:
    """Everything, in a few seconds."""
    logits, cache = model.run_with_cache(PROMPT, "blocks.*.hook_resid_post")
    return Findings(
        top=top_tokens(model, logits[0, -1]),
        lens=[top_tokens(model, layer) for layer in logit_lens(model, cache)[:, 0]],
        ablation=ablate_heads(model, list(TEXTS), point="attn.hook_v"),
        patched=_patch(model),
        induction=_induction(model),
    )


def _patch(model: HookedTransformer) -> Patched:
    source = _answer(model, PROMPT)
    prompts = [FACT.format(other) for other in OTHERS]
    tokens = model.to_str_tokens(PROMPT)
    fitting = [prompt for prompt in prompts if len(model.to_str_tokens(prompt)) == len(tokens)]
    known = [p for p in fitting if _answer(model, p).text != source.text and _answer(model, p).probability > 0.5]
    other = next(iter([*known, *fitting, prompts[0]]))
    theirs = model.to_str_tokens(other)
    different = [i for i, pair in enumerate(zip(tokens, theirs, strict=False)) if pair[0] != pair[1]]
    subject = range(different[-1] + 1)
    positions: list[Sequence[int]] = [subject, range(len(subject), len(tokens) - 1), [-1]]
    table = patch_positions(model, PROMPT, other, lambda logits: logits[0, -1], positions=positions)
    answer = int(model(PROMPT)[0, -1].argmax())
    return Patched(
        prompt=other,
        before=_answer(model, other),
        answer=source.text,
        places=tuple("".join(tokens[p] for p in place).strip() for place in positions),
        guesses=[[top_tokens(model, logits, 1)[0] for logits in layer] for layer in table],
        shares=table.softmax(-1)[..., answer],
    )


def _answer(model: HookedTransformer, prompt: str) -> Guess:
    return top_tokens(model, model(prompt)[0, -1], 1)[0]


def _induction(model: HookedTransformer) -> Induction:
    scores = induction_scores(model)
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    pattern = model.run_with_cache(NAMES, f"blocks.{layer}.attn.hook_pattern")[1]["pattern", layer][0, head]
    return Induction(scores, layer, head, model.to_str_tokens(NAMES), pattern)


# -- telling: each part once, for the terminal and for the page


@dataclass(frozen=True)
class Part:
    """A part of the story: paragraphs, a table for the terminal, and figures (or more words) for the page.

    rows: what they are, counted from 0.            columns: labels.
    cells: [row][column] text, of one or two lines.
    shades: [row][column] from -1 (blue) over 0 (white) to 1 (red); where none is negative, 1 is blue.
    """

    heading: str
    paragraphs: list[str]
    rows: str
    columns: list[str]
    cells: list[list[str]]
    shades: list[list[float]]
    draw: Callable[[], list["str | Figure"]]


def parts(found: Findings) -> list[Part]:
    """The story."""
    return [tell_answer(found), tell_lens(found), tell_ablation(found), tell_patched(found), tell_induction(found)]


def tell_answer(found: Findings) -> Part:
    """What the model says."""
    best, second = found.top[:2]
    return Part(
        "What comes next?",
        [
            f"The model, `{MODEL}`, ships with lenskit, and has learnt from simple sentences where landmarks are. It "
            f"reads `{PROMPT}` and gives each token of its vocabulary a probability of coming next.",
            f"The likeliest is `{best.text.strip()}`, with {viz.percent(best.probability)}; then comes "
            f"`{second.text.strip()}`, with {viz.percent(second.probability)}. (A dot stands for a space: most tokens "
            "begin with one.)",
        ],
        rows="",
        columns=[str(rank + 1) for rank in range(len(found.top))],
        cells=[[_label(guess) for guess in found.top]],
        shades=[[guess.probability for guess in found.top]],
        draw=lambda: [viz.top_tokens_chart(found.top)],
    )


def tell_lens(found: Findings) -> Part:
    """From which layer on the answer is there."""
    answers = [layer[0] for layer in found.lens]
    final = answers[-1].text
    settled = next(i for i in range(len(answers)) if all(guess.text == final for guess in answers[i:]))
    seen = f"Read like that, `{final.strip()}` is the likeliest token from layer {settled} on"
    if settled:
        before = answers[settled - 1]
        seen += f"; one layer earlier it is `{before.text.strip()}`, with {viz.percent(before.probability)}"
    return Part(
        "When does it know? The logit lens",
        [
            "Each layer adds to one vector a token, the residual stream, from which the answer is read after the last "
            "layer. The logit lens (nostalgebraist 2020) reads it in the same way after every layer, as if the model "
            "ended there. These are the five likeliest tokens at the end of the prompt, layer by layer.",
            f"{seen}.",
        ],
        rows="after layer",
        columns=[str(rank + 1) for rank in range(len(found.lens[0]))],
        cells=[[_label(guess) for guess in layer] for layer in found.lens],
        shades=[[guess.probability for guess in layer] for layer in found.lens],
        draw=lambda: [viz.lens_table(found.lens)],
    )


def tell_ablation(found: Findings) -> Part:
    """Which heads matter."""
    without, rise, whole = found.ablation.without, found.ablation.rise, float(found.ablation.whole)
    layer, head = divmod(int(rise.argmax()), rise.shape[1])
    idle = int((rise.abs() < NO_EFFECT).sum())
    cells = [[f"{loss:.3f}" for loss in row] for row in without.tolist()]
    return Part(
        "Which heads matter? One at a time switched off",
        [
            f"The loss says how surprised the model is by the next token, on average over {len(TEXTS)} sentences, in "
            "nats: lower is better. Here the values (`attn.hook_v`) of one attention head at a time are set to zero, "
            "which silences the head, and the loss is measured again.",
            f"Before, it is {whole:.3f} nats a token. The table has the loss after, coloured by how much worse (red) "
            f"or better (blue) that is. Layer {layer}, head {head} is missed most: without it, the loss is "
            f"{float(without[layer, head]):.3f}. For {idle} of the {rise.numel()} heads it changes by less than "
            f"{NO_EFFECT}.",
        ],
        rows="layer",
        columns=[f"head {head}" for head in range(len(cells[0]))],
        cells=cells,
        shades=(rise / rise.abs().max()).tolist(),
        draw=lambda: [viz.heads_map(rise, value="rise of the loss, nats", text=cells, diverging=True)],
    )


def tell_patched(found: Findings) -> Part:
    """Where the fact is, layer by layer."""
    it = found.patched
    answer, n_layers = it.answer.strip(), len(it.guesses)
    when = [_at_layers(it.layers(place), n_layers) for place in range(len(it.places))]
    cells = [[_label(guess) for guess in layer] for layer in it.guesses]
    seen = (
        f"Patched at the landmark's name, the answer turns to `{answer}` {when[0]}; at the words after it "
        f"(`{it.places[1]}`), {when[1]}; at the last token (`{it.places[2]}`), {when[2]}."
    )
    if n_layers - 1 in it.layers(0) and not it.layers(2):
        seen += " So the fact lies with the name until the last layer fetches it to where the answer is read."
    elif it.layers(0) and it.layers(2):
        seen += f" So when layer {it.layers(2)[0]} begins, the fact has come from the name to where the answer is read."
    return Part(
        "Where is the fact kept? Another prompt's stream",
        [
            f"The model reads `{it.prompt}`, and answers `{it.before.text.strip()}` "
            f"({viz.percent(it.before.probability)}). But before one layer, the stream at some of the tokens is "
            f"replaced by what it was there in `{PROMPT}`. This is activation patching (Vig et al. 2020, Meng et "
            "al. 2022): where the other answer follows, those tokens carry the fact.",
            f"{seen} The table has the answers, coloured by the probability of `{answer}`.",
        ],
        rows="before layer",
        columns=list(it.places),
        cells=cells,
        shades=it.shares.tolist(),
        draw=lambda: [_patched_map(it, cells)],
    )


def _patched_map(it: Patched, cells: list[list[str]]) -> "Figure":
    return viz.heat_map(
        it.shares, columns=it.places, row_title="before layer", column_title="patched at",
        value=f"probability of {it.answer.strip()}", text=cells, digits=3, most=1.0,
    )  # fmt: skip


def _at_layers(layers: Sequence[int], n_layers: int) -> str:
    if len(layers) in (0, n_layers):
        return "at every layer" if layers else "at no layer"
    *most, last = (str(layer) for layer in layers)
    return f"at layers {', '.join(most)} and {last}" if most else f"at layer {last}"


def tell_induction(found: Findings) -> Part:
    """Whether there is a head that copies."""
    it, score = found.induction, float(found.induction.scores.max())
    found_one = score >= INDUCTION
    half = len(it.tokens) // 2
    hits = sum(int(it.pattern[query].argmax()) == query - half + 1 for query in range(half, len(it.tokens)))
    seen = f"This model has none to speak of: the highest score is {score:.2f} (layer {it.layer}, head {it.head})."
    if found_one:
        seen = (
            f"Layer {it.layer}, head {it.head} has the highest, {score:.2f}. On {half} names that come twice, it looks "
            f"hardest at the right one from {hits} of the {half} in the second copy."
        )
    return Part(
        "Which head copies? Induction",
        [
            "An induction head (Olsson et al. 2022) looks for where the present token stood before, and attends to the "
            "token that came next then: so a model goes on as the text went on before. Its score is the attention that "
            "it gives to that token, on random tokens that come twice: from 0 to 1.",
            seen,
        ],
        rows="layer",
        columns=[f"head {head}" for head in range(it.scores.shape[1])],
        cells=[[f"{value:.2f}" for value in row] for row in it.scores.tolist()],
        shades=it.scores.tolist(),
        draw=lambda: [
            viz.heads_map(it.scores, value="induction score", most=1.0),
            *(["Where it looks from each token:", viz.pattern_map(it.pattern, it.tokens)] if found_one else []),
        ],
    )


def _label(guess: Guess) -> str:
    return f"{viz.visible(guess.text)}\n{viz.percent(guess.probability)}"


def show(found: Findings, console: Console) -> None:
    """Everything in the terminal."""
    for part in parts(found):
        console.print()
        console.rule(Text(part.heading, style="bold"), align="left", style="dim")
        for paragraph in part.paragraphs:
            pieces = enumerate(paragraph.split("`"))  # each second is code
            text = Text.assemble(*((piece, "cyan" if index % 2 else "") for index, piece in pieces))
            console.print(Padding(text, (1, 0, 0, 0)), width=min(console.width, 100))
        console.print()
        console.print(_table(part))


def _table(part: Part) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(part.rows, style="dim", justify="right", no_wrap=True)
    widths = []
    for index, column in enumerate(part.columns):
        lines = [line for row in part.cells for line in row[index].split("\n")]
        widths.append(2 + max(len(line) for line in [*lines, column]))
        table.add_column(column.center(widths[-1]), no_wrap=True)
    signed = min(min(row) for row in part.shades) < 0
    for row, shades in enumerate(part.shades):
        cells = zip(part.cells[row], widths, shades, strict=True)
        table.add_row(str(row) if part.rows else "", *(_cell(*cell, signed) for cell in cells))
    return table


def _cell(text: str, width: int, shade: float, signed: bool) -> Text:
    """Text on a ground between white and a full colour."""
    full = ((178, 24, 43) if shade > 0 else (33, 102, 172)) if signed else (23, 74, 139)
    share = min(abs(shade), 1.0)
    ground = Color.from_rgb(*(255 + (channel - 255) * share for channel in full))
    ink = Color.from_rgb(255, 255, 255) if share > 0.65 else Color.from_rgb(0, 0, 0)
    return Text("\n".join(line.center(width) for line in text.split("\n")), style=Style.from_color(ink, ground))


def page(found: Findings) -> str:
    """Everything as one HTML page.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    told = [viz.Section(part.heading, [*part.paragraphs, *part.draw()]) for part in parts(found)]
    return viz.page("Inside a small language model", told)


def run(out: Path = PAGE, *, console: Console | None = None) -> None:
    """Measure, print the tables, and write the page; without plotly the page is left out, and the reader told so.

    Args:
        out: the page's file; one that is there is replaced.

    Raises:
        InputError: `out` cannot be a file.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(
            "the page cannot be written",
            got=f"{out}, which is a folder" if out.is_dir() else f"{out}, but {out.parent} is no folder",
            expected="a file's path, in a folder that is there",
            fix="make the folder, or give another path with --out",
        )
    console = console or Console()
    found = measure(HookedTransformer.from_pretrained(MODEL))
    show(found, console)
    try:
        _write_whole(out, page(found))
        last = f"The same as a page, with pictures: {out.resolve()}"
    except MissingExtraError as error:
        last = f"The same as a page, with pictures, needs another package: {error.fix}"
    console.print(Text(f"\n{last}"), soft_wrap=True)


def _write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, however this ends."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        part.write_text(text, encoding="utf-8")
        part.replace(path)
