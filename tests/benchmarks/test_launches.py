"""Ops and launches of a plan and of the block stay within their bars, counted without a GPU."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks import launches


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, launches.Counts]]:
    return launches.all_counts()


def test_bars_are_met(found: dict[str, dict[str, launches.Counts]]) -> None:
    assert len(found) == 2
    assert all(launches.BARS.keys() <= calls.keys() for calls in found.values())
    assert launches.misses(found) == []


def test_counts_do_not_depend_on_sizes(found: dict[str, dict[str, launches.Counts]]) -> None:
    first, second = (
        {call: counts._replace(bytes=0) for call, counts in calls.items()}
        for calls in found.values()
    )
    assert first == second


def test_a_miss_is_reported(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: dict[str, dict[str, launches.Counts]],
) -> None:
    monkeypatch.setattr(launches, "all_counts", lambda: found)
    monkeypatch.setattr("sys.argv", ["launches", "--check"])
    assert launches.main() == 0
    assert not capsys.readouterr().out.strip()
    call = "plan of a training step"
    most = max(calls[call].total for calls in found.values())
    monkeypatch.setitem(launches.BARS, call, launches.Bar(most - 1, 0))
    assert launches.main() == 1
    assert call in capsys.readouterr().out


def test_ops_are_counted_and_views_and_allocations_are_not() -> None:
    x = torch.zeros(4, 3, device="meta")
    counts = launches.count(lambda: (x + 1, x.t(), x[1:], torch.empty_like(x), x.sort(0)))
    assert (counts.ops, counts.allocations, counts.kernels) == (2, 1, 0)
    assert counts.total == 2
    assert counts.launches > counts.total
    # Of 12 float32 numbers: read and written for the sum; for the sort by four passes, each of
    # which reads and writes the number and its index of 8 bytes.
    assert counts.bytes == 2 * 48 + 4 * 2 * 12 * (4 + 8)
    assert counts.names == {"add": 1, "empty_like": 1, "sort": 1}
