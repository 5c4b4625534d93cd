"""A decoder's parameters as the network uses them: drawn from a seed, or read from a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stallscope_engine.models.configs import ModelConfig

#: Reads or draws the parameter of this Hugging Face name and this shape, in the data type and on the device wanted.
Source = Callable[[str, tuple[int, ...]], Tensor]
LinearT = TypeVar("LinearT")
_MadeT_co = TypeVar("_MadeT_co", covariant=True)


class MakeLinear(Protocol[_MadeT_co]):
    """What an executor makes of a weight [outputs, inputs] to multiply by it, with SiLU on the product if ``silu``."""

    def __call__(self, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> _MadeT_co: ...


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[LinearT]):
    """One decoder layer.

    ``qkv`` stacks the query, key and value projections, so that one product makes all three. Rows of a query or key
    head are ordered so that the two halves of a rotated pair are neighbours: (0, d/2), (1, d/2 + 1), ... A pair is
    then one complex number, and the scores, being dot products, stay the same. ``qk_norm`` [query and key heads,
    head_dim], where the model has it, is ordered alike.
    """

    input_norm: Tensor
    qkv: LinearT
    qk_norm: Tensor | None
    output: LinearT
    mlp_norm: Tensor
    gate: LinearT  # with SiLU
    up: LinearT
    down: LinearT


@dataclass(frozen=True, slots=True)
class Weights(Generic[LinearT]):
    """All parameters. ``head`` has the weights of ``embedding`` where the model ties them."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights[LinearT], ...]
    norm: Tensor
    head: LinearT


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int,
    make_linear: MakeLinear[LinearT],
    device: torch.device | str = "cpu",
) -> Weights[LinearT]:
    """Weights drawn from a normal distribution (standard deviation 0.02; norms are 1).

    They are drawn on the device and in the data type in which they stay, so that billions take seconds on a GPU:
    the same seed gives the same weights for one data type and kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=device)
        return drawn.fill_(1.0) if name.endswith("norm.weight") else drawn.normal_(0.0, 0.02, generator=generator)

    return _assemble(config, draw, make_linear)


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    make_linear: MakeLinear[LinearT],
    device: torch.device | str = "cpu",
) -> Weights[LinearT]:
    """Weights of a Hugging Face folder: ``model.safetensors``, or shards named by ``model.safetensors.index.json``.

    Each goes to the device before the next is read. Raises ValueError, in one line, where a file or a parameter is
    missing or has another shape.
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
        return tensor.to(device, dtype)

    return _assemble(config, read, make_linear)


def _assemble(config: ModelConfig, source: Source, make_linear: MakeLinear[LinearT]) -> Weights[LinearT]:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * head_dim, kv_heads * head_dim

    def take(name: str, *shape: int) -> Tensor:
        return source(f"{name}.weight", shape)

    def qkv(attention: str) -> LinearT:
        q, k, v = (f"{attention}.{name}_proj" for name in "qkv")
        weights = (
            _pair(take(q, queries, hidden), head_dim),
            _pair(take(k, keys, hidden), head_dim),
            take(v, keys, hidden),
        )
        if not config.qkv_bias:
            return make_linear(torch.cat(weights))
        biases = (
            _pair(source(f"{q}.bias", (queries,)), head_dim),
            _pair(source(f"{k}.bias", (keys,)), head_dim),
            source(f"{v}.bias", (keys,)),
        )
        return make_linear(torch.cat(weights), torch.cat(biases))

    def qk_norm(attention: str) -> Tensor:
        query, key = (_pair(take(f"{attention}.{name}_norm", head_dim), head_dim) for name in "qk")
        return torch.cat((query.expand(heads, -1), key.expand(kv_heads, -1)))

    def layer(prefix: str) -> LayerWeights[LinearT]:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_norm=take(f"{prefix}.input_layernorm", hidden),
            qkv=qkv(attention),
            qk_norm=qk_norm(attention) if config.qk_norm else None,
            output=make_linear(take(f"{attention}.o_proj", hidden, queries)),
            mlp_norm=take(f"{prefix}.post_attention_layernorm", hidden),
            gate=make_linear(take(f"{mlp}.gate_proj", intermediate, hidden), silu=True),
            up=make_linear(take(f"{mlp}.up_proj", intermediate, hidden)),
            down=make_linear(take(f"{mlp}.down_proj", hidden, intermediate)),
        )

    embedding = take("model.embed_tokens", config.vocab_size, hidden)
    layers = tuple(layer(f"model.layers.{number}") for number in range(config.num_hidden_layers))
    norm = take("model.norm", hidden)
    head = embedding if config.tie_word_embeddings else take("lm_head", config.vocab_size, hidden)
    return Weights(embedding, layers, norm, make_linear(head))


def _pair(rows: Tensor, head_dim: int) -> Tensor:
    """``rows`` [heads * head_dim, ...] with the two halves of each rotated pair as neighbours."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
