"""Layers that are computed anew in the backward pass instead of stored."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def call(layer: nn.Module, *arguments: Any, again: bool) -> Any:
    """Calls a layer, if ``again`` so that the backward pass calls it once more (Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016).
    """
    if again and torch.is_grad_enabled():
        return checkpoint(layer, *arguments, use_reentrant=False)
    return layer(*arguments)
