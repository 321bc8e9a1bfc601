"""Which family is nearest to a config that none covers, and the hub ids beside each family."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from folders import told, write_hf
from transformers import AutoConfig

import lenskit as lk
from lenskit.checkpoints.nearest import ranked
from lenskit.checkpoints.well_known import WELL_KNOWN, well_known
from lenskit.errors import UnsupportedModelError
from lenskit.models.registry import MODULES

GUIDE = "docs/adding-a-model.md"
MISTRAL = {
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 1024000, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 131072,
}  # fmt: skip


def unknown(model_type: str) -> dict[str, Any]:
    """The config of a type that transformers has, with its defaults."""
    return AutoConfig.for_model(model_type).to_dict()


def nearest(config: dict[str, Any]) -> str:
    return ranked(config)[0].model_type


def either(first: str, *others: str) -> str:
    """The first of these that lenskit has."""
    return next(model_type for model_type in (first, *others) if model_type in MODULES)


# -- the measure


@pytest.mark.parametrize("model_type", MODULES)
def test_a_family_is_nearest_to_itself(model_type: str) -> None:
    """By attributes alone, whatever it is called; where two families have the same attributes, either."""
    near = ranked({**unknown(model_type), "model_type": "zzz", "architectures": ["Zzz"]})
    alike = {family.model_type for family in near if family.nearness == near[0].nearness}
    assert model_type in alike
    assert near[0].lacking == []


def test_a_renamed_mistral_is_a_mistral() -> None:
    assert nearest({**MISTRAL, "model_type": "mistral_nemo", "architectures": ["MistralNemoForCausalLM"]}) == "mistral"
    assert nearest({**MISTRAL, "model_type": "zephyrus"}) == "mistral"  # by its attributes
    assert nearest({"model_type": "my-mistral-v9", "hidden_size": 3}) == "mistral"  # by its name
    assert nearest({"architectures": ["MyMistralForCausalLM"], "hidden_size": 3}) == "mistral"  # by its class


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen3_next", either("qwen2_moe", "qwen3")),  # has its shared experts
        ("llama4", "llama"),  # whose text model is a part of the config
        ("granitemoe", "granite"),
        ("xglm", "opt"),  # by ffn_dim and layerdrop
        ("codegen", "gptj"),
        ("olmo3", "olmo2"),
        ("vaultgemma", "gemma2"),
        ("gpt_bigcode", "gpt2"),
        ("deepseek_v2", either("deepseek_v3", "llama")),
        ("minimax", "mixtral"),
        ("roberta", either("bert", "phi")),
    ],
)
def test_published_architectures(model_type: str, expected: str) -> None:
    assert nearest(unknown(model_type)) == expected


def test_old_names_of_rotary_attributes_are_the_new_ones() -> None:
    old, new = {"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6}}
    plain = {name: value for name, value in MISTRAL.items() if name != "rope_theta"}
    assert ranked({**plain, **old}) == ranked({**plain, **new})
    assert ranked({**plain, "rope_scaling": {"factor": 2.0}}) == ranked({**plain, **new})


def test_what_is_rare_counts_for_more_than_what_all_have() -> None:
    common = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9, "hidden_act": "relu"}
    assert nearest({**common, "residual_multiplier": 0.2}) == "granite"
    assert nearest({**common, "norm_eps": 1e-5, "clip_qkv": 8.0}) == "olmo"


def test_training_attributes_do_not_count() -> None:
    assert ranked({**MISTRAL, "use_cache": False, "attention_dropout": 0.1}) == ranked(MISTRAL)


def test_attributes_that_no_family_has_do_not_make_a_config_farther() -> None:
    more = ranked({**MISTRAL, **{f"gate_{i}": i for i in range(50)}, "asks_for_nothing": None})
    assert [family.nearness for family in more] == [family.nearness for family in ranked(MISTRAL)]
    assert more[0].lacking == sorted(f"gate_{i}" for i in range(50))


# -- what a user sees


def refused(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(told(UnsupportedModelError, folder, f"{folder}/config.json", GUIDE))


def test_an_unknown_type_is_told_its_nearest_family_and_what_that_does_not_read(tmp_path: Path) -> None:
    message = refused(tmp_path, {**MISTRAL, "model_type": "mistral_nemo", "nemo_gate": 3})
    assert "no architecture family for model_type 'mistral_nemo'" in message
    assert "the nearest family is mistral, which does not read nemo_gate" in message
    assert "the nearest family is granite, which does not read num_experts_per_tok, num_local_experts" in refused(
        tmp_path, {key: value for key, value in unknown("granitemoe").items() if key != "dtype"}
    )


def test_what_is_far_from_all_is_said_to_be(tmp_path: Path) -> None:
    message = refused(tmp_path, {"model_type": "mamba", "d_state": 16, "d_conv": 4, "expand": 2, "vocab_size": 9})
    assert "no family is near it" in message
    assert "the nearest" not in message


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    assert "gate_4 and 5 more" in refused(
        tmp_path, {**MISTRAL, "model_type": "x", **{f"gate_{i}": i for i in range(10)}}
    )


def test_a_config_without_a_type_is_told_what_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL, "architectures": ["MistralForCausalLM"]}))
    told(UnsupportedModelError, tmp_path, "has no model_type", "the nearest family is mistral")


def test_a_manifest_of_a_family_that_is_not_there_any_more(tmp_path: Path) -> None:
    converted = lk.convert(write_hf(tmp_path / "hf", "mistral"), tmp_path / "ours")
    manifest = json.loads((converted / "lenskit.json").read_text())
    (converted / "lenskit.json").write_text(json.dumps({**manifest, "model_type": "mistral_nemo"}))
    told(UnsupportedModelError, converted, "'mistral_nemo'", "the nearest family is mistral\n")


# -- well-known checkpoints


@pytest.mark.parametrize("model_type", MODULES)
def test_every_family_has_well_known_checkpoints(model_type: str) -> None:
    assert well_known(model_type), "add a row to lenskit/checkpoints/well_known.py"


def test_they_are_hub_ids_each_once_in_order() -> None:
    ids = [hub_id for model_type in WELL_KNOWN for hub_id in well_known(model_type)]
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", hub_id) for hub_id in ids)
    assert len(set(ids)) == len(ids)
    assert list(WELL_KNOWN) == sorted(WELL_KNOWN)
    assert well_known("no such family") == []
