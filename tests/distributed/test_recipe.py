"""The recipe of scenes in parts is a program for torchrun, as it says."""

import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from problems import assert_close
from started import run_light

import vicinal

PAGE = Path(__file__).parents[2] / "docs/recipes/sharded-data.md"
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "N_PARTS", "SCANS")
# Of torchrun: forks of it have imported what the program needs.
FORKED = ("--run-path", "--start-method", "fork" if sys.platform == "linux" else "spawn")
KEEP = """
kept = {
    "cells": voxels.coordinates, "owned": cells, "target": target,
    "predicted": predicted, "weights": model.state_dict(),
}
torch.save(kept, "kept-" + os.environ.get("RANK", "alone") + ".pt")
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The code blocks of the page as a script in a folder of its own."""
    for name in OF_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(vicinal.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    script = tmp_path / "program.py"
    script.write_text("\n".join([*blocks, KEEP]))
    return script


def torchrun(arguments: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    """What the command does, in a folder."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.distributed.run.main(arguments)


def start_two(program: Path, *options: str, **settings: str) -> list[dict[str, Any]]:
    """What the two processes that torchrun starts, with further options, have at the end."""
    log = program.with_name("torchrun.log")
    arguments = ["--standalone", "--nproc-per-node", "2", *options, str(program)]
    status = run_light(torchrun, arguments, {**os.environ, **settings}, Path.cwd(), log)
    assert status == 0, log.read_text()
    kept: list[dict[str, Any]] = [torch.load(f"kept-{rank}.pt") for rank in range(2)]
    first, second = (one["weights"] for one in kept)
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
    return kept


def cell_counts(cells: torch.Tensor) -> list[torch.Tensor]:
    return list(cells.unique(dim=0, return_counts=True))


# By torch 2.10, which looks at tensors' storage when it writes checkpoints.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_two_processes_share_a_scan(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = start_two(program)
    monkeypatch.setenv("SCANS", "again")
    runpy.run_path(str(program))
    alone = torch.load("kept-alone.pt")
    for name in ("cells", "target"):  # the files are read once, in the order of ranks
        assert torch.equal(torch.cat([one[name] for one in kept]), alone[name])
    owned = [cell_counts(one["owned"]) for one in kept]
    assert min(len(one["owned"]) for one in kept) > 0
    both = cell_counts(torch.cat([one["owned"] for one in kept]))
    assert len(owned[0][0]) + len(owned[1][0]) == len(both[0])  # no cell is on both
    assert all(map(torch.equal, both, cell_counts(alone["owned"])))
    assert_close(torch.cat([one["predicted"] for one in kept]), alone["predicted"], 1e-3)


def test_two_processes_have_a_scan_each(program: Path, tmp_path: Path) -> None:
    kept = start_two(program, *FORKED, N_PARTS="1", SCANS=str(tmp_path / "elsewhere"))
    assert [len(one["owned"]) for one in kept] == [3000, 3000]
    assert not torch.equal(kept[0]["cells"], kept[1]["cells"])
