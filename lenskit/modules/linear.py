"""Matrix products: `Linear`, the token embedding, learned positions and token types, and the unembedding."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lenskit.errors import InputError, LenskitError
from lenskit.hooks import HookPoint
from lenskit.modules.module import Module, empty


class Linear(Module):
    """`x @ weight.T + bias`, with `weight` [d_out, d_in] as it lies on disk: the strides may be either way round.

    Its parameters are read from the dict that torch keeps them in: `self.weight` goes through
    `nn.Module.__getattr__`, which costs as much as a small product's dispatch.
    """

    bias: nn.Parameter | None

    def __init__(self, d_in: int, d_out: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = empty(d_out, d_in)
        self.register_parameter("bias", empty(d_out) if bias else None)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        parameters = self._parameters
        return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]

    @property
    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """What the input is multiplied with; a subclass's may be more than the stored weight."""
        return self.weight

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        return f"{d_in} -> {d_out}" + ("" if self.bias is None else ", bias")


class Embed(Module):
    """Token embedding; `W_E` [d_vocab, d_model] is a view of the stored weight."""

    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.weight = empty(d_vocab, d_model)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return F.embedding(tokens, self._parameters["weight"])  # type: ignore[arg-type]

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} tokens -> {self.weight.shape[1]}"


class ScaledEmbed(Embed):
    """Token embedding times `multiplier`. `W_E` is what is stored, unscaled.

    Args:
        rounded: whether the multiplier is rounded to the weights' dtype first, which shows in half precision.
    """

    def __init__(self, d_vocab: int, d_model: int, *, multiplier: float, rounded: bool = True) -> None:
        super().__init__(d_vocab, d_model)
        self.multiplier, self.rounded = multiplier, rounded

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        by = torch.tensor(self.multiplier, dtype=weight.dtype) if self.rounded else self.multiplier
        return F.embedding(tokens, weight) * by


class TransformedEmbed(Embed):
    """Token embedding with something behind it, a norm or a projection; `hook_embed` is what comes out of that.

    Args:
        d_embed: width of the stored vectors.
        then: what they go through. It is `embed.then`; a norm's points are `embed.then.hook_scale` and so on.
    """

    def __init__(self, d_vocab: int, d_embed: int, *, then: Module) -> None:
        super().__init__(d_vocab, d_embed)
        self.then = then

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        embedded: Tensor = self.then(F.embedding(tokens, self._parameters["weight"]))  # type: ignore[arg-type]
        return embedded


class LearnedPositions(Module):
    """Adds a learned vector for each position; `W_pos` [n_ctx, d_model] is a view of the stored weight."""

    offset = 0  # rows of the stored weight before that of position 0

    def __init__(self, n_ctx: int, d_model: int) -> None:
        super().__init__()
        self.weight = empty(n_ctx, d_model)
        self.hook_pos_embed = HookPoint("batch pos d_model", d_model=d_model)

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "rows pos"], n_keys: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream with positions added; `n_keys` tokens, past ones included, must fit n_ctx.

        Raises:
            InputError: the sequence is longer than the learned positions.
        """
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        n_ctx = weight.shape[0] - self.offset
        if n_keys > n_ctx and int(positions.max()) >= n_ctx:  # padding does not count
            raise InputError(
                "the sequence is longer than the model's context",
                got=f"{int(positions.max()) + 1} tokens",
                expected=f"at most {n_ctx} (cfg.n_ctx): this model learned one vector a position",
                fix="shorten the prompt, or ask for fewer new tokens",
            )
        added = F.embedding(positions + self.offset if self.offset else positions, weight).expand_as(resid)
        return resid + self.hook_pos_embed(added)

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} positions"


class OffsetPositions(LearnedPositions):
    """Learned positions whose table begins with `offset` rows that no token reads: position p is row p + offset."""

    def __init__(self, n_ctx: int, d_model: int, *, offset: int) -> None:
        super().__init__(n_ctx + offset, d_model)
        self.offset = offset

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        return self.weight[self.offset :]


class TokenTypes(Module):
    """Adds a learned vector for each token's type, such as which text of a pair it is in; `W_token_type`
    [type, d_model] is the stored weight.
    """

    def __init__(self, n_types: int, d_model: int) -> None:
        super().__init__()
        self.weight = empty(n_types, d_model)
        self.hook_token_type_embed = HookPoint("batch pos d_model", d_model=d_model)

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], types: Int[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream with the types' vectors added; without types, all tokens are of type 0."""
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        added = weight[0] if types is None else F.embedding(types, weight)
        return resid + self.hook_token_type_embed(added.expand_as(resid))

    @property
    def W_token_type(self) -> Float[Tensor, "type d_model"]:
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} types"


