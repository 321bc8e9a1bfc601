"""How lenskit's docstrings read as pages of the reference: griffe, which reads them for mkdocstrings, calls this.

- A class whose docstring says what its fields are (`tokens: ids [pos], ... saved: what ...`) gets them as a list.
- A drawing keeps its lines.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Class, Extension, Module, Object


class Readable(Extension):
    def on_package(self, *, pkg: Module, **_: Any) -> None:
        self._go_through(pkg)

    def _go_through(self, thing: Object) -> None:
        if thing.docstring is not None:
            text = _with_drawing(thing.docstring.value)
            thing.docstring.value = _with_fields(text, thing) if isinstance(thing, Class) else text
        for member in thing.members.values():
            if not isinstance(member, Alias):
                self._go_through(member)


def _with_drawing(text: str) -> str:
    """Paragraphs with lines such as `├── HookError` as blocks."""
    parts = text.split("\n\n")
    return "\n\n".join(f"```text\n{part}\n```" if "├──" in part else part for part in parts)


def _with_fields(text: str, thing: Class) -> str:
    """Paragraphs that say what the class's own fields are, as an "Attributes" section at the end."""
    fields = "|".join(name for name, member in thing.members.items() if member.is_attribute and name.isidentifier())
    begins = re.compile(rf"(?:^|(?<=[.;] )|(?<=\n))((?:{fields})(?:, (?:{fields}))*): ")
    kept, entries = [], []
    for part in text.split("\n\n"):
        if fields and begins.match(part):
            _, *found = begins.split(part)
            entries += list(zip(found[::2], found[1::2], strict=True))
        else:
            kept.append(part)
    if not entries:
        return text
    lines = [f"    {name}: {' '.join(said.split()).removesuffix(';')}" for name, said in entries]
    return "\n\n".join([*kept, "\n".join(["Attributes:", *lines])])
