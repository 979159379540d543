"""A picture of canvases with true boxes, detections and the points they attended to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from examples.digits.model import STRIDES
from examples.digits.scenes import Batch
from vicinal import FeaturePyramid
from vicinal.detr import boxes_to_corners, pairwise_iou
from vicinal.visualize import AttentionRecord, draw_overview

TRUE, DETECTED, MISSED = "#2b303b", "#0072b2", "#b3243c"
MIN_IOU = 0.5  # of a detection with a digit that counts as found
COLUMNS, PANEL = 2, 9.0  # panels per row, and their width and height in inches
LEGEND = (
    Patch(fill=False, edgecolor=TRUE, linestyle="--", label="true box"),
    Patch(fill=False, edgecolor=MISSED, linestyle="--", label="true box, not found"),
    Patch(fill=False, edgecolor=DETECTED, linewidth=1.6, label="detection: digit and score"),
    Line2D(
        [],
        [],
        marker="o",
        color=DETECTED,
        linestyle="none",
        label="attended point, sized by weight",
    ),
)


def draw_detections(
    batch: Batch, pyramid: FeaturePyramid, records: Sequence[AttentionRecord]
) -> Figure:
    """Draws one canvas per record.

    Args:
        batch: the canvases.
        pyramid: the points of the same images that the detections attended to.
        records: the detections of an image each: boxes in cells of the pyramid's full shape, digits
            as labels, and attention weights.
    """
    rows = -(-len(records) // COLUMNS)
    figure = Figure(figsize=(PANEL * COLUMNS, (PANEL + 0.4) * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    figure.legend(
        handles=LEGEND, loc="outside lower center", ncols=len(LEGEND), frameon=False, fontsize=14
    )
    # Labels are placed to avoid each other, so the layout has to be final before any are drawn.
    for ax in panels:
        ax.set_title(" ", fontsize=14)
        ax.set_aspect("equal")
        ax.set_xticks([])
        ax.set_yticks([])
    figure.draw_without_rendering()
    for ax, record in zip(panels, records, strict=False):
        _draw(ax, batch, pyramid, record)
    for ax in panels[len(records) :]:
        ax.axis("off")
    return figure


def _draw(ax: Axes, batch: Batch, pyramid: FeaturePyramid, record: AttentionRecord) -> None:
    image = record.batch_index
    draw_overview(pyramid, record, image=batch.dense_ink(image), crop="map", ax=ax)
    ax.set_xticks([])
    ax.set_yticks([])

    own = slice(*batch.box_offsets[image : image + 2].tolist())
    boxes = batch.boxes[own] / STRIDES[0]
    found = _found(boxes, batch.labels[own], record)
    for (top, left), (bottom, right), is_found in zip(*boxes_to_corners(boxes), found, strict=True):
        ax.add_patch(
            Rectangle(
                (float(left), float(top)),
                float(right - left),
                float(bottom - top),
                fill=False,
                edgecolor=TRUE if is_found else MISSED,
                linestyle="--",
                zorder=5.5,
            )
        )
    n_found = int(found.sum())
    ax.set_title(
        f"{n_found} of {len(boxes)} digits found, {len(record) - n_found} other detections",
        fontsize=14,
    )


def _found(boxes: Tensor, labels: Tensor, record: AttentionRecord) -> Tensor:
    """Bool ``[m]``: the digits that a detection of the same class overlaps with."""
    assert record.boxes is not None
    assert record.labels is not None
    digits = torch.tensor([int(label) for label in record.labels], dtype=torch.int64)
    overlap = pairwise_iou(boxes, record.boxes.to(boxes)) >= MIN_IOU
    return (overlap & (labels[:, None] == digits)).any(1)
