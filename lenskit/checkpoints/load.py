"""Streaming a checkpoint into a model: everything is checked first, then tensors are placed one by one."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lenskit.checkpoints.adapters import Adapter, fitted, give_products, install
from lenskit.checkpoints.devices import Device, device_of, dispatch, places
from lenskit.checkpoints.files import TensorFiles
from lenskit.checkpoints.multimodal import MODEL_TYPES, placements, refuse_changed_logits, text_config
from lenskit.checkpoints.nearest import family_of, known, ranked, told
from lenskit.checkpoints.quantised import refuse_config, refuse_names
from lenskit.checkpoints.source import Source, read_json
from lenskit.errors import (
    ConfigError,
    InputError,
    LenskitError,
    TensorShapeError,
    UnknownTensorError,
    UnsupportedModelError,
)
from lenskit.extras import load
from lenskit.models.base import Decoder, Family
from lenskit.models.config import DecoderConfig
from lenskit.models.registry import family
from lenskit.modules.module import Module, at_least_float32
from lenskit.weights import Drop, Placement, WeightTable, weight

if TYPE_CHECKING:
    pass

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Described:
    """What a checkpoint's config says: the family, our config, and Hugging Face's as it was.

    multimodal: whether there is more on disk than the text model, which the configs describe.
    adapter: fitted to it. Where it unties the embeddings, both configs say so; tied: whether they are one on disk.
    """

    family: Family
    cfg: DecoderConfig
    hf_config: dict[str, Any]
    multimodal: bool = False
    adapter: Adapter | None = None
    tied: bool = False

    @property
    def on_disk(self) -> WeightTable:
        """The table by which the checkpoint's tensors are read."""
        return self.family.weights(replace(self.cfg, tie_embeddings=self.tied))


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors, matched to the model's parameters: every one is there and of the right shape."""

    files: TensorFiles
    placements: list[Placement]
    adapter: Adapter | None = None

    @property
    def embedding(self) -> str:
        """The name on disk of the embedding."""
        return next(p.on_disk[0] for p in self.placements if p.ours == ("embed.weight",))

    def merged(self, placement: Placement) -> list[Tensor]:
        """The parameters of a placement, with what the adapter adds to them, as they lie on disk."""
        tensors = placement.rule.load([self.files.alone(name) for name in placement.on_disk])
        if self.adapter is None:
            return list(tensors)
        return [self.adapter.merged(name, tensor) for name, tensor in zip(placement.ours, tensors, strict=True)]

    def size(self, placement: Placement) -> int:
        """How many numbers a placement reads."""
        return sum(math.prod(self.files.shape(name)) for name in placement.on_disk if placement.ours)

    def dtype(self) -> torch.dtype:
        """The one that most of the numbers are stored in."""
        numbers: Counter[torch.dtype] = Counter()
        for placement in self.placements:
            numbers[self.files.mapped(placement.on_disk[0]).dtype] += self.size(placement)
        return numbers.most_common(1)[0][0]


def describe(source: Source) -> Described:
    """Read the config.

    Raises:
        UnsupportedModelError: no family covers the model's type.
        UnsupportedConfigError: an attribute that would change the computation and is not handled.
        ConfigError: the config makes no sense.
        CheckpointError: an adapter that is not one of such a model.
    """
    where, manifest = str(source.config_file), source.manifest
    raw = read_json(source.config_file) if manifest is None else manifest
    if not isinstance(raw.get("model_type"), str):
        raise UnsupportedModelError(
            f"{where} has no model_type",
            got=f"attributes {', '.join(sorted(raw)[:8]) or 'none'}",
            expected="model_type, the name of the architecture family",
            fix=f"add it, or give the folder of a Hugging Face checkpoint; {told(ranked(raw))}",
        )
    refuse_config(raw if manifest is None else manifest["hf_config"], where=where)
    multimodal = manifest is None and raw["model_type"] in MODEL_TYPES
    if multimodal:
        raw = text_model(raw, source)
    hf_config = raw if manifest is None else manifest["hf_config"]
    found = family_of({**hf_config, "model_type": raw["model_type"]}, where=where)
    attributes = complete(raw, where=where) if manifest is None else manifest["config"]
    with _naming(where), torch.device("meta"):
        cfg = found.config.from_hf(attributes) if manifest is None else found.config.from_json(attributes)
        parts = found.parts(cfg)
        next(iter(parts.blocks), None)  # one block, to see whether the values make a model
        if multimodal:
            refuse_changed_logits(parts.unembed)
    tied = cfg.tie_embeddings
    if source.adapter is None:
        return Described(found, cfg, hf_config, multimodal, tied=tied)
    untied = replace(cfg, tie_embeddings=False)
    adapter = fitted(source.adapter, found.weights(untied))
    if tied and adapter.unties:
        cfg, hf_config = untied, {**hf_config, "tie_word_embeddings": False}
    return Described(found, cfg, hf_config, multimodal, adapter, tied)