class Unembed(Linear):
    """From the stream to logits; `W_U` [d_model, d_vocab] and `b_U` [d_vocab] are views of the stored weights."""

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.matrix.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return bias_view(self.bias, self.weight.shape[0], like=self.weight)


class SoftCap(Module):
    """cap * tanh(x / cap): keeps numbers within (-cap, cap), and small ones as they are."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.cap) * self.cap

    def extra_repr(self) -> str:
        return str(self.cap)


class ScaledUnembed(Unembed):
    """Logits times `multiplier`. `W_U` and `b_U` are what is stored, unscaled."""

    def __init__(self, d_model: int, d_vocab: int, *, bias: bool, multiplier: float) -> None:
        super().__init__(d_model, d_vocab, bias=bias)
        self.multiplier = multiplier

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return super().forward(x) * self.multiplier


class CappedUnembed(Unembed):
    """Logits under a soft cap: cap * tanh(logits / cap)."""

    def __init__(self, d_model: int, d_vocab: int, *, bias: bool, cap: float) -> None:
        super().__init__(d_model, d_vocab, bias=bias)
        self.cap = SoftCap(cap)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return self.cap(super().forward(x))


class TransformedUnembed(Unembed):
    """Logits of what the stream becomes in a projection. `W_U` is the product of both matrices, computed when asked.

    Args:
        d_embed: width of the stored vectors, one a token.
        first: the projection from d_model to that.
    """

    def __init__(self, d_embed: int, d_vocab: int, *, bias: bool, first: Linear) -> None:
        super().__init__(d_embed, d_vocab, bias=bias)
        self.first = first

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return super().forward(self.first(x))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.first.matrix.T @ self.matrix.T


class NonlinearUnembed(Unembed):
    """Logits of what the stream becomes in a layer of its own, `ln(act(dense(stream)))`. `W_U` reads the norm's output.

    `hook_pre` is before the activation function, `hook_post` after it; the norm's points are `ln.hook_scale` and so on.
    """

    def __init__(
        self, d_model: int, d_vocab: int, *, bias: bool, dense: Linear, act: Callable[[Tensor], Tensor], ln: Module
    ) -> None:
        super().__init__(d_model, d_vocab, bias=bias)
        self.dense, self.act = dense, act
        self.hook_pre = HookPoint("batch pos d_model", d_model=d_model)
        self.hook_post = HookPoint("batch pos d_model", d_model=d_model)
        self.ln = ln

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return super().forward(self.ln(self.hook_post(self.act(self.hook_pre(self.dense(x))))))


class Unwritable(Tensor):
    """A tensor that stands for a weight that is not there as such: writing it in place would be lost, so it is an
    error. Views of it are like it.
    """

    @classmethod
    @abstractmethod
    def refusal(cls, name: str) -> LenskitError:
        """What is raised; `name` is the function that would write."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        if in_place and isinstance(args[0], cls):
            raise cls.refusal(name)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        shares = isinstance(result, Tensor) and any(
            isinstance(arg, cls) and arg.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
            for arg in args
        )
        return result.as_subclass(cls) if shares else result


class AbsentBias(Unwritable):
    """Zeros where a model has no bias."""

    @classmethod
    def refusal(cls, name: str) -> LenskitError:
        return LenskitError(
            "this model has no such bias",
            got=f"{name} on zeros that stand for it",
            expected="reads only: there is nothing to write to",
            fix="use a model whose config has the bias, or add it to the activation with a hook",
        )


def bias_view(bias: nn.Parameter | None, *shape: int, like: Tensor) -> Tensor:
    """A bias in `shape`; where the model has none, zeros that refuse to be written in place."""
    return like.new_zeros(shape).as_subclass(AbsentBias) if bias is None else bias.view(shape)
