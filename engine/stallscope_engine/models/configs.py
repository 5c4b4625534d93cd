"""What a model looks like: its shape, by name or from a Hugging Face folder's ``config.json``; needs no torch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

#: The families that the engine runs, and what sets each apart from Llama.
FAMILIES: dict[str, dict[str, bool]] = {"Llama": {}, "Qwen2": {"qkv_bias": True}, "Qwen3": {"qk_norm": True}}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How Llama 3.1 and later stretch rotary positions past what they were trained on (``rope_type: llama3``).

    Wavelengths above ``original_max_position_embeddings / low_freq_factor`` (tokens) grow by ``factor``, those below
    ``original_max_position_embeddings / high_freq_factor`` stay, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float  # tokens

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope scaling needs factor >= 1 and 0 < low_freq_factor < high_freq_factor, not {self.factor}, "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder of the Llama, Qwen2 or Qwen3 family. Names are those of a Hugging Face ``config.json``.

    ``qk_norm``: each query and key head is normalised before it is rotated. ``qkv_bias``: those projections have a
    bias. ``dtype`` is the one its weights were saved in. ``eos_token_ids``: any of them ends a request (Llama 3 has
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
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
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


_TINY = ModelConfig(
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
_LLAMA_8B = ModelConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    eos_token_ids=(128001, 128008, 128009),
)
_QWEN3_8B = ModelConfig(
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    qk_norm=True,
    eos_token_ids=(151645, 151643),
)

#: Shapes that need no folder: two small ones for a CPU, and published ones (Llama 3.2 1B, Llama 3.1 8B, Qwen3).
NAMED = {
    "tiny-llama": _TINY,
    "tiny-qwen3": replace(_TINY, head_dim=128, rms_norm_eps=1e-6, rope_theta=1000000.0, qk_norm=True),
    "llama-1b": replace(
        _LLAMA_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        tie_word_embeddings=True,
    ),
    "llama-8b": _LLAMA_8B,
    "qwen3-0.6b": replace(
        _QWEN3_8B,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": _QWEN3_8B,
}


def load_config(name_or_folder: str | Path) -> ModelConfig:
    """The named configuration, or that of a Hugging Face folder with a model of one of ``FAMILIES``.

    Where ``generation_config.json`` names ends of text, they count, as they do for transformers and vLLM: it is the
    one that a chat model's makers keep complete. Raises ValueError, in one line, for a name nobody knows, a file that
    can't be read and a model that the engine can't run.
    """
    if (named := NAMED.get(str(name_or_folder))) is not None:
        return named
    path = Path(name_or_folder) / "config.json"
    try:
        raw = read_json(path)
    except OSError as error:
        raise ValueError(
            f"model {str(name_or_folder)!r}: neither one of {', '.join(sorted(NAMED))} nor a folder with a readable "
            f"config.json ({error.strerror}); give one of these"
        ) from None
    config = _from_hugging_face(_Reader(path, raw))
    generation = path.with_name("generation_config.json")
    if generation.is_file():
        ends = _Reader(generation, read_json(generation)).token_ids("eos_token_id")
        config = replace(config, eos_token_ids=ends or config.eos_token_ids)
    return config


def random_prompt(config: ModelConfig, tokens: int, seed: int) -> list[int]:
    """``tokens`` token ids drawn uniformly from the vocabulary without its ends of text; the same for the same seed."""
    draw = random.Random(seed)
    allowed = [token for token in range(config.vocab_size) if token not in config.eos_token_ids]
    return draw.choices(allowed, k=tokens)


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a model's file. Raises OSError, and ValueError in one line where it holds something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download the model again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object; download the model again")
    return raw


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed values of one JSON object; what has another type is a ValueError that names the file."""

    path: Path
    raw: Mapping[str, object]

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{self.path}: {name} must be a whole number, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{self.path}: {name} must be a number, not {value!r}")
        return float(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self.raw.get(name)
        given: list[object] = value if isinstance(value, list) else [] if value is None else [value]
        ids = tuple(one for one in given if isinstance(one, int) and not isinstance(one, bool))
        if len(ids) != len(given):
            raise ValueError(f"{self.path}: {name} must be a token id or a list of them, not {value!r}")
        return ids


def _from_hugging_face(reader: _Reader) -> ModelConfig:
    raw, path = reader.raw, reader.path
    family = _family_of(reader)
    _refuse_what_the_engine_lacks(reader)
    # transformers 5 writes ``rope_parameters`` where earlier ones wrote ``rope_theta`` and ``rope_scaling``.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    heads, hidden_size = reader.whole("num_attention_heads"), reader.whole("hidden_size")
    # Qwen3's heads are no share of its hidden size, so there is nothing to guess from.
    head_dim = None if family == "Qwen3" else hidden_size // max(heads, 1)
    try:
        scaling, theta = _rope_of(_Reader(path, rope if isinstance(rope, dict) else {"rope_type": rope}))
        return ModelConfig(
            hidden_size=hidden_size,
            intermediate_size=reader.whole("intermediate_size"),
            num_hidden_layers=reader.whole("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=reader.whole("num_key_value_heads", heads),
            head_dim=reader.whole("head_dim", head_dim),
            vocab_size=reader.whole("vocab_size"),
            max_position_embeddings=reader.whole("max_position_embeddings", 2048),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope_theta=reader.number("rope_theta", 10000.0) if theta is None else theta,
            rope_scaling=scaling,
            tie_word_embeddings=raw.get("tie_word_embeddings", False) is True,
            eos_token_ids=reader.token_ids("eos_token_id"),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            **FAMILIES[family],
        )
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _family_of(reader: _Reader) -> str:
    named = reader.raw.get("architectures") or [reader.raw.get("model_type")]
    for family in FAMILIES:
        if named in ([f"{family}ForCausalLM"], [family.lower()]):
            return family
    supported = ", ".join(f"{family}ForCausalLM" for family in FAMILIES)
    raise ValueError(f"{reader.path}: architecture {named} is not supported; use one of {supported}")


def _refuse_what_the_engine_lacks(reader: _Reader) -> None:
    raw, path = reader.raw, reader.path
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{path}: quantized weights are not supported; use the model in bfloat16, float16 or float32")
    layers = raw.get("layer_types") or []
    if raw.get("use_sliding_window") or not isinstance(layers, list) or {*layers} - {"full_attention"}:
        raise ValueError(f"{path}: sliding windows are not supported; use a model with full attention in all layers")
    for name, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if raw.get(name, only) != only:
            raise ValueError(f"{path}: {name}={raw[name]!r} is not supported; use a model with {name}={only!r}")


def _rope_of(rope: _Reader) -> tuple[RopeScaling | None, float | None]:
    """Scaling and base of the rotary positions, each where the object has it."""
    theta = None if rope.raw.get("rope_theta") is None else rope.number("rope_theta")
    if rope.raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{rope.path}: partial_rotary_factor is not supported; use a model that rotates whole heads")
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind == "default":
        return None, theta
    if kind != "llama3":
        raise ValueError(f"{rope.path}: rope type {kind!r} is not supported; use a model with 'default' or 'llama3'")
    scaling = {field.name: rope.number(field.name) for field in fields(RopeScaling)}
    return RopeScaling(**scaling), theta