def text_model(raw: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The config of the text model in a multi-modal one.

    Raises:
        UnsupportedModelError: no family covers it.
        ConfigError: Hugging Face refuses the config.
    """
    where = str(source.config_file)
    with _accepted(raw, where):
        text = text_config(hf_config_of(raw), source.folder)
    return {**text, "architectures": [family_of(text, where=where).hf_class]}


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Errors about a config's values name its file; whatever else the values raise is about the config too."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(
            f"{where}: {error.what}", got=error.got, expected=error.expected, fix=error.fix
        ) from error.__cause__
    except Exception as error:
        raise ConfigError(
            f"{where} describes no model",
            got=f"{type(error).__name__}: {error}",
            expected="every attribute with a value that makes sense",
            fix="correct the attribute that the message names, or fetch the file again",
        ) from error


def complete(raw: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A Hugging Face config with the class's defaults for what it leaves out.

    Raises:
        ConfigError: Hugging Face refuses it.
    """
    with _accepted(raw, where):
        config: dict[str, Any] = hf_config_of(raw).to_dict()
    return config


@contextmanager
def _accepted(raw: Mapping[str, Any], where: str) -> Iterator[None]:
    """Whatever a config class of Hugging Face's raises is about this file."""
    try:
        yield
    except LenskitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where} is refused by Hugging Face's config class",
            got=f"{type(error).__name__}: {error}",
            expected=f"a valid {raw['model_type']} config",
            fix="correct the attribute that the message names",
        ) from error


def hf_config_of(raw: Mapping[str, Any]) -> Any:
    """An instance of the config's own class."""
    # A copy: the config classes write into what they are given.
    attributes = deepcopy({key: value for key, value in raw.items() if key not in ("model_type", "_name_or_path")})
    transformers, model_type = load("transformers"), raw["model_type"]
    if known(model_type):
        return transformers.AutoConfig.for_model(model_type, **attributes)
    # A family that transformers does not have: no defaults, and only the old names of rotary embeddings are read.
    rotary = "rope_parameters" in family(model_type, where="the config").config.hf_names.values()
    fields = {"rope_parameters": None, "__annotations__": {"rope_parameters": dict | None}} if rotary else {}
    return type("Config", (transformers.PreTrainedConfig,), fields)(**attributes)


def matched(source: Source, described: Described, model: Decoder) -> Weights:
    """The source's tensors, checked against a model, which may be on the meta device.

    Raises:
        MissingTensorError, UnknownTensorError, TensorShapeError, CorruptCheckpointError: see their docstrings.
    """
    files = TensorFiles(source.folder, stem="model" if source.manifest is None else "weights")
    refuse_names(files.files, where=source.where)
    table = described.on_disk
    if source.manifest is not None:  # lenskit's own checkpoints have our names on disk
        ours = [name for placement in table.placements() for name in placement.ours]
        table = WeightTable(tuple(weight(name, name) for name in ours), n_layers=1)
    match = placements if described.multimodal else WeightTable.match
    weights = Weights(files, match(table, files.files, source.where), described.adapter)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for placement in weights.placements:
        _check_shapes(placement, files, parameters)
        _check_dtypes(placement, files)
        if described.tied and isinstance(placement.rule, Drop):
            _check_tied(placement, weights)
    if described.tied and not described.cfg.tie_embeddings:  # the unembedding begins as what it was one with
        embed = weights.embedding
        weights.placements.append(Placement(weight(embed, "unembed.weight"), (embed,), ("unembed.weight",)))
    if described.adapter is not None:
        described.adapter.check(model)
    return weights


def give_weights(
    model: Decoder,
    source: Source,
    described: Described,
    *,
    device: Device | None,
    dtype: torch.dtype | None,
    device_map: str | Mapping[str, Device] | None,
    merge: bool = True,
) -> None:
    """Give a model built on the meta device its weights; nothing is placed unless everything fits.

    A tensor that can be used as it lies on disk stays there, mapped into memory: a write to the weight does not
    reach the file, but a write to the file would reach the weight. Others are copied one at a time.

    Args:
        device: where all weights go; None for the CPU. "meta" leaves them out.
        dtype: of all weights but those that a module keeps exact; None for the one that most of the numbers on disk
            have.
        device_map: "auto", or module path prefix -> device; instead of `device`.
        merge: whether an adapter is added to the weights, or kept beside them with a hook point.

    Raises:
        InputError: a dtype, device or device map that cannot be; nothing that could be kept apart.
        CheckpointError: see `matched`.
    """
    check_dtype(dtype)
    if not merge:
        _keep_apart(model, described.adapter)
    if device_map is None and places(model, device, None)[""].type == "meta":
        if dtype is not None:
            model.to(dtype)
        return
    weights = matched(source, described, model)
    dtype = weights.dtype() if dtype is None else dtype
    devices = places(model, device, device_map, dtype)
    _place(model, weights, devices, dtype, merge=merge)
    dispatch(model, devices)


