"""Pictures of what analysis returns, as plotly figures, and pages of them. Needs lenskit's extra [viz].

The rows of a picture lie in the order of the forward pass: layer 0 on top. A dot in a token's label stands for a space.
"""

import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor

from lenskit.errors import InputError
from lenskit.extras import load

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, PAPER = "#1f2430", "#ffffff"
RISING = ((0.0, "#f7f9fc"), (0.5, "#7fa8d6"), (1.0, "#174a8b"))  # from little to much
DIVERGING = ((0.0, "#2166ac"), (0.5, "#f7f7f7"), (1.0, "#b2182b"))  # below zero, zero, above
ROW_HEIGHT = 34  # pixels
MOST_NUMBERS = 200  # cells beyond which numbers would not fit into them


class Section(NamedTuple):
    """A part of a page: paragraphs and figures, in their order. `code` between backticks is set as code."""

    heading: str
    parts: Sequence["str | Figure"]


def visible(token: str) -> str:
    """A token as a label: spaces become dots, line breaks and tabs arrows."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"


def percent(probability: float) -> str:
    """A probability as a label."""
    return f"{probability:.1%}" if probability >= 0.0005 else "<0.1%"


def heat_map(
    table: Float[Tensor, "row column"],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    row_title: str = "",
    column_title: str = "",
    value: str = "value",
    text: Sequence[Sequence[str]] | None = None,
    digits: int = 2,
    diverging: bool = False,
    most: float | None = None,
) -> "Figure":
    """A coloured table.

    Args:
        rows, columns: labels; the default counts from 0.
        row_title, column_title: what the axes are.
        value: what a cell's colour says, and in which unit.
        text: in the cells; the default is the numbers, if they fit.
        digits: after the point.
        diverging: two colours around zero, rather than one that begins at zero.
        most: the number that gets the darkest colour; the default is the table's own.

    Raises:
        InputError: too many labels, or too few.
        MissingExtraError: plotly is not installed.
    """
    rows, columns = rows or _counted(len(table)), columns or _counted(table.shape[1])
    if (len(rows), len(columns)) != tuple(table.shape):
        raise InputError(
            "the labels do not fit the table",
            got=f"{len(rows)} row and {len(columns)} column labels",
            expected=f"{len(table)} and {table.shape[1]}, as the table has",
            fix="give a label for each row and column (for tokens: those of the prompt that the table is about)",
        )
    numbers = [[number if number == number else None for number in row] for row in table.tolist()]  # nan: a gap
    if text is None and table.numel() <= MOST_NUMBERS:
        text = [["" if number is None else f"{number:.{digits}f}" for number in row] for row in numbers]
    if most is None:
        most = float(table.detach().nan_to_num().abs().max()) or 1.0
    go = load("plotly.graph_objects", extra="viz")
    trace = go.Heatmap(
        z=numbers,
        customdata=[[[_safe(row), _safe(column)] for column in columns] for row in rows],
        hovertemplate=f"{row_title} %{{customdata[0]}}<br>{column_title} %{{customdata[1]}}<br>"
        f"{value}: %{{z:.{digits + 1}f}}<extra></extra>",
        zmin=-most if diverging else 0.0,
        zmax=most,
        colorscale=DIVERGING if diverging else RISING,
        showscale=not text,
        colorbar={"thickness": 10, "title": {"text": value, "side": "right"}},
        xgap=1,
        ygap=1,
    )
    figure = _figure(trace, height=90 + ROW_HEIGHT * len(rows))
    for row, entries in enumerate(text or ()):
        for column, entry in enumerate(entries):
            dark = abs(numbers[row][column] or 0.0) > 0.7 * most
            color = PAPER if dark else INK
            figure.add_annotation(x=column, y=row, text=_safe(entry), showarrow=False, font={"color": color})
    figure.update_xaxes(title=column_title, **_labels(columns))
    figure.update_yaxes(title=row_title, autorange="reversed", **_labels(rows))
    return figure


def heat_maps(
    tables: "Mapping[str, Float[Tensor, 'row column']]",
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    row_title: str = "",
    column_title: str = "",
    value: str = "value",
    digits: int = 2,
    diverging: bool = False,
    most: float | None = None,
) -> "Figure":
    """Tables of one shape side by side, in the same colours for the same numbers.

    Args:
        tables: by what stands above each.
        rows, columns, row_title, column_title, value, digits, diverging: as `heat_map`'s.
        most: the number that gets the darkest colour; the default is that of all tables.

    Raises:
        InputError: no table; too many labels, or too few, for one of them.
        MissingExtraError: plotly is not installed.
    """
    if not tables:
        raise InputError(
            "there is nothing to draw",
            got="no tables",
            expected="one or more, by what stands above each",
            fix='write heat_maps({"one": table, "other": table})',
        )
    if most is None:
        most = max(float(table.detach().nan_to_num().abs().max()) for table in tables.values()) or 1.0
    figure = load("plotly.subplots", extra="viz").make_subplots(
        1, len(tables), subplot_titles=[_safe(title) for title in tables], shared_yaxes=True, horizontal_spacing=0.03
    )
    for place, table in enumerate(tables.values(), start=1):
        # Each drawn by itself, then taken over with its labels.
        one = heat_map(
            table, rows=rows, columns=columns, row_title=row_title, column_title=column_title, value=value,
            digits=digits, diverging=diverging, most=most,
        )  # fmt: skip
        last = place == len(tables)
        figure.add_trace(one.data[0].update(showscale=one.data[0].showscale and last), row=1, col=place)
        for note in one.layout.annotations:
            figure.add_annotation(note, row=1, col=place)
        figure.update_xaxes(one.layout.xaxis, row=1, col=place)
        figure.update_yaxes(one.layout.yaxis if place == 1 else one.layout.yaxis.update(title=None), row=1, col=place)
    figure.update_annotations(font_size=13, selector={"yref": "paper"})  # what stands above
    looks = one.layout.to_plotly_json()
    figure.update_layout({key: looks[key] for key in looks if key not in ("annotations", "xaxis", "yaxis")})
    return figure.update_layout(height=one.layout.height + 22, margin_t=30)


def heads_map(
    table: Float[Tensor, "layer head"],
    *,
    value: str,
    text: Sequence[Sequence[str]] | None = None,
    digits: int = 2,
    diverging: bool = False,
    most: float | None = None,
) -> "Figure":
    """Layers by heads: what `ablate_heads`, `patch_heads` or a head's score returns. Arguments as `heat_map`'s."""
    return heat_map(
        table, row_title="layer", column_title="head", value=value, text=text,
        digits=digits, diverging=diverging, most=most,
    )  # fmt: skip


def positions_map(
    table: Float[Tensor, "layer pos"],
    tokens: Sequence[str],
    *,
    value: str,
    digits: int = 2,
    diverging: bool = False,
) -> "Figure":
    """Layers by positions: what `patch_positions` returns.

    Args:
        tokens: the prompt's, from `model.to_str_tokens`.
        value, digits, diverging: as `heat_map`'s.
    """
    return heat_map(
        table, columns=[visible(token) for token in tokens], row_title="layer",
        column_title="token", value=value, digits=digits, diverging=diverging,
    )  # fmt: skip


def pattern_map(pattern: Float[Tensor, "query_pos key_pos"], tokens: Sequence[str]) -> "Figure":
    """One head's attention pattern: each row says where that token looks.

    Args:
        tokens: the prompt's, from `model.to_str_tokens`.
    """
    labels = [visible(token) for token in tokens]
    figure = heat_map(
        pattern, rows=labels, columns=labels, row_title="from", column_title="to", value="attention",
        text=(), most=1.0,
    )  # fmt: skip
    return figure.update_layout(height=90 + 22 * len(labels))


def lens_table(guesses: Sequence[Sequence[tuple[str, float]]]) -> "Figure":
    """Layer by rank: the likeliest tokens that the logit lens finds after each layer, coloured by probability.

    Args:
        guesses: by layer, what `top_tokens` returns, as many in each.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    table = Tensor([[probability for _, probability in layer] for layer in guesses])
    text = [[f"{visible(token)}\n{percent(probability)}" for token, probability in layer] for layer in guesses]
    figure = heat_map(
        table, columns=[str(rank + 1) for rank in range(table.shape[1])],
        row_title="after layer", column_title="rank", value="probability", text=text, digits=3, most=1.0,
    )  # fmt: skip
    return figure.update_layout(height=90 + 44 * len(guesses))


