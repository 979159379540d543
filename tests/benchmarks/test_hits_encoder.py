"""The encoder on an event of a particle detector, on few hits."""

import sys

import pytest

from benchmarks import hits


def test_every_point_of_the_levels_is_a_query() -> None:
    one, all_levels = (hits.run(200, n_levels, repeats=1) for n_levels in (1, 3))
    assert one.points <= one.hits == 200  # hits of one cell are one point
    assert one.points < all_levels.points <= 3 * one.points
    assert 1 <= one.neighbors < all_levels.neighbors  # a point is in its own windows
    assert min(all_levels.forward, all_levels.step) > 0


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = hits.Result(12_000, 1, 11_500, 21.5, 0.25, 0.75)
    monkeypatch.setattr(hits, "run", lambda *_: result)
    monkeypatch.setattr(sys, "argv", ["hits", "--hits", "12000"])
    hits.main()
    shown = capsys.readouterr().out
    assert shown.count("11,500") == 2  # of one level and of all
    assert "0.75" in shown
