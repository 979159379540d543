"""What a detector is trained on: all its layers' predictions beside what is there."""

import torch
from torch import Tensor, nn

from .._utils.checks import refuse
from .detector import DetectorOutput
from .losses import DetectionLoss, mean_objects
from .matching import HungarianMatcher, Matches, assign_inside
from .targets import Targets


class SetCriterion(nn.Module):
    """Every decoder layer matched one to one, the selection one to many.

    One to one, an object is to be found once (Carion et al., 2020), and each layer is matched anew.
    Candidates for queries are trained otherwise: every one inside an object's box is to find it,
    since to tell which of many equals is the one is what self-attention is for.

    Args:
        matcher: which query is to find which object.
        loss: of predictions and matches.
        candidate_loss: the same for candidates; None: ``loss``.

    Losses are divided by the number of objects, candidates' by the number of those inside boxes,
    both averaged over the processes that train together.
    """

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        loss: DetectionLoss | None = None,
        candidate_loss: DetectionLoss | None = None,
    ) -> None:
        super().__init__()
        self.matcher = HungarianMatcher() if matcher is None else matcher
        self.loss = DetectionLoss() if loss is None else loss
        self.candidate_loss = self.loss if candidate_loss is None else candidate_loss

    def forward(self, output: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses by name, whose sum is to be minimised.

        Args:
            output: of a `Detector`.
            targets: what is there, in the same units.

        Raises:
            ValueError: targets that cannot be, predictions that are not finite, named.
        """
        if not isinstance(output, DetectorOutput):
            refuse("output", "a DetectorOutput", output)
        candidates, device = output.selection.candidates, output.layers[0].logits.device
        found = assign_inside(output.selection.positions, candidates.offsets, targets)
        inside = Matches.inside(found)
        n_objects = mean_objects(len(targets.labels), device)
        n_inside = mean_objects(len(inside.prediction), device)
        parts = {"candidates": self.candidate_loss(candidates, targets, inside, n_inside)}
        for index, predictions in enumerate(output.layers):
            matches = self.matcher(predictions, targets)
            parts[f"layer {index}"] = self.loss(predictions, targets, matches, n_objects)
        if output.denoised is not None:
            layers, matches = output.denoised
            n_noisy = mean_objects(len(matches.target), device)
            for index, predictions in enumerate(layers):
                losses = self.loss(predictions, targets, matches, n_noisy)
                parts[f"denoising {index}"] = losses
        return {
            f"{stage} {name}": value
            for stage, losses in parts.items()
            for name, value in losses._asdict().items()
        }


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of all losses."""
    return torch.stack(list(losses.values())).sum()
