"""What a model needs of a device's memory, and how many KV blocks fit beside it; arithmetic, without torch."""

from __future__ import annotations

from stallscope_engine.config import EngineConfig
from stallscope_engine.models.configs import ModelConfig

#: Share of what is left over that the KV cache is given: the rest is the allocator's, the libraries' and the graphs'.
KV_SHARE = 0.92


def weight_bytes(model: ModelConfig, item_bytes: int) -> int:
    """Bytes of the parameters that products need; norms and biases are too small to count."""
    attention = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    layer = model.hidden_size * (attention + 3 * model.intermediate_size)
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return (layer * model.num_hidden_layers + embeddings) * item_bytes


def block_bytes(block_size: int, model: ModelConfig, item_bytes: int) -> int:
    """Bytes of one KV block: keys and values of all layers."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * block_size * item_bytes


def activation_bytes(config: EngineConfig, model: ModelConfig, item_bytes: int) -> int:
    """Bytes that the largest step needs at once, from above: a layer's intermediates, and logits with what draws."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    row = 4 * model.hidden_size + 3 * model.intermediate_size + 6 * heads * model.head_dim
    drawing = 24  # per logit: float32 probabilities, float64 sums, and their copies
    logits = config.max_num_seqs * model.vocab_size * (2 * item_bytes + drawing)
    return config.max_num_batched_tokens * row * item_bytes + logits


def fitting_blocks(config: EngineConfig, model: ModelConfig, free_bytes: int, item_bytes: int) -> int:
    """KV blocks that fit into what is free after the weights, beside the largest step."""
    room = free_bytes - activation_bytes(config, model, item_bytes)
    return max(int(room * KV_SHARE) // block_bytes(config.block_size, model, item_bytes) - 1, 0)  # one is spare
