"""Model configurations: the named ones, those of Hugging Face folders, and what is said about the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stallscope_engine.models.configs import NAMED, ModelConfig, RopeScaling, load_config, random_prompt

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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
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


@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_needs_no_folder(name: str) -> None:
    assert load_config(name) is NAMED[name]


def parameters(config: ModelConfig) -> int:
    """As a model card counts them: a tied embedding once."""
    heads, hidden = config.num_attention_heads + config.num_key_value_heads, config.hidden_size
    attention = 2 * heads * config.head_dim * hidden
    norms = 2 * hidden + (2 * config.head_dim if config.qk_norm else 0)
    layer = attention + 3 * hidden * config.intermediate_size + norms
    vocabularies = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + vocabularies * config.vocab_size * hidden + hidden


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_named_shapes_have_as_many_parameters_as_their_published_weights(name: str, published: int) -> None:
    assert parameters(NAMED[name]) == published


def test_a_folder_of_hugging_face_is_read(tmp_path: Path) -> None:
    assert load_config(write(tmp_path)) == EXPECTED


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ({"rope_scaling": LLAMA3_ROPE}, {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}),
        (
            {"rope_theta": None, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)},
        ),
        ({"num_key_value_heads": 2, "head_dim": 32}, {"num_key_value_heads": 2, "head_dim": 32}),
        ({"eos_token_id": [7, 9]}, {"eos_token_ids": (7, 9)}),
        ({"eos_token_id": None}, {"eos_token_ids": ()}),
        ({"torch_dtype": None, "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"architectures": None, "model_type": "llama"}, {}),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}, {"qkv_bias": True}),
        (
            {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "layer_types": ["full_attention"] * 3},
            {"qk_norm": True, "head_dim": 32},
        ),
    ],
)
def test_what_versions_of_transformers_write_differently_is_read_alike(
    tmp_path: Path, changes: dict[str, object], expected: dict[str, float]
) -> None:
    assert load_config(write(tmp_path, **changes)) == replace(EXPECTED, **expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architecture \['GPT2LMHeadModel'\] .*; use one of LlamaForCausalLM, .*",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a number, not None"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1}}, "rope scaling needs .* low_freq_factor < high"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported; .* or 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": "yarn"}, "rope type 'yarn' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights are not supported; use .* bfloat16"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding windows are not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows are not supported"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "head_dim must be a whole number, not None"),
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


def test_the_ends_of_text_that_generation_stops_at_come_before_those_of_the_network(tmp_path: Path) -> None:
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 9]}', encoding="utf-8")
    assert load_config(write(tmp_path)) == replace(EXPECTED, eos_token_ids=(7, 9))
    generation.write_text('{"temperature": 0.6}', encoding="utf-8")
    assert load_config(write(tmp_path)) == EXPECTED
    generation.write_text('{"eos_token_id": "</s>"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id"):
        load_config(write(tmp_path))


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


def test_an_unknown_name_says_which_are_known() -> None:
    with pytest.raises(ValueError, match=r"'tiny-lama': neither one of llama-1b, .*, tiny-qwen3 nor a folder"):
        load_config("tiny-lama")


def test_random_prompts_repeat_for_a_seed_and_never_end_the_text() -> None:
    prompt = random_prompt(EXPECTED, 5000, seed=3)
    assert prompt == random_prompt(EXPECTED, 5000, seed=3)
    assert prompt != random_prompt(EXPECTED, 5000, seed=4)
    assert set(prompt) == set(range(100)) - {7}
