"""Linear layers whose `reset_parameters` is that of the module they are part of.

So the modules of a model may be reset in any order, parents before their children or after them.
"""

import torch
from torch import nn


class BiasedLinear(nn.Linear):
    """A linear layer that starts with one number as its bias.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        initial_bias: the initial value of every element of the bias. Default: 0.
        zero_weights: whether the weights start at zero, so that the layer starts as a constant.
            Default: False, those of `torch.nn.Linear`.
        device, dtype: of the parameters, as in `torch.nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        initial_bias: float = 0.0,
        zero_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.initial_bias, self.zero_weights = initial_bias, zero_weights
        super().__init__(in_features, out_features, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws or zeroes the weights, and sets the bias."""
        super().reset_parameters()
        if self.zero_weights:
            nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)


class XavierLinear(nn.Linear):
    """A linear layer that starts with Xavier-uniform weights and zero biases.

    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks"
    (2010).
    """

    def reset_parameters(self) -> None:
        """Draws the weights and zeroes the bias."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def reset_children(module: nn.Module) -> None:
    """Resets the parameters of the direct children that can be reset."""
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if reset is not None:
            reset()
