"""Weight tables: one an architecture, from names on disk to ours and back.

A table is a list of rules. Each says which tensors on disk become which of our parameters, and how; read in the
other direction it says how to write them. Tables are closed: a tensor on disk that no rule knows is an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from lenskit.errors import MissingTensorError, UnknownTensorError


@dataclass(frozen=True)
class Rule(ABC):
    """Some tensors on disk and the parameters they become; names may hold `{l}`, the layer's number."""

    by_rows: ClassVar[bool] = False  # whether each of ours has some of the outputs of one product on disk, in order

    on_disk: tuple[str, ...]
    ours: tuple[str, ...]

    @abstractmethod
    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Our parameters from the tensors on disk: views of them wherever that is possible."""

    @abstractmethod
    def store(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inverse of `load`."""

    def split_rows(self, rows: Tensor) -> Sequence[Tensor]:
        """What belongs to the outputs of the product on disk, [d_out, ...], as it belongs to those of each of ours.

        Only where `by_rows`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Weight(Rule):
    """One tensor, one parameter; `transpose` where the disk has [d_in, d_out]."""

    by_rows: ClassVar[bool] = True

    transpose: bool = False

    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensor.t() for tensor in tensors] if self.transpose else tensors

    def store(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.load(tensors)

    def split_rows(self, rows: Tensor) -> Sequence[Tensor]:
        return [rows]


class Drop(Rule):
    """Tensors that some checkpoints carry and that nothing reads: a mask, a table, a tied copy."""

    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return ()

    def store(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return ()


@dataclass(frozen=True)
class Split(Rule):
    """One tensor whose rows are those of several parameters, in order.

    sizes: rows of each.
    """

    by_rows: ClassVar[bool] = True

    sizes: tuple[int, ...] = ()

    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[0].split(self.sizes)

    def store(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat(list(tensors))]

    def split_rows(self, rows: Tensor) -> Sequence[Tensor]:
        return rows.split(self.sizes)


@dataclass(frozen=True)
class Unstack(Rule):
    """One tensor [n, ...] that holds n experts' parameters, `parts` of each one below the other.

    Ours are in the order expert 0's parts, expert 1's parts, and so on.

    transpose: where the disk has [n, d_in, d_out].
    """

    parts: int = 1
    transpose: bool = False

    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        stacked = tensors[0].mT if self.transpose else tensors[0]
        return [part for one in stacked.unbind(0) for part in one.chunk(self.parts)]

    def store(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        firsts = range(0, len(tensors), self.parts)
        stacked = torch.stack([torch.cat(list(tensors[first : first + self.parts])) for first in firsts])
        return [stacked.mT if self.transpose else stacked]


class Stack(Rule):
    """Several tensors of one shape that become one parameter, [tensor ...]."""

    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.stack(list(tensors))]

    def store(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[0].unbind(0)


def weight(on_disk: str, ours: str, *, transpose: bool = False) -> Weight:
    """The rule for one tensor that becomes one parameter."""
    return Weight((on_disk,), (ours,), transpose)


def rules_of(names: Mapping[str, str], *, bias: bool | Container[str] = False, transpose: bool = False) -> list[Rule]:
    """Rules for modules, named without ".weight" and ".bias", on disk -> ours.

    Args:
        bias: whether all have a bias, or the names on disk of those that have one.
        transpose: whether the disk has the weights as [d_in, d_out].
    """
    rules: list[Rule] = []
    for theirs, ours in names.items():
        rules.append(weight(f"{theirs}.weight", f"{ours}.weight", transpose=transpose))
        if bias is True or (bias is not False and theirs in bias):
            rules.append(weight(f"{theirs}.bias", f"{ours}.bias"))
    return rules


def split(on_disk: str, ours: Sequence[str], sizes: Sequence[int]) -> Split:
    """The rule for one tensor that becomes several parameters, of so many rows each."""
    return Split((on_disk,), tuple(ours), tuple(sizes))


def unstack(on_disk: str, ours: Sequence[str], *, parts: int = 1, transpose: bool = False) -> Unstack:
    """The rule for the experts of a layer stacked in one tensor: see `Unstack`."""
    return Unstack((on_disk,), tuple(ours), parts, transpose)


def stack(on_disk: Sequence[str], ours: str) -> Stack:
    """The rule for several tensors that become one parameter: see `Stack`."""
    return Stack(tuple(on_disk), (ours,))


def head(tied: bool, on_disk: str = "lm_head.weight") -> Rule:
    """The rule for the unembedding, which a tied model's checkpoint may hold as a copy of the embedding."""
    return drop(on_disk) if tied else weight(on_disk, "unembed.weight")


