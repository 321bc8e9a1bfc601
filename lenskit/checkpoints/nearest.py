"""Which family is nearest to a config that none covers: by the attributes that it shares, and by its name.

A new architecture is mostly an old one with a change, and its config says so: it has the old one's attributes, and
often its name. Attributes that few families have say most, as in Sparck Jones 1972, "A statistical interpretation of
term specificity".
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from functools import cache
from typing import Any, NamedTuple

from lenskit.errors import UnsupportedModelError
from lenskit.extras import load
from lenskit.models.base import Family
from lenskit.models.hf_config import HARMLESS, NEUTRAL
from lenskit.models.registry import GUIDE, MODULES, family

FAR = 0.3  # of a nearness: below it there is little more in common than a vocabulary
NAME_WEIGHT = 0.5  # of an equal name, beside the 1 of equal attributes
SHORTEST = 3  # letters that two names have in common before that means anything: "phi", "opt", "moe"
OLD_NAMES = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}  # what attributes are called now


class Near(NamedTuple):
    """A family, and how near it is.

    nearness: the weighted share, from 0 to 1, of attributes in common among those that any family has, and up to 0.5
        for the name.
    lacking: attributes that the config has and the family does not, sorted.
    """

    model_type: str
    nearness: float
    lacking: list[str]


def family_of(config: Mapping[str, Any], *, where: str) -> Family:
    """The family of a Hugging Face config.

    Args:
        config: with a model_type.
        where: the file, for the message.

    Raises:
        UnsupportedModelError: none covers it; the message names the nearest.
    """
    model_type = config["model_type"]
    if model_type in MODULES:
        return family(model_type, where=where)
    raise UnsupportedModelError(
        f"{where}: no architecture family for model_type {model_type!r}",
        got=f"{model_type!r}; {told(ranked(config))}",
        expected=f"one of {', '.join(sorted(MODULES))}",
        fix=f"add the family, a file under lenskit/models/: {GUIDE} goes through it",
    )


def told(near: list[Near]) -> str:
    """In words, the first of a ranking."""
    best = near[0]
    if best.nearness < FAR:
        return "no family is near it"
    few = ", ".join(best.lacking[:5]) + (f" and {len(best.lacking) - 5} more" if len(best.lacking) > 5 else "")
    return f"the nearest family is {best.model_type}" + (f", which does not read {few}" if few else "")


def ranked(config: Mapping[str, Any], model_types: Iterable[str] = MODULES) -> list[Near]:
    """Families by their nearness to a Hugging Face config, the nearest first.

    Args:
        config: as config.json has it; where a model has several parts, the text model's counts.
        model_types: the families to choose from.
    """
    families = {model_type: defaults(model_type) for model_type in model_types}
    said, names = _text_model(config), _names(config)
    found, asked = _computing(said), _computing(name for name, value in said.items() if value is not None)
    n_families = Counter(name for attributes in families.values() for name in attributes)

    def weight(names: Iterable[str]) -> float:
        return math.fsum(math.log((len(families) + 1) / n_families[name]) for name in names if n_families[name])

    near = [
        Near(
            model_type,
            weight(found & attributes) / (weight(found | attributes) or 1.0)
            + NAME_WEIGHT * max((_likeness(name, model_type) for name in names), default=0.0),
            sorted(asked - attributes),
        )
        for model_type, attributes in families.items()
    ]
    return sorted(near, key=lambda family: -family.nearness)


@cache
def defaults(model_type: str) -> frozenset[str]:
    """The attributes that say what a model of this type computes: those of transformers' class for it, or, where it
    has none, those that our family reads under one name."""
    if known(model_type):
        return _computing(_class_defaults(model_type))
    return _computing(family(model_type, where="the registry").config.hf_names.values())


def _class_defaults(model_type: str) -> dict[str, Any]:
    found: dict[str, Any] = load("transformers").AutoConfig.for_model(model_type).to_dict()
    return found


def known(model_type: str) -> bool:
    """Whether transformers has a config class for the type."""
    return model_type in load("transformers").CONFIG_MAPPING


def _text_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says, with what its class adds where transformers has one."""
    text = config.get("text_config")
    part: dict[str, Any] = text if isinstance(text, dict) else dict(config)
    model_type = part.get("model_type")
    return {**_class_defaults(model_type), **part} if isinstance(model_type, str) and known(model_type) else part


def _computing(config: Iterable[str]) -> frozenset[str]:
    names = {OLD_NAMES.get(name, name) for name in config}
    return frozenset(names - HARMLESS - NEUTRAL.keys())


def _names(config: Mapping[str, Any]) -> list[str]:
    """What the model is called: its type, and its classes without what says that they are models."""
    classes = config.get("architectures")
    named = [config.get("model_type"), *(classes if isinstance(classes, list) else [])]
    return [re.sub(r"(For[A-Z]|LMHead|Model$).*", "", name) for name in named if isinstance(name, str)]


def _likeness(a: str, b: str) -> float:
    """The longest run of letters and digits in common, as a share of the longer name."""
    a, b = (re.sub(r"[^a-z0-9]", "", name.lower()) for name in (a, b))
    size = SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
    return size / max(len(a), len(b)) if size >= SHORTEST else 0.0
