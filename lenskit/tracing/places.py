"""Places: which hook point is the input or the output of a module."""

from collections.abc import Mapping

from torch import nn

from lenskit.errors import TraceError
from lenskit.hooks import HookPoint
from lenskit.models.base import Decoder
from lenskit.recording import End, Recorded

# By a module's own name: the points that are its ends, nearest first, those that the architecture has not left out.
# {last} is the last block; "tokens" are ids, which are known.
_INPUTS: Mapping[str, tuple[str, ...]] = {
    "": ("tokens",),
    "embed": ("tokens",),
    "block": ("hook_resid_pre",),
    "ln1": ("hook_resid_pre",),
    "attn": ("ln1.hook_out", "hook_resid_pre"),
    "ln2": ("hook_resid_mid", "hook_resid_pre"),
    "mlp": ("ln2.hook_out", "ln1.hook_out", "hook_resid_mid"),
    "ln_final": ("{last}hook_resid_post",),
    "unembed": ("ln_final.hook_out", "{last}hook_resid_post"),
}
_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "": ("hook_logits",),
    "embed": ("hook_embed",),
    "pos_embed": ("hook_pos_embed",),
    "token_type_embed": ("hook_token_type_embed",),
    "block": ("hook_resid_post",),
    "attn": ("hook_attn_out",),
    "mlp": ("hook_mlp_out",),
    "unembed": ("hook_logits",),
}


def place_of(model: Decoder, module: nn.Module, end: End) -> HookPoint | None:
    """The hook point that is an end of a module; None for the ids that enter the model.

    A hook point is both of its ends. An attention's or MLP's output is what is added to the stream.

    Raises:
        TraceError: a module of another model, or one without a point there.
    """
    if not (isinstance(module, Recorded) and _own(model, module)):
        raise TraceError(
            f"{getattr(module, 'name', '') or type(module).__name__}.{end} is of another model",
            got=f"a {type(module).__name__} that is no part of the model that is traced",
            expected="modules of one model in one trace",
            fix="open a trace of the other model, and carry values over: its .value after the block",
        )
    if isinstance(module, HookPoint):
        return module
    path = module.name.split(".")
    block = f"{path[0]}.{path[1]}." if path[0] == "blocks" else ""
    kind = "block" if block and len(path) == 2 else ".".join(path[2:] if block else path)
    names = (_INPUTS if end == "input" else _OUTPUTS).get(kind, ())
    if end == "output" and not names:
        names = (f"{kind}.hook_out",)  # of a norm
    last = f"blocks.{model.cfg.n_layers - 1}."
    for name in names:
        if name == "tokens":
            return None
        found = model.hook_points.get(name.format(last=last) if name[0] == "{" else block + name)
        if found is not None:
            return found
    inside = [point for point in model.hook_points if point.startswith(f"{module.name}.")]
    raise TraceError(
        f"{module.name}.{end} has no hook point",
        got=f"the {end} of a {type(module).__name__}",
        expected=f"one of {', '.join(inside[:6]) or 'the hook points that model.hook_names() lists'}",
        fix="read the hook point whose activation you mean",
    )


def _own(model: Decoder, module: Recorded) -> bool:
    if isinstance(module, HookPoint):
        return model.hook_points.get(module.name) is module
    try:
        return model.get_submodule(module.name) is module
    except AttributeError:
        return False
