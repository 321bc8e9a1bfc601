"""Draws the two pictures of docs/interventions.md: which tokens each step processes, and how prompts take passes.

    python scripts/draw_interventions.py        # writes docs/images/steps.svg and docs/images/passes.svg

Plain SVG with its own light background, so that it reads the same on a light and a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

INK, FAINT, PAPER = "#1f2430", "#8a93a6", "#ffffff"
NEW, OLD, BLANK, MARK = "#2f6fde", "#cfdcf5", "#eef1f6", "#d9572b"


def text(
    x: float, y: float, words: str, *, size: int = 14, anchor: str = "middle", fill: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"/>'


def arrow(path: str, color: str = MARK) -> str:
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2.5" marker-end="url(#head)"/>'


def write(name: str, width: int, height: int, title: str, parts: Iterable[str]) -> None:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">'
        f"<title>{escape(title)}</title>"
        f'<defs><marker id="head" markerWidth="9" markerHeight="9" refX="6" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{MARK}"/></marker></defs>'
    )
    body = "\n".join([head, box(0, 0, width, height, PAPER), *parts, "</svg>\n"])
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / name).write_text(body, encoding="utf-8")


def steps() -> None:
    """A row a step, a column a token; padding of a shorter prompt stays outside."""
    prompt, new = ["The", "Eiffel", "Tower", "is", "in"], ["Paris", ".", "End"]
    left, top, wide, high, gap = 150, 84, 82, 40, 6
    parts = [
        text(left + 2.5 * (wide + gap), 34, "prompt", bold=True),
        text(left + 6 * (wide + gap), 34, "new tokens", bold=True),
    ]
    parts += [text(left + (i + 0.5) * (wide + gap), 64, word) for i, word in enumerate([*prompt, *new[:2]])]
    for step in range(3):
        y = top + step * (high + 18)
        parts.append(text(left - 18, y + 25, f"step {step}", anchor="end", bold=True))
        n = len(prompt) + step
        for i in range(len(prompt) + 2):
            processed = i < len(prompt) if step == 0 else i == n - 1
            x = left + i * (wide + gap)
            parts.append(box(x, y, wide, high, NEW if processed else OLD if i < n else BLANK))
            if processed:
                parts.append(text(x + wide / 2, y + 25, f"tokens={i if step == 0 else 0}", size=12, fill=PAPER))
        parts.append(text(left + 7 * (wide + gap) + 12, y + 25, f"→ {new[step]}", anchor="start", fill=MARK, bold=True))
    y = top + 3 * (high + 18) + 8
    legend = [
        (NEW, "processed in this step: what hooks see"),
        (OLD, "in the cache: keys and values that it attends to"),
        (BLANK, "not there yet"),
    ]
    x = left - 100
    for fill, words in legend:
        parts += [box(x, y, 16, 16, fill), text(x + 24, y + 13, words, size=13, anchor="start")]
        x += 40 + 7.0 * len(words)
    write("steps.svg", 860, y + 36, "Which tokens each step processes", parts)


def passes() -> None:
    """Two prompts as columns of layers; an arrow from a late layer of the first into an early one of the second."""
    left, top, wide, high, gap = 70, 92, 210, 44, 10
    names = ["embed", "layer 0", "layer 1", "layer 2", "layer 3", "logits"]
    parts: list[str] = []
    for column, (title, words) in enumerate([("pass 1", "prompt 0"), ("pass 2", "prompt 1")]):
        x = left + column * 340
        parts += [text(x + wide / 2, 34, title, bold=True, size=16), text(x + wide / 2, 60, words, fill=FAINT)]
        for i, name in enumerate(names):
            y = top + (len(names) - 1 - i) * (high + gap)
            marked = name == ("layer 3" if column == 0 else "layer 1")
            parts.append(box(x, y, wide, high, NEW if marked else OLD))
            parts.append(text(x + wide / 2, y + 27, name, fill=PAPER if marked else INK, bold=marked))
    source, target = top + 1 * (high + gap) + high / 2, top + 3 * (high + gap) + high / 2
    start, end = left + wide, left + 340
    parts.append(arrow(f"M{start + 4},{source} C{start + 70},{source} {end - 70},{target} {end - 10},{target}"))
    bottom = top + len(names) * (high + gap) + 16
    parts.append(
        text(
            (2 * left + 340 + wide) / 2,
            bottom,
            "time: the second prompt runs once the first is through",
            size=13,
            fill=FAINT,
        )
    )
    write("passes.svg", 690, int(bottom + 24), "How prompts take passes", parts)


if __name__ == "__main__":
    steps()
    passes()
