"""Mixtures of experts (Shazeer et al. 2017, arXiv 1701.06538): a router sends each token to a few of many MLPs.

What is unusual here: the experts of a layer run one after another, each once, on the tokens that chose it, which have
been put in order of experts by one sort; their outputs come back by one more, and are mixed by one product. Where
nobody looks into them, each of their products is written into its part of one tensor for all experts, and what lies
between the products is computed of that at once: of hundreds of small experts it would take longer than they do.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lenskit.hooks import HookPoint
from lenskit.modules.linear import Linear
from lenskit.modules.mlp import FeedForward
from lenskit.modules.module import Identity, Module, at_least_float32, calls_are_plain, empty

Choice = tuple[Float[Tensor, "batch pos choice"], Int[Tensor, "batch pos choice"]]


class Choose(Module):
    """Which experts a token goes to, and with what weight: in float32 at least.

    top_k: experts a token.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    @abstractmethod
    def forward(self, logits: Float[Tensor, "batch pos expert"]) -> Choice:
        """Weights and numbers of each token's experts, the weightiest first."""


class SoftmaxTopK(Choose):
    """A softmax over all experts, of which the largest are taken, and made to sum to one again if `normalised`."""

    def __init__(self, top_k: int, *, normalised: bool) -> None:
        super().__init__(top_k)
        self.normalised = normalised

    def forward(self, logits: Float[Tensor, "batch pos expert"]) -> Choice:
        weights, experts = logits.softmax(-1, dtype=at_least_float32(logits.dtype)).topk(self.top_k, -1)
        return (weights / weights.sum(-1, keepdim=True) if self.normalised else weights), experts


class TopKSoftmax(Choose):
    """The largest logits, and a softmax over them alone: they sum to one."""

    def forward(self, logits: Float[Tensor, "batch pos expert"]) -> Choice:
        chosen, experts = logits.topk(self.top_k, -1)
        return chosen.softmax(-1, dtype=at_least_float32(logits.dtype)), experts


