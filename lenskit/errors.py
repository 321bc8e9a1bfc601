"""Every exception that lenskit raises on purpose.

LenskitError
├── InputError                   prompts or token ids that the model cannot take
├── ConfigError
│   ├── UnsupportedModelError    a `model_type` that no family file covers
│   └── UnsupportedConfigError   an attribute that would change the computation and is not handled
├── CheckpointError
│   ├── CheckpointNotFoundError  no such embedded name, folder, or file in the folder
│   ├── HubError                 a hub id that could not be fetched
│   ├── CorruptCheckpointError   a truncated, unreadable or unsafe file
│   ├── MissingTensorError       the model needs a tensor that no file has
│   ├── UnknownTensorError       a file has a tensor that the model has no place for
│   └── TensorShapeError         a tensor of another shape than the config says
├── HookError
│   ├── UnknownHookPointError    a name, glob or predicate that matches no hook point
│   ├── AxisError                an axis that a hook point does not have
│   ├── ReplacementError         a replacement of another type, shape, dtype or device
│   └── HookConflictError        two hooks of which one would be without effect
├── PlanError                    interventions that cannot be carried out; found before anything runs
│   ├── SelectorError            prompts, tokens, heads or dims that are not there
│   ├── StepError                steps that the generation does not have
│   ├── ValueFitError            a value whose shape or dtype does not fit what it is put into
│   ├── DependencyError          a value that would be needed before it exists
│   ├── WithoutEffectError       an op that would never run, or whose result could not be told apart
│   ├── ExpressionError          something that an expression cannot do
│   └── PlanFormatError          data that is no plan, or a plan that cannot be written as data
├── TraceError                   a trace that is used where or how it cannot record anything
├── NotSavedError                a value that was asked for and never saved
├── GenerationError              options of `generate` that make no sense or are not supported
├── NotCausalError               an encoder that is asked to foretell what comes after a token
├── RemoteError                  a server that cannot do, or did not do, what it was asked
│   ├── UnreachableError         no answer, however often it was asked
│   ├── KeyRefusedError          no API key, or one that the server does not know
│   ├── LimitError               a job that is more than the server allows
│   │   └── QuotaError           one that is more than its key may have now
│   ├── NoSuchJobError           a job that is not there, or not this key's
│   ├── JobUnfinishedError       the result of a job that is not done in time
│   ├── JobCancelledError        the result of a job that was cancelled
│   ├── ResultGoneError          a result that is not kept any more
│   └── OutOfRoomError           no memory or disk left where the job ran
└── MissingExtraError            an optional dependency that is not installed
"""


class LenskitError(Exception):
    """Root of the tree. The message always says what came, what was expected, and what to do.

    Args:
        what: one line that names the thing that is wrong (a file, a hook point, an attribute).
        got: what came.
        expected: what would have been right.
        fix: what the reader can do about it.
    """

    def __init__(self, what: str, *, got: str, expected: str, fix: str) -> None:
        super().__init__(f"{what}\n  got:      {got}\n  expected: {expected}\n  to do:    {fix}")
        self.what, self.got, self.expected, self.fix = what, got, expected, fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.got, self.expected, self.fix)


def _rebuild(cls: type[LenskitError], what: str, got: str, expected: str, fix: str) -> LenskitError:
    """Unpickling (worker processes send exceptions back) needs a callable that takes no keywords."""
    return cls(what, got=got, expected=expected, fix=fix)


class InputError(LenskitError, ValueError):
    """Prompts or token ids that the model cannot take."""


class ConfigError(LenskitError, ValueError):
    """A configuration that describes no model that lenskit can build."""


class UnsupportedModelError(ConfigError):
    """A `model_type` that no family file covers."""


class UnsupportedConfigError(ConfigError):
    """A config attribute that would change the computation and is not handled."""


class CheckpointError(LenskitError):
    """A checkpoint that cannot be found, read or matched to its config."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such embedded name, folder, or file in the folder."""


class HubError(CheckpointError, OSError):
    """A hub id that could not be fetched."""


class CorruptCheckpointError(CheckpointError):
    """A truncated, unreadable or unsafe file."""


class MissingTensorError(CheckpointError, KeyError):
    """The model needs a tensor that no file has."""

    __str__ = Exception.__str__  # KeyError's would print the message quoted, on one line


class UnknownTensorError(CheckpointError):
    """A file has a tensor that the model has no place for."""


class TensorShapeError(CheckpointError, ValueError):
    """A tensor of another shape than the config says."""


class HookError(LenskitError):
    """A hook that cannot be attached or whose result cannot be used."""


class UnknownHookPointError(HookError, KeyError):
    """A name, glob or predicate that matches no hook point."""

    __str__ = Exception.__str__


class AxisError(HookError, ValueError):
    """An axis that a hook point does not have."""


class ReplacementError(HookError, ValueError):
    """A replacement of another type, shape, dtype or device than the activation."""


class HookConflictError(HookError):
    """Two hooks of which one would be without effect."""


class PlanError(LenskitError):
    """Interventions that cannot be carried out."""


class SelectorError(PlanError, ValueError):
    """Prompts, tokens, heads or dims that are not there."""


class StepError(PlanError, ValueError):
    """Steps that the generation does not have."""


class ValueFitError(PlanError, ValueError):
    """A value whose shape or dtype does not fit what it is put into."""


class DependencyError(PlanError):
    """A value that would be needed before it exists."""


class WithoutEffectError(PlanError):
    """An op that would never run, or whose result could not be told apart from another's."""


class ExpressionError(PlanError, TypeError):
    """Something that an expression cannot do."""


class PlanFormatError(PlanError, ValueError):
    """Data that is no plan, or a plan that cannot be written as data."""


class TraceError(LenskitError, TypeError):
    """A trace or a proxy that is used where or how nothing can be recorded."""


class NotSavedError(LenskitError, KeyError):
    """A value that was asked for and never saved."""

    __str__ = Exception.__str__


class GenerationError(LenskitError, ValueError):
    """Options of `generate` that make no sense or are not supported."""


class RemoteError(LenskitError, RuntimeError):
    """A server that cannot do, or did not do, what it was asked."""


class UnreachableError(RemoteError, ConnectionError):
    """No answer from the server, however often it was asked."""


class KeyRefusedError(RemoteError, PermissionError):
    """No API key, or one that the server does not know."""


class LimitError(RemoteError):
    """A job that is more than the server allows."""


class QuotaError(LimitError):
    """A job that is more than its key may have at the moment."""


class NoSuchJobError(RemoteError, LookupError):
    """A job that is not there, or not this key's."""


class JobUnfinishedError(RemoteError, TimeoutError):
    """The result of a job that is not done in the time that was given."""


class JobCancelledError(RemoteError):
    """The result of a job that was cancelled."""


class ResultGoneError(RemoteError):
    """A result that is not kept any more."""


class OutOfRoomError(RemoteError):
    """No memory or disk left where the job ran."""


class NotCausalError(LenskitError, TypeError):
    """An encoder, whose tokens see those after them, that is asked for what takes a model whose tokens do not."""


class MissingExtraError(LenskitError, ImportError):
    """An optional dependency that is not installed."""
