"""From a job's data to a run that is ready, with everything checked; and what it will cost.

The process that takes jobs does this with a model without weights, the one that runs them with the model itself.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lenskit.batching import Forward, Work, can_share
from lenskit.errors import InputError, LimitError
from lenskit.generation import Generator
from lenskit.interventions.compiler import Compiler
from lenskit.interventions.expressions import Act, Leaf, order
from lenskit.interventions.expressions.evaluation import shape_of_node
from lenskit.interventions.forward import geometry_of
from lenskit.interventions.ops import Save
from lenskit.interventions.plan import Plan
from lenskit.interventions.program import Program, Resolved
from lenskit.remote.wire import VERBS, rows_from_wire
from lenskit.server.config import JobLimits
from lenskit.transformer import HookedTransformer

KEYS = ("model", "verb", "tokens", "mask", "plan", "options", "logits")
OPTIONS = (
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id",
    "stop_strings", "num_return_sequences", "seed",
)  # fmt: skip
STOP_STRINGS = 64  # at most, of so many characters each: Hugging Face compares each with the whole vocabulary
STOP_LENGTH = 200


@dataclass(frozen=True)
class Cost:
    """What a job will cost, from its plan alone.

    passes: through the model, of the whole batch or of parts. tokens: that are processed, padding included.
    token_layers: tokens x layers, three times where there are gradients. result_bytes: of what is saved, at most.
    expression_bytes: of all that expressions compute in a step.
    """

    passes: int
    tokens: int
    token_layers: int
    result_bytes: int
    expression_bytes: int

    def as_json(self) -> dict[str, int]:
        """By name."""
        return asdict(self)

    def check(self, limits: JobLimits, rows: int) -> None:
        """See that one job may cost so much.

        Raises:
            LimitError: it may not; with the figures.
        """
        for name, got in {"rows": rows, **self.as_json()}.items():
            allowed = getattr(limits, name, None)
            if allowed is not None and got > allowed:
                raise LimitError(
                    f"the job is over the server's limit {name}",
                    got=f"{got:,} ({', '.join(f'{part} {n:,}' for part, n in self.as_json().items())})",
                    expected=f"at most {allowed:,}",
                    fix=_FIXES[name],
                )


_FIXES = {
    "rows": "send fewer prompts at once",
    "tokens": "send fewer or shorter prompts at once, or ask for fewer new tokens",
    "token_layers": "send fewer or shorter prompts at once, or ask for fewer new tokens",
    "result_bytes": "save fewer points, tokens=-1 or some dims of them, or leave the logits out",
    "expression_bytes": "select what expressions need before they compute with it, or save and compute locally",
}


@dataclass(frozen=True)
class Ready:
    """A job that is ready to run."""

    work: Work
    logits: bool
    cost: Cost

    @property
    def rows(self) -> int:
        return len(self.work.batch.tokens)

    @property
    def width(self) -> int:
        return self.work.batch.tokens.shape[1]

    @property
    def steps(self) -> int:
        return self.work.program.n_steps

    @property
    def alone(self) -> bool:
        """Whether it may share its passes with no other."""
        return not can_share(self.work)


def admit(
    model: HookedTransformer, job: Any, tensors: Mapping[str, Tensor], *, limits: JobLimits | None = None
) -> Ready:
    """A job as a run.

    Args:
        limits: checked as soon as something is known.

    Raises:
        LenskitError: what is wrong with it.
    """
    verb, options = _checked(job)
    tokens, mask = rows_from_wire(job["tokens"], job.get("mask"))
    if limits is not None:
        _check_size(limits, tokens, options, model)
        _check_ops(limits, job.get("plan"))
    plan = Plan() if job.get("plan") is None else Plan.from_json(job["plan"], tensors)
    mask = None if mask is None or bool(mask.all()) else mask
    logits = bool(job.get("logits", verb == "forward"))
    work: Work
    if verb == "generate":
        work = model.generator(tokens, hooks=plan, mask=mask, progress=False, return_logits=logits, **options)
    else:
        batch = model.batch(tokens, mask)
        program = plan.compile(model, model.hook_points, geometry_of(batch, None), n_steps=None)
        work = Forward(batch, program)
    ready = Ready(work, logits, cost_of(model, work, logits))
    if limits is not None:
        ready.cost.check(limits, ready.rows)
    return ready


def _checked(job: Any) -> tuple[str, dict[str, Any]]:
    """The verb and options of what claims to be a job."""
    if not isinstance(job, Mapping) or not {"model", "verb", "tokens"} <= set(job):
        raise _no_job(f"a {type(job).__name__}", 'an object with "model", "verb" and "tokens"')
    unknown = sorted(set(map(str, job)) - set(KEYS))
    if unknown:
        raise _no_job(f"the keys {', '.join(unknown)[:200]}", f"only {', '.join(KEYS)}")
    if job["verb"] not in VERBS:
        raise _no_job(f"verb {job['verb']!r}"[:200], f"one of {', '.join(VERBS)}")
    if not isinstance(job.get("logits", False), bool):
        raise _no_job(f"logits {job['logits']!r}"[:200], "true or false")
    options = job.get("options") or {}
    if not isinstance(options, Mapping):
        raise _no_job("options that are no object", "an object")
    unknown = sorted(set(map(str, options)) - set(OPTIONS)) if job["verb"] == "generate" else sorted(map(str, options))
    if unknown:
        allowed = f"only {', '.join(OPTIONS)}" if job["verb"] == "generate" else "none: a forward pass has no options"
        raise _no_job(f"the options {', '.join(unknown)[:200]}", allowed)
    strings = options.get("stop_strings")
    if isinstance(strings, str):
        strings = [strings]
    if isinstance(strings, list) and (len(strings) > STOP_STRINGS or any(len(str(s)) > STOP_LENGTH for s in strings)):
        raise _no_job("stop_strings that are many or long", f"{STOP_STRINGS} at most, of {STOP_LENGTH} characters")
    return job["verb"], dict(options)


def _check_size(limits: JobLimits, tokens: Tensor, options: Mapping[str, Any], model: HookedTransformer) -> None:
    """Before anything is compiled for so many rows and steps."""
    new, copies = options.get("max_new_tokens") or 1, options.get("num_return_sequences") or 1
    if not (type(new) is int and type(copies) is int and new > 0 and copies > 0):
        return  # told what is wrong with it later
    rows, width = tokens.shape
    total = rows * copies * (width + new - 1)
    Cost(1, total, total * model.cfg.n_layers, 0, 0).check(limits, rows * copies)


def _check_ops(limits: JobLimits, plan: Any) -> None:
    parts = [plan.get(name) for name in ("ops", "nodes")] if isinstance(plan, Mapping) else []
    n = sum(len(part) for part in parts if isinstance(part, list))
    if n > limits.ops:
        raise LimitError(
            "the plan is over the server's limit ops",
            got=f"{n:,} ops and nodes of expressions",
            expected=f"at most {limits.ops:,}",
            fix="send several jobs, or name several points in one op (a glob, a list)",
        )


def _no_job(got: str, expected: str) -> InputError:
    return InputError("the request is no job", got=got, expected=expected, fix="see the API's page /docs")


# -- what it costs


def cost_of(model: HookedTransformer, work: Work, logits: bool) -> Cost:
    """The cost of a run."""
    program, (n_rows, width) = work.program, work.batch.tokens.shape
    steps = program.n_steps
    tokens = n_rows * (width + steps - 1)
    compiler = Compiler(
        program.points,
        model.embed.weight.dtype,
        program.geometry,
        steps if isinstance(work, Generator) else None,
        program.selections,
    )
    saved = sum(_saved_bytes(compiler, program, op) for op in program.ops if isinstance(op.op, Save))
    if logits:
        saved += (
            n_rows * (steps if isinstance(work, Generator) else width) * model.cfg.d_vocab * compiler.dtype.itemsize
        )
    passes = steps * len(program.passes)
    layers = tokens * model.cfg.n_layers * (3 if program.gradients else 1)
    computed = sum(_computed_bytes(compiler, op) for op in program.ops)
    return Cost(passes, tokens, layers, saved + 8 * (tokens + n_rows), computed)


def _saved_bytes(compiler: Compiler, program: Program, op: Resolved) -> int:
    if not op.places:
        expression = op.op.expressions[0]
        per_step = [_bytes(compiler.shape(op, expression, step)) for step in _kinds(op, None)]
        return _over_steps(op, per_step)
    total = 0
    for place in op.places:
        size = compiler.dtype_of(place[1]).itemsize
        kinds = _kinds(op, place[1].axes)
        shapes = [program.selection(place, op.op.selectors, step, op.rows).shape for step in kinds]
        total += _over_steps(op, [size * _product(shape) for shape in shapes])
    return total


def _kinds(op: Resolved, axes: tuple[str, ...] | None) -> list[int]:
    """Steps that stand for all: the prompt's, and the last one, which is the largest of the others."""
    acts = [source.place[1].axes for source in op.used if source.step is None]
    later = [step for step in op.steps if step]
    found = [0] if 0 in op.steps else []
    if later:
        grows = any("key_pos" in some for some in ([*acts, axes] if axes else acts))
        found.append(later[-1] if grows else later[0])
    return found


def _over_steps(op: Resolved, per_step: list[int]) -> int:
    if not per_step:
        return 0
    prompt = 1 if 0 in op.steps else 0
    later = len(op.steps) - prompt
    return (per_step[0] if prompt else 0) + (per_step[-1] * later if later else 0)


def _computed_bytes(compiler: Compiler, op: Resolved) -> int:
    """Of every node of an op's expressions, at the step where it is most."""
    most = 0
    for step in _kinds(op, None):
        leaf, total = compiler.metas(op, step), 0
        for expression in op.op.expressions:
            values: dict[Any, Any] = {}
            for node in order(expression):
                values[node] = leaf(node) if isinstance(node, Leaf) else shape_of_node(node, values)
                total += 0 if isinstance(node, Act) else _bytes(values[node])
        most = max(most, total)
    return most


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