def top_tokens_chart(guesses: Sequence[tuple[str, float]]) -> "Figure":
    """Bars: the likeliest next tokens, as `top_tokens` returns them.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    go = load("plotly.graph_objects", extra="viz")
    labels = [visible(token) for token, _ in guesses]
    shares = [probability for _, probability in guesses]
    bars = go.Bar(
        x=shares,
        y=list(range(len(guesses))),
        orientation="h",
        text=[_safe(percent(share)) for share in shares],
        textposition="auto",
        marker={"color": RISING[2][1]},
        hovertemplate="%{text}<extra></extra>",
    )
    figure = _figure(bars, height=70 + ROW_HEIGHT * len(guesses)).update_layout(margin={"r": 24})
    figure.update_xaxes(title="probability", range=[0, 1], dtick=0.25, tickformat=".0%", showgrid=True)
    figure.update_yaxes(autorange="reversed", **_labels(labels))
    return figure


def page(title: str, sections: Sequence[Section]) -> str:
    """One self-contained HTML page: plotly's script is in it once, and nothing is fetched from anywhere.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    script = load("plotly.offline", extra="viz").get_plotlyjs()
    body: list[str] = []
    for section in sections:
        body.append(f"<section>\n<h2>{_paragraph(section.heading)}</h2>")
        for part in section.parts:
            body.append(f"<p>{_paragraph(part)}</p>" if isinstance(part, str) else _embedded(part))
        body.append("</section>")
    return _PAGE.format(title=html.escape(title), style=_STYLE, script=script, body="\n".join(body))


