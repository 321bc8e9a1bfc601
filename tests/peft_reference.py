"""Adapters made by PEFT, and PEFT's own forward pass with them, which ours is compared with."""

import warnings
from pathlib import Path
from typing import Any

import torch
from parity_table import hf_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def products(hf: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that LoRA may adapt, by path: the matrices of a model, but for its experts' and its head."""
    head = hf.get_output_embeddings()
    return {n: m for n, m in hf.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def kinds(hf: PreTrainedModel) -> list[str]:
    """What these are called in a layer. Where experts are parameters, PEFT takes an MLP's names for theirs as well."""
    found = {name.rpartition(".")[2] for name in products(hf)}
    experts = any("experts.gate_up_proj" in name for name, _ in hf.named_parameters())
    return sorted(found - {"gate_proj", "up_proj", "down_proj"} if experts else found)


def make(base: Path, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter of random numbers, as PEFT saves it; settings are PEFT's, all matrices of rank 2 if there are none."""
    hf = hf_model(base, dtype=dtype)
    task = "CAUSAL_LM" if hf.can_generate() else None
    settings = {"r": 2, "lora_alpha": 3, "task_type": task, "target_modules": kinds(hf), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, of Conv1D, of patterns that fit nothing: they are meant
        return _saved(get_peft_model(hf, LoraConfig(**settings)), folder, seed)


def _saved(model: PeftModel, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "lora_" in name else 0.25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


def load(base: Path, adapter: Path, *, dtype: torch.dtype = torch.float32) -> PeftModel:
    """PEFT's model of both, the adapter beside the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(hf_model(base, dtype=dtype), adapter).eval()


@torch.no_grad()
def logits(base: Path, adapter: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """What PEFT computes."""
    return load(base, adapter, **options)(tokens, use_cache=False).logits
