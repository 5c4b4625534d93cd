"""Rotary positions: the frequency at which each pair of a head turns, for every executor's decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stallscope_engine.models.configs import ModelConfig


def frequencies(config: ModelConfig) -> Tensor:
    """Radians a token of each rotated pair [head_dim / 2], in float32 on the CPU.

    "RoFormer" (arXiv 2104.09864), with ``config.rope_scaling`` as "The Llama 3 Herd of Models" (arXiv 2407.21783)
    published it in code.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # over the context it was trained on
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(plain / scaling.factor, plain, kept.clamp_(0.0, 1.0))
