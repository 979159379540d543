"""How much the parts of a cost or of a loss count."""

import math
from dataclasses import dataclass, fields

from .._utils.checks import refuse


@dataclass(frozen=True)
class Weights:
    """Weights of class, distance and overlap, and the shape of the focal loss.

    Args:
        class_weight: of the focal loss of the classes.
        l1_weight: of the distance in units of the object's size (`relative_l1`).
        giou_weight: of the GIoU.
        alpha, gamma: of the focal loss (`sigmoid_focal_loss`).

    Raises:
        ValueError: numbers that are negative or not finite, or alpha above 1.
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(Weights):
            value = getattr(self, field.name)
            largest = 1.0 if field.name == "alpha" else math.inf
            if not isinstance(value, int | float) or not 0 <= value <= largest or value == math.inf:
                refuse(field.name, f"a finite number in [0, {largest}]", value)
