"""What a model looks like: its shape, by name or from a Hugging Face folder's ``config.json``; needs no torch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama-family decoder. Names are those of a Hugging Face ``config.json``.

    ``dtype`` is the one its weights were saved in. ``eos_token_ids``: any of them ends a request (Llama 3 has
    several).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int  # tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")


NAMED = {
    "tiny-llama": ModelConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2048,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
}


def load_config(name_or_folder: str | Path) -> ModelConfig:
    """The named configuration, or that of a folder with a ``config.json`` of the Llama family.

    Raises ValueError, in one line, for a name nobody knows, a file that can't be read and a model that the engine
    can't run.
    """
    if (named := NAMED.get(str(name_or_folder))) is not None:
        return named
    path = Path(name_or_folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"model {str(name_or_folder)!r}: neither one of {', '.join(sorted(NAMED))} nor a folder with a readable "
            f"config.json ({error.strerror}); give one of these"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download the model again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object; download the model again")
    return _from_hugging_face(raw, path)


def random_prompt(config: ModelConfig, tokens: int, seed: int) -> list[int]:
    """``tokens`` token ids drawn uniformly from the vocabulary without its ends of text; the same for the same seed."""
    draw = random.Random(seed)
    allowed = [token for token in range(config.vocab_size) if token not in config.eos_token_ids]
    return draw.choices(allowed, k=tokens)


def _from_hugging_face(raw: Mapping[str, object], path: Path) -> ModelConfig:
    architectures = raw.get("architectures") or [raw.get("model_type")]
    if architectures not in (["LlamaForCausalLM"], ["llama"]):
        raise ValueError(f"{path}: architecture {architectures} is not supported; use a LlamaForCausalLM model")
    # transformers 5 writes ``rope_parameters`` where earlier ones wrote ``rope_theta`` and ``rope_scaling``.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rope scaling {rope} is not supported; use a model with plain rotary positions")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is not supported; use a model that rotates whole heads")
    for name, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if raw.get(name, only) != only:
            raise ValueError(f"{path}: {name}={raw[name]!r} is not supported; use a model with {name}={only!r}")

    def whole(name: str, default: int | None = None) -> int:
        value = raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{path}: {name} must be a whole number, not {value!r}")
        return value

    def number(name: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{path}: {name} must be a number, not {value!r}")
        return float(value)

    heads, hidden_size = whole("num_attention_heads"), whole("hidden_size")
    eos = raw.get("eos_token_id")
    given: list[object] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ends = tuple(end for end in given if isinstance(end, int))
    if len(ends) != len(given):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {eos!r}")
    try:
        return ModelConfig(
            hidden_size=hidden_size,
            intermediate_size=whole("intermediate_size"),
            num_hidden_layers=whole("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=whole("num_key_value_heads", heads),
            head_dim=whole("head_dim", hidden_size // max(heads, 1)),
            vocab_size=whole("vocab_size"),
            max_position_embeddings=whole("max_position_embeddings", 2048),
            rms_norm_eps=number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            rope_theta=number("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            tie_word_embeddings=raw.get("tie_word_embeddings", False) is True,
            eos_token_ids=ends,
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