def _figure(trace: object, *, height: int) -> "Figure":
    """A figure with the house's looks: as wide as its place, no grid, no toolbar needed."""
    go = load("plotly.graph_objects", extra="viz")
    figure = go.Figure(trace)
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        font={
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
            "size": 12,
            "color": INK,
        },
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        dragmode=False,
    )
    figure.update_xaxes(automargin=True, showgrid=False, zeroline=False, fixedrange=True)
    return figure.update_yaxes(automargin=True, showgrid=False, zeroline=False, fixedrange=True)


def _labels(texts: Sequence[str]) -> dict[str, object]:
    """An axis with a label at each place: by number, because a token may come twice."""
    every = max(1, len(texts) // 60)
    return {
        "tickmode": "array",
        "ticks": "",
        "ticklabelstandoff": 4,
        "tickvals": list(range(0, len(texts), every)),
        "ticktext": [_safe(text) for text in texts[::every]],
    }


def _counted(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def _safe(text: str) -> str:
    """Text that plotly shows as it is: it would take tags for markup."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _paragraph(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _embedded(figure: "Figure") -> str:
    # plotly's JSON escapes what could end the script.
    return f'<figure><script type="application/json">{figure.to_json()}</script></figure>'


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f4f7; color: #1f2430; overflow-wrap: anywhere;
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.5rem; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 0.75rem; }
section { background: #fff; border-radius: 10px; padding: 1.5rem 1.75rem; margin: 0 0 1.25rem;
  box-shadow: 0 1px 2px rgb(31 36 48 / 12%); }
p { margin: 0 0 0.9rem; }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: #eef1f6; border-radius: 4px; padding: 0.1em 0.3em; }
figure { margin: 0.5rem 0 1.25rem; min-width: 0; }
section > :last-child { margin-bottom: 0; }
@media (max-width: 40rem) {
  main { padding: 1.25rem 0.5rem 2rem; }
  section { padding: 1rem 0.85rem; }
  h1 { font-size: 1.5rem; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<script>{script}</script>
</head>
<body>
<main>
<h1>{title}</h1>
<noscript><p>The pictures are drawn by the script in this file: allow it to run to see them.</p></noscript>
{body}
</main>
<script>
for (const figure of document.querySelectorAll("figure")) {{
  const {{ data, layout }} = JSON.parse(figure.querySelector("script").textContent);
  const place = figure.appendChild(document.createElement("div"));
  if (figure.clientWidth < 440) for (const entry of layout.annotations ?? []) entry.font.size = 9;
  Plotly.newPlot(place, data, layout, {{ responsive: true, displayModeBar: false }});
}}
</script>
</body>
</html>
"""
