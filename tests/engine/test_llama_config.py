"""Model configurations: the named ones, those of Hugging Face folders, and what is said about the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stallscope_engine.models.configs import NAMED, ModelConfig, load_config, random_prompt

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "torch_dtype": "float16",
    "eos_token_id": 7,
}
EXPECTED = ModelConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=100,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    eos_token_ids=(7,),
    dtype="float16",
)


def write(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes), encoding="utf-8")
    return folder


def test_tiny_llama_is_known_by_name() -> None:
    assert load_config("tiny-llama") is NAMED["tiny-llama"]


def test_a_folder_of_hugging_face_is_read(tmp_path: Path) -> None:
    assert load_config(write(tmp_path)) == EXPECTED


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ({"num_key_value_heads": 2, "head_dim": 32}, {"num_key_value_heads": 2, "head_dim": 32}),
        ({"eos_token_id": [7, 9]}, {"eos_token_ids": (7, 9)}),
        ({"eos_token_id": None}, {"eos_token_ids": ()}),
        ({"torch_dtype": None, "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ],
)
def test_what_versions_of_transformers_write_differently_is_read_alike(
    tmp_path: Path, changes: dict[str, object], expected: dict[str, float]
) -> None:
    assert load_config(write(tmp_path, **changes)) == replace(EXPECTED, **expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architecture \['GPT2LMHeadModel'\] is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling .*llama3.* is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling .*linear.* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling .*yarn.* is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, not '64'"),
        ({"vocab_size": None}, "vocab_size must be a whole number, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim must be even for rotary positions, not 15"),
        ({"rope_theta": "big"}, "rope_theta must be a number, not 'big'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them, not '</s>'"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be a token id"),
    ],
)
def test_a_model_that_the_engine_cannot_run_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path, **changes))
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


def test_an_unknown_name_says_which_are_known() -> None:
    with pytest.raises(ValueError, match="'tiny-lama': neither one of tiny-llama nor a folder"):
        load_config("tiny-lama")


def test_random_prompts_repeat_for_a_seed_and_never_end_the_text() -> None:
    prompt = random_prompt(EXPECTED, 5000, seed=3)
    assert prompt == random_prompt(EXPECTED, 5000, seed=3)
    assert prompt != random_prompt(EXPECTED, 5000, seed=4)
    assert set(prompt) == set(range(100)) - {7}