def _keep_apart(model: Decoder, adapter: Adapter | None) -> None:
    if adapter is None:
        raise InputError(
            "there is no adapter to keep apart",
            got="merge=False, and a checkpoint without an adapter",
            expected="an adapter's folder or hub id, as the checkpoint or as adapter=",
            fix="leave merge out",
        )
    adapter.check(model)
    install(model, adapter)


def _place(
    model: Decoder, weights: Weights, devices: Mapping[str, torch.device], dtype: torch.dtype, *, merge: bool
) -> None:
    adapter = weights.adapter
    # The largest first: what is copied needs room for its original too, and now there is most of it.
    for placement in sorted(weights.placements, key=weights.size, reverse=True):
        exact = any(_kept_exact(model, name) for name in placement.ours)
        own = at_least_float32(dtype) if exact else dtype
        for name, tensor in zip(placement.ours, _read(placement, weights.files, devices, own), strict=True):
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            if adapter is not None:
                tensor = adapter.merged(name, tensor) if merge else adapter.whole(name, tensor)
            module._parameters[attribute] = nn.Parameter(tensor)
    model.tie()
    if adapter is not None and not merge:
        give_products(model, adapter)


def _kept_exact(model: Decoder, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    return isinstance(module, Module) and attribute in module.kept_exact


def check_dtype(dtype: object) -> None:
    """Refuse what no model can have for its weights.

    Raises:
        InputError: no dtype of torch, or not one of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(
            "no dtype for weights",
            got=f"dtype={dtype!r}",
            expected=f"one of {', '.join(map(str, DTYPES))}, or None for what the checkpoint has",
            fix="say dtype=torch.bfloat16, for one; lenskit does not quantise",
        )


def _check_shapes(placement: Placement, files: TensorFiles, parameters: Mapping[str, nn.Parameter]) -> None:
    on_disk = [torch.empty(files.shape(name), device="meta") for name in placement.on_disk]
    try:
        shapes = [tuple(tensor.shape) for tensor in placement.rule.load(on_disk)]
    except RuntimeError:  # a rule that cannot split or transpose such a tensor at all
        shapes = []
    expected = [tuple(parameters[name].shape) for name in placement.ours]
    if shapes != expected:
        raise TensorShapeError(
            f"{files.path(placement.on_disk[0])}: {placement.on_disk[0]} has another shape than the config says",
            got=", ".join(str(tuple(tensor.shape)) for tensor in on_disk),
            expected=", ".join(
                f"what becomes {shape} as {name}" for name, shape in zip(placement.ours, expected, strict=True)
            ),
            fix="check that the config belongs to these weights",
        )


def _check_dtypes(placement: Placement, files: TensorFiles) -> None:
    for name in placement.on_disk if placement.ours else ():
        dtype = files.mapped(name).dtype
        if dtype not in DTYPES:
            raise UnknownTensorError(
                f"{files.path(name)}: {name} holds numbers that lenskit does not compute with",
                got=str(dtype),
                expected=f"one of {', '.join(map(str, DTYPES))}",
                fix="load a version of the checkpoint that is not quantised",
            )


def _check_tied(placement: Placement, weights: Weights) -> None:
    """A tensor that is left out as the embedding's copy has to be one."""
    name, embed, files = placement.on_disk[0], weights.embedding, weights.files
    if files.shape(name) == files.shape(embed) and not torch.equal(files.alone(name), files.alone(embed)):
        raise UnknownTensorError(
            f"{files.path(name)}: {name} differs from {embed}, and the config says that they are one",
            got="tie_word_embeddings=true and two different tensors",
            expected="equal tensors, or tie_word_embeddings=false",
            fix="set tie_word_embeddings to false in config.json, if the model was trained so",
        )


def _read(
    placement: Placement, files: TensorFiles, device_map: Mapping[str, torch.device], dtype: torch.dtype
) -> list[Tensor]:
    devices = [device_of(name, device_map) for name in placement.ours]
    as_it_lies = [files.mapped(name) for name in placement.on_disk]
    aligned = all(tensor.dtype == dtype and tensor.data_ptr() % tensor.itemsize == 0 for tensor in as_it_lies)
    if aligned and all(device.type == "cpu" for device in devices):
        return list(placement.rule.load(as_it_lies))
    tensors = placement.rule.load([files.copied(name, dtype) for name in placement.on_disk])
    return [tensor.to(device) for tensor, device in zip(tensors, devices, strict=True)]
