"""LoRA adapters as PEFT writes them (Hu et al. 2021, arXiv 2106.09685), fitted to a weight table.

A folder with adapter_config.json and adapter_model.safetensors, whose tensors are named after Hugging Face's modules:
`base_model.model.<module>.lora_A.weight` [rank d_in] and `...lora_B.weight` [d_out rank] make what is added to a
weight, `base_model.model.<module>.weight` replaces one (modules_to_save). Modules have the names on disk of our tables.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lenskit.checkpoints.adapter_config import MERGE, LoraConfig
from lenskit.checkpoints.files import TensorFiles
from lenskit.checkpoints.source import AdapterSource
from lenskit.errors import MissingTensorError, TensorShapeError, UnknownTensorError, UnsupportedConfigError
from lenskit.models.base import Decoder
from lenskit.modules.adapter import AdaptedLinear, adapt
from lenskit.modules.linear import Linear
from lenskit.weights import Drop, Placement, WeightTable

PREFIX = "base_model.model."
ENDS = ("embed.weight", "unembed.weight")
EXPERTS = ".experts."  # in the names of our parameters


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight [d_out d_in]: scale * b @ a. a: [rank d_in]. b: [d_out rank]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.b.shape[0], self.a.shape[1])

    def added_to(self, weight: Tensor) -> Tensor:
        """The sum, in the weight's dtype and on its device, computed in float32 at least."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(weight.device, exact) for factor in (self.a, self.b))
        return torch.addmm(weight.to(exact), b, a, alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter, by the names of our parameters.

    products: what is added.   saved: what replaces a parameter whole.   left_out: parameters whose modules its config
    targets and that it has no product for; PEFT would leave those of them that are products unadapted.
    """

    where: str
    products: Mapping[str, LowRank]
    saved: Mapping[str, Tensor]
    left_out: Collection[str]

    @property
    def unties(self) -> bool:
        """Whether the embedding and the unembedding are not one with it, even if they are in the base."""
        return any(name in ENDS for name in (*self.products, *self.saved))

    def whole(self, name: str, weight: Tensor) -> Tensor:
        """The parameter that replaces one of the base, in its dtype and on its device, or that one."""
        return self.saved[name].to(weight.device, weight.dtype, copy=True) if name in self.saved else weight

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The parameter as the adapter changes it, in its dtype and on its device."""
        whole = self.whole(name, weight)
        return self.products[name].added_to(whole) if name in self.products else whole

    def check(self, model: Decoder) -> None:
        """See that it fits a model, which may be on the meta device.

        Raises:
            TensorShapeError, MissingTensorError, UnsupportedConfigError: it does not.
        """
        modules = dict(model.named_modules())
        for name, shape in _shapes(self):
            of_module = modules[name.rpartition(".")[0]].get_parameter(name.rpartition(".")[2])
            if shape != tuple(of_module.shape):
                raise TensorShapeError(
                    f"{self.where}: the adapter's {name} is of another shape than the base's",
                    got=str(shape),
                    expected=str(tuple(of_module.shape)),
                    fix=f"check that it was trained on this base; where tokens were added to the vocabulary, {MERGE}",
                )
        for name in self.products:
            if not isinstance(modules[name.rpartition(".")[0]], Linear):
                raise _unsupported(self.where, name, "products of the model")
        for name in self.left_out:
            if EXPERTS not in name and isinstance(modules[name.rpartition(".")[0]], Linear):
                raise MissingTensorError(
                    f"{self.where}: the adapter is not whole",
                    got=f"nothing for {name}, which its target_modules name",
                    expected="lora_A and lora_B of every module that the config targets",
                    fix="check that adapter_config.json belongs to these weights, and fetch both again",
                )


def fitted(source: AdapterSource, table: WeightTable) -> Adapter:
    """An adapter's tensors, as what they are to our parameters.

    Args:
        table: of the base, with an unembedding of its own.

    Raises:
        UnsupportedConfigError: it does what lenskit does not compute.
        MissingTensorError, UnknownTensorError, TensorShapeError, CorruptCheckpointError: it is damaged, or no adapter
            of such a model.
    """
    where, config = source.where, LoraConfig.read(source)
    files = TensorFiles(source.folder, stem="adapter_model", pickled="adapter_model.bin")
    factors, saved = _sorted(files, where)
    bare = not any(name.startswith(table.prefix) for name in (*factors, *saved))
    on_disk = _on_disk(table, bare=bare)
    products: dict[str, LowRank] = {}
    for module, pair in factors.items():
        a, b = (files.mapped(name) for name in pair)
        if not config.targets(module):
            raise UnknownTensorError(
                f"{where}: the adapter has more than its config says",
                got=f"a product beside {module}",
                expected=f"modules that its target_modules name: {str(config.target_modules)[:100]}",
                fix="check that adapter_config.json belongs to these weights",
            )
        config.check_rank(module, a.shape, b.shape, where=where)
        placement = on_disk.get(f"{module}.weight")
        if placement is None or not placement.rule.by_rows or any(EXPERTS in name for name in placement.ours):
            raise _unsupported(where, module, "modules that are products of the base, outside of its experts")
        parts = zip(placement.ours, placement.rule.split_rows(b), strict=True)
        products |= {name: LowRank(a, part, config.scale(module)) for name, part in parts}
    targeted = [p for name, p in on_disk.items() if p.rule.by_rows and config.targets(name.removesuffix(".weight"))]
    left_out = {name for placement in targeted for name in placement.ours} - products.keys()
    return Adapter(where, products, _replaced(files, saved, config, on_disk, where), left_out)


def install(model: Decoder, adapter: Adapter) -> None:
    """Put an adapter's products beside the model's own, without their numbers."""
    for name, product in adapter.products.items():
        linear = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(linear, Linear)
        adapt(linear, rank=len(product.a), scale=product.scale)
    model.name_modules()


def give_products(model: Decoder, adapter: Adapter) -> None:
    """The numbers of the products that were installed, in the dtypes and on the devices of the weights beside them."""
    for name, product in adapter.products.items():
        linear = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(linear, AdaptedLinear)
        like = linear.weight
        linear.lora_A = nn.Parameter(product.a.to(like.device, like.dtype, copy=True))
        linear.lora_B = nn.Parameter(product.b.to(like.device, like.dtype, copy=True))


def merged_parameter(model: Decoder, name: str) -> Tensor:
    """A model's parameter, with what an adapter beside it adds."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = module.get_parameter(attribute).detach()
    if isinstance(module, AdaptedLinear) and attribute == "weight":
        return LowRank(module.lora_A.detach(), module.lora_B.detach(), module.scale).added_to(parameter)
    return parameter


def _sorted(files: TensorFiles, where: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Names in the file: of modules' two factors, and of the tensors that replace others, by those tensors' names."""
    factors: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name in sorted(files.files):
        path = name.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", path)
        if path == name or (factor is None and ".lora_" in path):
            raise UnsupportedConfigError(
                f"{where}: the adapter has tensors that lenskit does not compute with",
                got=name,
                expected=f"{PREFIX}<module>.lora_A.weight, .lora_B.weight, or a weight of modules_to_save; no LoRA on "
                "embeddings, no DoRA, no biases",
                fix=MERGE,
            )
        if factor is None:
            saved[path.replace(".base_layer.", ".")] = name  # PEFT saves the base's unembedding with its own products
        else:
            factors.setdefault(factor[1], {})[factor[2]] = name
    for module, pair in factors.items():
        if len(pair) < 2:
            raise MissingTensorError(
                f"{where}: the adapter is not whole",
                got=f"only lora_{next(iter(pair))} of {module}",
                expected="lora_A and lora_B of every module",
                fix="fetch its weights again",
            )
    return {module: [pair["A"], pair["B"]] for module, pair in factors.items()}, saved


def _on_disk(table: WeightTable, *, bare: bool) -> dict[str, Placement]:
    """What reads each tensor on disk, in the layout that is written and in the others."""
    tables = [table, *(replace(table, rules=rules, others=()) for rules in table.others)]
    found: dict[str, Placement] = {}
    for placement in (placement for one in tables for placement in one.placements()):
        names = tuple(name.removeprefix(table.prefix) if bare else name for name in placement.on_disk)
        for name in names:
            found.setdefault(name, Placement(placement.rule, names, placement.ours))
    return found


def _replaced(
    files: TensorFiles, saved: Mapping[str, str], config: LoraConfig, on_disk: Mapping[str, Placement], where: str
) -> dict[str, Tensor]:
    """The parameters that the adapter has whole."""
    unknown = sorted(saved.keys() - on_disk.keys())
    if unknown:
        raise UnknownTensorError(
            f"{where}: the adapter replaces a tensor that the base does not have",
            got=unknown[0],
            expected="tensors of a language model; the heads of other tasks are none",
            fix=f"check that it was trained on this base; else {MERGE}",
        )
    found: dict[str, Tensor] = {}
    wanted = {name for name in on_disk if config.saves(name) and not isinstance(on_disk[name].rule, Drop)}
    for placement in {on_disk[name].on_disk: on_disk[name] for name in sorted(wanted | saved.keys())}.values():
        absent = [name for name in placement.on_disk if name not in saved]
        if absent:
            raise MissingTensorError(
                f"{where}: the adapter is not whole",
                got=f"no {absent[0]}",
                expected="every tensor of the modules that its modules_to_save name",
                fix="fetch its weights again",
            )
        tensors = placement.rule.load([files.mapped(saved[name]) for name in placement.on_disk])
        found |= dict(zip(placement.ours, tensors, strict=True))
    return found


def _shapes(adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((name, product.shape) for name, product in adapter.products.items())
    yield from ((name, tuple(tensor.shape)) for name, tensor in adapter.saved.items())


def _unsupported(where: str, module: str, expected: str) -> UnsupportedConfigError:
    return UnsupportedConfigError(
        f"{where}: the adapter is for what lenskit does not adapt",
        got=f"a product beside {module}",
        expected=expected,
        fix=f"check that it was trained on this base; else {MERGE}",
    )
