"""Interventions done the plain way: on Hugging Face's own model, with torch's forward hooks, without a cache.

The whole sequence is computed again at every step. Each token belongs to the step that processed it first, and the
edits of that step are applied to it again in every later pass. Nothing of lenskit's interventions is used here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
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


def points(model: PreTrainedModel) -> dict[str, tuple[torch.nn.Module, str, Any]]:
    """Where hook points are in Hugging Face's model: module, "in" or "out", and how a tensor of it is cut to shape."""
    gpt2 = model.config.model_type == "gpt2"
    base = model.transformer if gpt2 else model.model
    found: dict[str, tuple[torch.nn.Module, str, Any]] = {
        "hook_embed": (base.wte if gpt2 else base.embed_tokens, "out", None),
        "hook_logits": (model.lm_head, "out", None),
    }
    heads = model.config.num_attention_heads
    for layer, block in enumerate(base.h if gpt2 else base.layers):
        at = f"blocks.{layer}."
        attn = block.attn if gpt2 else block.self_attn
        found[at + "hook_resid_pre"] = (block, "in", None)
        if not gpt2:
            groups = model.config.num_key_value_heads
            for name, module, n in (
                ("q", attn.q_proj, heads),
                ("k", attn.k_proj, groups),
                ("v", attn.v_proj, groups),
            ):
                found[f"{at}attn.hook_{name}"] = (module, "out", n)
        found[at + "attn.hook_z"] = (attn.c_proj if gpt2 else attn.o_proj, "in", heads)
        found[at + "hook_attn_out"] = (attn, "out", None)
        found[at + "mlp.hook_post"] = (block.mlp.c_proj if gpt2 else block.mlp.down_proj, "in", None)
        found[at + "hook_mlp_out"] = (block.mlp, "out", None)
        found[at + "hook_resid_post"] = (block, "out", None)
    return found


@contextmanager
def watched(model: PreTrainedModel, watch: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """`watch(point, activation [pos ...])` at every point, and what it returns goes on."""
    with ExitStack() as stack:
        for name, (module, side, heads) in points(model).items():

            def turn(value: Tensor, name: str = name, heads: int | None = heads) -> Tensor:
                seen = value[0] if heads is None else value[0].unflatten(-1, (heads, -1))
                return watch(name, seen).reshape(value.shape)

            if side == "out":

                def after(_: Any, __: Any, out: Any, turn: Any = turn) -> Any:
                    return (turn(out[0]), *out[1:]) if isinstance(out, tuple) else turn(out)

                stack.callback(module.register_forward_hook(after).remove)
            else:

                def before(_: Any, args: Any, kwargs: Any, turn: Any = turn) -> Any:
                    if args:
                        return (turn(args[0]), *args[1:]), kwargs
                    return args, {**kwargs, "hidden_states": turn(kwargs["hidden_states"])}

                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: list[int], n_steps: int, edits: list[Edit]) -> Reference:
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

        with watched(model, watch):
            logits = model(torch.tensor([made.tokens]), use_cache=False).logits[0, -1]
        made.logits.append(logits)
        made.saved.append(read[step])
        made.tokens.append(int(logits.argmax()))
    return made