class SigmoidTopK(Choose):
    """A sigmoid for each expert; which are largest is decided with a correction of their own, and within the groups
    whose two best experts are best (DeepSeek-AI 2024, arXiv 2412.19437). The weights are those without correction.

    Args:
        n_experts, n_groups: experts, in so many groups of neighbours.
        top_groups: the groups that a token may choose from.
        normalised: whether the weights are made to sum to one.
        multiplier: what they are multiplied by, last.

    `correction` [expert] stays float32: it is what experts of nearly equal scores are told apart by.
    """

    kept_exact = ("correction",)

    def __init__(
        self, top_k: int, *, n_experts: int, n_groups: int, top_groups: int, normalised: bool, multiplier: float
    ) -> None:
        super().__init__(top_k)
        self.n_groups, self.top_groups = n_groups, top_groups
        self.normalised, self.multiplier = normalised, multiplier
        self.correction = empty(n_experts)

    def forward(self, logits: Float[Tensor, "batch pos expert"]) -> Choice:
        scores = logits.to(at_least_float32(logits.dtype)).sigmoid()
        by_group = (scores + self.correction).unflatten(-1, (self.n_groups, -1))
        best = by_group.topk(2, -1).values.sum(-1).topk(self.top_groups, -1).indices
        left_out = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, False)
        experts = by_group.masked_fill(left_out[..., None], float("-inf")).flatten(-2).topk(self.top_k, -1).indices
        weights = scores.gather(-1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.normalised else weights
        return weights * self.multiplier, experts


class ExactRouter(Linear):
    """Logits in float32 at least, whatever the dtype of the stream and the weights."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__(d_model, n_experts, bias=False)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch expert"]:
        exact = at_least_float32(x.dtype)
        return F.linear(x.to(exact), self.weight.to(exact))


class MixtureOfExperts(Module):
    """The weighted sum of what each token's experts give.

    Points: `hook_router_logits` [batch pos expert], `hook_expert_weights` and `hook_expert_indices` (whole numbers)
    [batch pos choice], and those of every expert, `experts.{e}.hook_pre` and so on, [batch pos d_mlp]. A point of an
    expert has all tokens: an expert that somebody looks at runs on those as well that did not choose it. What it
    gives for them counts for nothing; `hook_expert_indices` says which did.

    Args:
        router: from the stream to a logit for each expert.
        choose: logits to weights and experts.
        experts: MLPs, all of one width.
    """

    def __init__(self, d_model: int, *, router: Module, choose: Choose, experts: Iterable[FeedForward]) -> None:
        super().__init__()
        layers = list(experts)
        self.router = router
        exact = isinstance(router, ExactRouter)
        self.hook_router_logits = HookPoint("batch pos expert", statistic=exact, expert=len(layers))
        self.choose = choose
        self.hook_expert_weights = HookPoint("batch pos choice", statistic=True, choice=choose.top_k)
        self.hook_expert_indices = HookPoint("batch pos choice", whole_numbers=True, choice=choose.top_k)
        self.experts = nn.ModuleList(layers)
        self._points = [[p for p in expert.modules() if isinstance(p, HookPoint)] for expert in layers]
        self._all_points = [point for points in self._points for point in points]
        self._linears = [child for expert in layers for child in expert.children() if isinstance(child, Linear)]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        weights, experts = self.choose(self.hook_router_logits(self.router(x)))
        weights, experts = self.hook_expert_weights(weights), self.hook_expert_indices(experts)
        by_choice = self.run_experts(x, experts.flatten(0, 1))
        return (weights.flatten(0, 1)[:, None] @ by_choice.to(weights.dtype)).view(x.shape).to(x.dtype)

    def run_experts(
        self, x: Float[Tensor, "batch pos d_model"], experts: Int[Tensor, "token choice"]
    ) -> Float[Tensor, "token choice d_model"]:
        """What each token's experts give, unweighted."""
        order = experts.flatten().argsort(stable=True)  # choices, by their expert
        tokens = order // experts.shape[1]
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        run = self._together if self._nobody_looks() else self._one_by_one
        return run(x, tokens, counts)[order.argsort()].view(*experts.shape, -1)

    def _one_by_one(self, x: Float[Tensor, "batch pos d_model"], tokens: Tensor, counts: list[int]) -> Tensor:
        inputs, chosen = x.flatten(0, 1)[tokens].split(counts), tokens.split(counts)
        outputs = []
        for e, count in enumerate(counts):
            if any(point.attachments is not None for point in self._points[e]):
                outputs.append(self.experts[e](x).flatten(0, 1)[chosen[e]])
            elif count:
                outputs.append(self.experts[e](inputs[e]))
        return torch.cat(outputs)

    def _together(self, x: Float[Tensor, "batch pos d_model"], tokens: Tensor, counts: list[int]) -> Tensor:
        used: list[Any] = [self.experts[e] for e, count in enumerate(counts) if count]
        rows = [count for count in counts if count]
        inputs = x.flatten(0, 1)[tokens]
        products = [_products([getattr(expert, name) for expert in used], inputs, rows) for name in used[0].reads]
        return _products([expert.w_out for expert in used], used[0].hidden(*products), rows)

    def _nobody_looks(self) -> bool:
        """Whether the experts' calls are nothing but their products, of which nobody wants gradients."""
        if torch.is_grad_enabled() or not calls_are_plain():
            return False
        plain = all(type(linear) is Linear for linear in self._linears)
        return plain and all(point.attachments is None for point in self._all_points)


def _products(linears: Sequence[Linear], x: Float[Tensor, "row d_in"], rows: Sequence[int]) -> Tensor:
    """Each product of its own rows of x, one after another: [row d_out]."""
    out = x.new_empty(len(x), linears[0].weight.shape[0])
    for linear, of, into in zip(linears, x.split(rows), out.split(rows), strict=True):
        weight, bias = linear.weight, linear.bias
        if bias is None:
            torch.mm(of, weight.t(), out=into)
        else:
            torch.addmm(bias, of, weight.t(), out=into)
    return out


class SharedExperts(MixtureOfExperts):
    """A mixture beside an MLP that every token goes through, `shared`; what both give is added up.

    Args:
        gate: whether the shared MLP's output is multiplied by a sigmoid of a product of the token's own.
    """

    def __init__(
        self,
        d_model: int,
        *,
        router: Module,
        choose: Choose,
        experts: Iterable[FeedForward],
        shared: FeedForward,
        gate: bool,
    ) -> None:
        super().__init__(d_model, router=router, choose=choose, experts=experts)
        self.shared = shared
        self.shared_gate: Module = SigmoidGate(d_model) if gate else Identity()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return super().forward(x) + self.shared_gate(self.shared(x), x)


class SigmoidGate(Linear):
    """Multiplies by a number in (0, 1) for each token: `hook_gate` [batch pos 1]."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, 1, bias=False)
        self.hook_gate = HookPoint("batch pos 1")

    def forward(  # type: ignore[override]
        self, out: Float[Tensor, "batch pos d_model"], x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return out * self.hook_gate(super().forward(x).sigmoid())
