"""Interventions done the plain way: on Hugging Face's own model, with torch's forward hooks, without a cache.

The whole sequence is computed again at every step. Each token belongs to the step that processed it first, and the
edits of that step are applied to it again in every later pass. Nothing of lenskit's interventions is used here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# What an edit makes of one step's part of an activation [pos ...], given what was read before in that step.
Change = Callable[[Tensor, dict[str, Tensor]], Tensor]


@dataclass
class Edit:
    """A change at a point, at some steps; `reads` are points whose activation `change` gets (as they are then)."""

    point: str
    steps: set[int]
    change: Change


@dataclass
class Reference:
    """One prompt's generation.

    tokens: ids, the prompt included. logits: [d_vocab] of each step.
    saved: by step and point, the activation [pos ...] of that step's tokens, after all edits.
    """

    tokens: list[int]
    logits: list[Tensor] = field(default_factory=list)
    saved: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a hook point is in Hugging Face's model.

    side: "in" or "out". heads: how many the tensor there is to be cut into. factor: what it is multiplied by later on.
    """

    module: nn.Module
    side: str
    heads: int | None = None
    factor: float = 1.0


Places = Mapping[str, Place]


def written_out(model: PreTrainedModel) -> Places:
    """The places of two families, by the names of their modules."""
    gpt2 = model.config.model_type == "gpt2"
    base = model.transformer if gpt2 else model.model
    found = {
        "hook_embed": Place(base.wte if gpt2 else base.embed_tokens, "out"),
        "hook_logits": Place(model.lm_head, "out"),
    }
    heads = model.config.num_attention_heads
    for layer, block in enumerate(base.h if gpt2 else base.layers):
        at = f"blocks.{layer}."
        attn = block.attn if gpt2 else block.self_attn
        found[at + "hook_resid_pre"] = Place(block, "in")
        if not gpt2:
            groups = model.config.num_key_value_heads
            for name, module, n in (
                ("q", attn.q_proj, heads),
                ("k", attn.k_proj, groups),
                ("v", attn.v_proj, groups),
            ):
                found[f"{at}attn.hook_{name}"] = Place(module, "out", n)
        found[at + "attn.hook_z"] = Place(attn.c_proj if gpt2 else attn.o_proj, "in", heads)
        found[at + "hook_attn_out"] = Place(attn, "out")
        found[at + "mlp.hook_post"] = Place(block.mlp.c_proj if gpt2 else block.mlp.down_proj, "in")
        found[at + "hook_mlp_out"] = Place(block.mlp, "out")
        found[at + "hook_resid_post"] = Place(block, "out")
    return found


@torch.no_grad()
def looked_for(model: PreTrainedModel, tokens: Tensor, added: Mapping[str, Tensor]) -> Places:
    """The places of the stream's points in any family: a block's two ends are the stream, and what is added in between
    is what a module inside of it gives, recognised by its numbers.

    Args:
        added: what each `hook_attn_out` and `hook_mlp_out` is when the model reads these tokens.
    """
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    given: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor):
            given[module] = first.clone()  # something may be added to it in place

    with ExitStack() as stack:
        for module in blocks.modules():
            stack.callback(module.register_forward_hook(keep).remove)
        model(tokens, use_cache=False)
    found: dict[str, Place] = {}
    for layer, block in enumerate(blocks):
        at = f"blocks.{layer}."
        found[at + "hook_resid_pre"] = Place(block, "in")
        for name in (at + "hook_attn_out", at + "hook_mlp_out"):
            alike = ((module, multiple(added[name], given[module])) for module in block.modules() if module in given)
            found[name] = next(Place(module, "out", factor=by) for module, by in alike if by is not None)
        found[at + "hook_resid_post"] = Place(block, "out")
    return found


def multiple(one: Tensor, other: Tensor) -> float | None:
    """By what the second is to be multiplied to be the first; None if it is another tensor altogether."""
    if one.numel() != other.numel():
        return None
    other = other.reshape(one.shape)
    by = float((one * other).sum() / (other * other).sum())
    return by if torch.allclose(one, by * other, rtol=0, atol=1e-5 * float(one.abs().max())) else None


@contextmanager
def watched(places: Places, watch: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """`watch(point, activation [pos ...])` at every point, and what it returns goes on."""

    def turn(name: str, value: Tensor) -> Tensor:
        place = places[name]
        row = value.flatten(0, -2)  # some modules see their tokens without the axis of rows
        seen = row if place.heads is None else row.unflatten(-1, (place.heads, -1))
        return (watch(name, seen * place.factor) / place.factor).reshape(value.shape)

    def after(name: str, _: Any, __: Any, out: Any) -> Any:
        return (turn(name, out[0]), *out[1:]) if isinstance(out, tuple) else turn(name, out)

    def before(name: str, _: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (turn(name, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": turn(name, kwargs["hidden_states"])}

    with ExitStack() as stack:
        for name, place in places.items():
            if place.side == "out":
                handle = place.module.register_forward_hook(partial(after, name))
            else:
                handle = place.module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def generate(model: PreTrainedModel, places: Places, prompt: list[int], n_steps: int, edits: list[Edit]) -> Reference:
    """Greedy, one row, every step a pass over everything."""
    made = Reference(list(prompt))
    for step in range(n_steps):
        n = len(prompt)
        spans = [range(n), *(range(n + k, n + k + 1) for k in range(step))]
        read: list[dict[str, Tensor]] = [{} for _ in spans]

        def watch(name: str, seen: Tensor, spans: Any = spans, read: Any = read) -> Tensor:
            parts = []
            for k, span in enumerate(spans):
                part = seen[span.start : span.stop].clone()
                for edit in edits:
                    if edit.point == name and k in edit.steps:
                        part = edit.change(part, read[k])
                read[k][name] = part.clone()
                parts.append(part)
            return torch.cat(parts)

        with watched(places, watch):
            logits = model(torch.tensor([made.tokens]), use_cache=False).logits[0, -1]
        made.logits.append(logits)
        made.saved.append(read[step])
        made.tokens.append(int(logits.argmax()))
    return made