def at_layers(rules: Iterable[Rule], layers: Iterable[int]) -> list[Rule]:
    """Rules with `{l}` for these layers alone, in models whose layers differ."""

    def placed(names: Sequence[str], layer: int) -> tuple[str, ...]:
        return tuple(name.replace("{l}", str(layer)) for name in names)

    return [
        replace(rule, on_disk=placed(rule.on_disk, layer), ours=placed(rule.ours, layer))
        for rule, layer in product(rules, layers)
    ]


def drop(on_disk: str) -> Drop:
    """The rule for a tensor that is not loaded."""
    return Drop((on_disk,), ())


@dataclass(frozen=True)
class Placement:
    """A rule at one layer: names without placeholders, the disk's as this checkpoint spells them."""

    rule: Rule
    on_disk: tuple[str, ...]
    ours: tuple[str, ...]


@dataclass(frozen=True)
class WeightTable:
    """The rules of one architecture.

    Args:
        rules: see `Rule`.
        n_layers: how often a rule with `{l}` applies.
        prefix: in front of the names of the model without its head; a checkpoint may leave it out everywhere.
        others: complete lists of rules for other names or layouts of the same parameters, which are read as well and
            never written (experts stacked or apart, a renamed head).
    """

    rules: tuple[Rule, ...]
    n_layers: int
    prefix: str = ""
    others: tuple[tuple[Rule, ...], ...] = ()

    def placements(self) -> Iterator[Placement]:
        """Every rule at every layer."""
        for rule in self.rules:
            repeated = any("{l}" in name for name in rule.on_disk)
            for layer in range(self.n_layers if repeated else 1):
                yield Placement(
                    rule,
                    tuple(name.replace("{l}", str(layer)) for name in rule.on_disk),
                    tuple(name.replace("{l}", str(layer)) for name in rule.ours),
                )

    def match(self, names: Iterable[str], where: str) -> list[Placement]:
        """The placements that read the tensors of a checkpoint, spelled as it spells them.

        Args:
            names: of every tensor on disk.
            where: the checkpoint, for messages.

        Raises:
            MissingTensorError: a parameter of ours has no tensor.
            UnknownTensorError: a tensor has no parameter.
        """
        present = set(names)
        for rules in self.others:
            other = replace(self, rules=rules, others=())
            if not self._fits(present) and other._fits(present):
                return other.match(present, where)
        bare = not any(name.startswith(self.prefix) for name in present)
        found: list[Placement] = []
        missing: list[str] = []
        for placement in self.placements():
            on_disk = tuple(n.removeprefix(self.prefix) if bare else n for n in placement.on_disk)
            absent = [name for name in on_disk if name not in present]
            if absent and placement.ours:
                missing += absent
            elif not absent:
                found.append(Placement(placement.rule, on_disk, placement.ours))
        unknown = sorted(present - {name for placement in found for name in placement.on_disk})
        if missing:
            raise MissingTensorError(
                f"{where}: {_count(missing)} missing",
                got=f"{len(present)} tensors, without {_some(missing)}"
                + (f"; it has {_some(unknown)}, which nothing reads" if unknown else ""),
                expected="every tensor that the config calls for",
                fix="check that config.json belongs to these weights and that every file was downloaded",
            )
        if unknown:
            raise UnknownTensorError(
                f"{where}: {_count(unknown)} that nothing reads",
                got=_some(unknown),
                expected="only tensors that the architecture has",
                fix="check that config.json belongs to these weights; adapters and quantised weights do not load",
            )
        return found

    def _fits(self, present: Container[str]) -> bool:
        """Whether every tensor that these rules call for is there."""
        placed = [name for placement in self.placements() if placement.ours for name in placement.on_disk]
        return all(name in present for name in placed) or all(n.removeprefix(self.prefix) in present for n in placed)

    def to_disk(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name on disk, from our parameters."""
        for placement in self.placements():
            if placement.ours:
                stored = placement.rule.store([parameters[name] for name in placement.ours])
                yield from zip(placement.on_disk, stored, strict=True)


def _count(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
