"""Products with a weight that never changes: packed once for oneDNN where it can be, for the layers of ``llama``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """``inputs @ weight.T`` for a weight [outputs, inputs], then SiLU if ``silu``.

    oneDNN reorders a plain bfloat16 weight in each call; packed, with SiLU fused, an MLP's way in took 30% less time
    here. The operators are those that torch.compile uses, so they are not public: without them, or in float32, this
    is ``torch.nn.functional.linear``.
    """

    def __init__(self, weight: Tensor, silu: bool = False) -> None:
        self._silu = silu
        self._weight = weight
        self._packed = (
            weight.dtype is torch.bfloat16
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._packed:
            kind = "swish" if self._silu else "none"
            product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, None, kind, [], "")
            return product
        product = F.linear(inputs, self._weight)
        return F.silu(product, inplace=True) if self._silu else product
