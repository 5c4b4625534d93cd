"""The next tokens on the device: the likeliest, or drawn by numbers that only a request's seed and position decide."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
_WORD = 2**64 - 1


def draw_chances(seeds: list[int], indices: list[int]) -> npt.NDArray[np.uint32]:
    """A uint32 for the ``indices``-th output of a request with each seed: the same for the same two, else unrelated.

    Steele et al., "Fast splittable pseudorandom number generators" (OOPSLA 2014), SplitMix64's mixer, twice.
    """
    mixed = _mix(np.array([seed & _WORD for seed in seeds], dtype=np.uint64))
    words = _mix(mixed + np.array(indices, dtype=np.uint64))
    return (words >> np.uint64(32)).astype(np.uint32)


def sample(logits: Tensor, temperatures: Tensor | None, chances: Tensor) -> Tensor:
    """Token ids [rows] of ``logits`` [rows, vocabulary]: greedy where the temperature is 0, and without any.

    ``chances`` [rows] are the bits of ``draw_chances``: what share of the probability lies below the drawn token.
    """
    likeliest = logits.argmax(-1)
    if temperatures is None:
        return likeliest
    draws = temperatures > 0
    heat = torch.where(draws, temperatures, 1.0)[:, None]
    below = torch.softmax(logits.float() / heat, -1).cumsum(-1, dtype=torch.float64)
    share = ((chances.long() & 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    drawn = torch.searchsorted(below, share[:, None] * below[:, -1:], right=True)[:, 0]
    return torch.where(draws, drawn.clamp_(max=logits.shape[1] - 1), likeliest)


def _mix(words: Words) -> Words:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
