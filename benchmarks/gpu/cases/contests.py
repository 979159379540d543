"""Peers on a GPU: first whether they agree, in float32, then times and memory."""

from __future__ import annotations

import torch

from benchmarks.agreement import ROUNDINGS, ROUNDINGS_OF_HALVES, check_agreement
from benchmarks.cases.contests import prepared, times
from benchmarks.gpu.meter import clock_of, peak
from benchmarks.layer import Layer
from benchmarks.outcome import Figures
from benchmarks.peers import Peer


def agreement(peer: Peer, layer: Layer) -> Figures:
    """How far apart results and gradients are.

    Raises:
        Unable: the peer cannot run here.
        DisagreementError: farther than they may be.
    """
    contest = prepared(peer, layer)
    figures: Figures = {"points": len(layer), "roundings_apart": contest.check(peer.label)}
    return figures if contest.no_step is None else figures | {"no_step": contest.no_step}


def against(peer: Peer, layer: Layer, repeats: int) -> Figures:
    """Times and memory of both, after another look at whether outputs agree at this size.

    Raises:
        Unable: the peer cannot run here.
        DisagreementError: outputs differ.
    """
    contest = prepared(peer, layer)
    single = layer.x.dtype == torch.float32
    apart = check_agreement(
        f"{peer.label}, output",
        contest.theirs.forward(),
        contest.ours.forward(),
        ROUNDINGS if single else ROUNDINGS_OF_HALVES,
    )
    figures: Figures = {
        "points": len(layer),
        "neighbors": layer.n_pairs / len(layer),
        "roundings_apart": apart,
    }
    device = layer.x.device
    figures |= times(contest, repeats, clock_of(device))
    if contest.no_step is None:
        theirs = peak(device, contest.theirs.step).of_call
        ours = peak(device, contest.ours.step).of_call
        figures |= {
            "peak_bytes theirs": theirs,
            "peak_bytes ours": ours,
            "memory_over_vicinal": theirs / max(ours, 1),
        }
    return figures
