"""What the API says of itself (OpenAPI): the shapes of what goes over the wire."""

from typing import Any, Literal

from pydantic import BaseModel

from lenskit.remote.wire import JSON, SAFETENSORS
from lenskit.server.config import JobLimits, KeyLimits

DESCRIPTION = """\
A **job** is a plan (what `Plan.to_json` gives), token ids and options; a **result** is a safetensors file. Nothing is
unpickled or evaluated. `lenskit.connect(url)` is the client; everything can be done with any HTTP client as well.

Requests carry `Authorization: Bearer lk_...`, unless the server runs without keys, on loopback. Every error is
`{"error": {"type", "what", "got", "expected", "fix"}}`. A job, its events and its result are there for its key alone.
"""


class Error(BaseModel):
    """What went wrong: the class of lenskit's exception, and its parts."""

    type: str
    what: str
    got: str
    expected: str
    fix: str


class ErrorBody(BaseModel):
    """An answer that is an error."""

    error: Error


class Cost(BaseModel):
    """See `lenskit.server.admission.Cost`."""

    passes: int
    tokens: int
    token_layers: int
    result_bytes: int
    expression_bytes: int


class Kept(BaseModel):
    """A result: how large it is, and until when it is kept (unix seconds)."""

    bytes: int
    until: float


class Job(BaseModel):
    """How a job is. Times are unix seconds; `place` is 0 for the next one."""

    id: str
    model: str
    verb: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    place: int | None
    step: int | None
    steps: int
    rows: int
    created: float
    started: float | None
    finished: float | None
    error: Error | None
    result: Kept | None
    cost: Cost


class JobList(BaseModel):
    """Jobs, the newest first."""

    jobs: list[Job]


class Model(BaseModel):
    """A model that is served."""

    name: str
    family: str
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    n_ctx: int | None
    dtype: str
    replicas: int
    status: str


class ModelList(BaseModel):
    """All of them."""

    models: list[Model]


class Point(BaseModel):
    """A hook point."""

    name: str
    axes: list[str]
    on_demand: bool


class ModelDescription(Model):
    """A model, with what a client needs to build its structure."""

    hook_points: list[Point]
    files: dict[str, str]
    digest: str


class Health(BaseModel):
    """That the server answers."""

    status: str
    version: str


class Limits(BaseModel):
    """What a job and a key may have."""

    job: JobLimits
    key: KeyLimits
    used: dict[str, int]


class Watched(Model):
    """A model, and what goes on in it."""

    queued: int
    running: int
    restarts: int
    memory: list[dict[str, Any]]


class Overview(BaseModel):
    """What the page shows."""

    time: float
    models: list[Watched]
    running: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    jobs: list[Job]


_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_OPTIONS = {
    "max_new_tokens": {"type": "integer", "minimum": 1},
    "do_sample": {"type": "boolean"},
    "temperature": {"type": "number"},
    "top_k": {"type": "integer"},
    "top_p": {"type": "number"},
    "min_p": {"type": "number"},
    "repetition_penalty": {"type": "number"},
    "eos_token_id": {"type": "array", "items": {"type": "integer"}},
    "stop_strings": {"type": "array", "items": {"type": "string"}},
    "num_return_sequences": {"type": "integer", "minimum": 1},
    "seed": {"type": "integer"},
}
_ROWS = {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": {"type": "integer"}}}
_JOB = {
    "type": "object",
    "required": ["model", "verb", "tokens"],
    "additionalProperties": False,
    "properties": {
        "model": {"type": "string"},
        "verb": {"enum": ["forward", "generate"]},
        "tokens": {**_ROWS, "description": "ids [row pos]"},
        "mask": {**_ROWS, "description": "1 for a row's own tokens, 0 for padding"},
        "plan": {"type": "object", "description": "what Plan.to_json gives"},
        "options": {"type": "object", "additionalProperties": False, "properties": _OPTIONS},
        "logits": {"type": "boolean", "description": "whether the result is to have them"},
    },
    "example": {
        "model": "demo-gpt2",
        "verb": "generate",
        "tokens": [[12, 34, 56]],
        "options": {"max_new_tokens": 3},
        "plan": {
            "format": "lenskit-plan",
            "version": 1,
            "ops": [{"op": "save", "at": "blocks.0.hook_resid_post", "selectors": {"tokens": -1}}],
            "nodes": [],
        },
    },
}
JOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"{JSON}: the job. {SAFETENSORS}: the plan's tensors, with the job as JSON in the metadata "
        '"lenskit" (`lenskit.remote.wire.pack`).',
        "content": {JSON: {"schema": _JOB}, SAFETENSORS: _BINARY},
    }
}


def _error(description: str) -> dict[str, Any]:
    return {"model": ErrorBody, "description": description}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _error("malformed"),
    401: _error("no key, or one that is not known"),
    403: _error("a server without keys, asked from elsewhere"),
    404: _error("no such job of this key, no such model"),
    408: _error("an upload that stopped"),
    413: _error("a body, or a job, over the limit of one"),
    422: _error("a plan, ids or options that cannot be carried out"),
    429: _error("more than the key may have now; Retry-After says when to come back"),
    503: _error("not now; Retry-After says when"),
    507: _error("no room on the disk"),
}
EVENTS = {
    **ERRORS,
    200: {
        "description": "events queued, running, saved, done, failed, cancelled; the data is the job",
        "content": {"text/event-stream": {}},
    },
}
RESULT = {
    **ERRORS,
    200: {"description": "the result", "content": {SAFETENSORS: _BINARY}},
    202: {"model": Job, "description": "not finished"},
    206: {"description": "the part asked for by Range", "content": {SAFETENSORS: _BINARY}},
    409: _error("the job failed, or was cancelled: its own error"),
    410: _error("the result is not kept any more"),
    416: {"description": "a range behind the end"},
}
