"""Peers against the library at the same work."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.layer import Layer
from benchmarks.measure import TakeTurns, peak_memory, take_turns
from benchmarks.outcome import Figures, Unable
from benchmarks.peers import Peer
from benchmarks.peers.contest import Contest


def seconds(peer: Peer, make_layer: Callable[[], Layer], repeats: int) -> Figures:
    """Times of both, after a check that their results agree where they should.

    Raises:
        Unable: the peer cannot run here.
        DisagreementError: the results differ.
    """
    layer = make_layer()
    contest = prepared(peer, layer)
    figures: Figures = {"points": len(layer), "neighbors": layer.n_pairs / len(layer)}
    if contest.same:
        figures["roundings_apart"] = contest.check(peer.label)
    return figures | times(contest, repeats)


def times(contest: Contest, repeats: int, take_turns: TakeTurns = take_turns) -> Figures:
    """Of both sides, forward and in training where the peer knows it, and what it did apart."""
    # Ours twice, and the second counts: the first works on memory that the peer, often by the
    # gigabyte, has just given back to the system, and that has yet to be cleared.
    theirs, ours = contest.theirs, contest.ours
    forward = take_turns(theirs.forward, ours.forward, ours.forward, repeats=repeats)
    figures = contest.apart | {
        "forward_seconds": forward.median(0),
        "forward_seconds_vicinal": forward.median(2),
        "forward_over_vicinal": forward.ratio(0, 2),
    }
    if contest.no_step is not None:
        return figures | {"no_step": contest.no_step}
    step = take_turns(theirs.step, ours.step, ours.step, repeats=repeats)
    return figures | {
        "step_seconds": step.median(0),
        "step_seconds_vicinal": step.median(2),
        "step_over_vicinal": step.ratio(0, 2),
    }


def peak_bytes(peer: Peer, make_layer: Callable[[], Layer], side: str) -> Figures:
    """Peak memory of one side's training step, or forward where the peer has no other."""
    contest = prepared(peer, make_layer())
    work = {"theirs": contest.theirs, "ours": contest.ours}[side]
    call = work.forward if contest.no_step else work.step
    call()
    return {"peak_bytes": peak_memory(call)}


def prepared(peer: Peer, layer: Layer) -> Contest:
    """Both sides of a contest.

    Raises:
        Unable: the peer cannot run here.
    """
    problem = peer.problem(layer)
    if problem is not None:
        raise Unable(problem)
    return peer.prepare(layer)
