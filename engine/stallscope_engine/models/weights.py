"""A Llama's parameters as the network uses them: drawn from a seed, or read from a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stallscope_engine.models.configs import ModelConfig
from stallscope_engine.models.linear import Linear

#: Reads or draws the parameter of this Hugging Face name and this shape.
Source = Callable[[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer.

    ``qkv`` stacks the query, key and value projections, so that one product makes all three. Rows of a query or key
    head are ordered so that the two halves of a rotated pair are neighbours: (0, d/2), (1, d/2 + 1), ... A pair is
    then one complex number, and the scores, being dot products, stay the same.
    """

    input_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate: Linear  # with SiLU
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters. ``head`` has the weights of ``embedding`` where the model ties them."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear


def random_weights(config: ModelConfig, dtype: torch.dtype, seed: int) -> Weights:
    """Weights drawn from a normal distribution (standard deviation 0.02, norms 1): same seed, same weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)

    return _assemble(config, dtype, draw)


def load_weights(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Weights of a Hugging Face folder: ``model.safetensors``, or shards named by ``model.safetensors.index.json``.

    Raises ValueError, in one line, where a file or a parameter is missing or has another shape.
    """
    index = folder / "model.safetensors.index.json"
    shards: dict[str, str] | None = None
    if index.exists():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{index}: not an index of weights; download the model again") from None

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        path = folder / ("model.safetensors" if shards is None else shards.get(name, "model.safetensors"))
        try:
            with safe_open(path, framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: can't read {name} ({error}); download the model again") from None
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}, but config.json says {list(shape)}")
        return tensor

    return _assemble(config, dtype, read)


def _assemble(config: ModelConfig, dtype: torch.dtype, source: Source) -> Weights:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim

    def take(name: str, *shape: int) -> Tensor:
        return source(f"{name}.weight", shape).to(dtype)

    def take_rotated(name: str, rows: int) -> Tensor:
        halves = take(name, rows, hidden).view(rows // head_dim, 2, head_dim // 2, hidden)
        return halves.transpose(1, 2).reshape(rows, hidden)

    def layer(prefix: str) -> LayerWeights:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_norm=take(f"{prefix}.input_layernorm", hidden),
            qkv=Linear(
                torch.cat(
                    (
                        take_rotated(f"{attention}.q_proj", queries),
                        take_rotated(f"{attention}.k_proj", keys),
                        take(f"{attention}.v_proj", keys, hidden),
                    )
                )
            ),
            output=Linear(take(f"{attention}.o_proj", hidden, queries)),
            mlp_norm=take(f"{prefix}.post_attention_layernorm", hidden),
            gate=Linear(take(f"{mlp}.gate_proj", intermediate, hidden), silu=True),
            up=Linear(take(f"{mlp}.up_proj", intermediate, hidden)),
            down=Linear(take(f"{mlp}.down_proj", hidden, intermediate)),
        )

    embedding = take("model.embed_tokens", config.vocab_size, hidden)
    layers = tuple(layer(f"model.layers.{number}") for number in range(config.num_hidden_layers))
    norm = take("model.norm", hidden)
    head = embedding if config.tie_word_embeddings else take("lm_head", config.vocab_size, hidden)
    return Weights(embedding, layers, norm, Linear(head))
