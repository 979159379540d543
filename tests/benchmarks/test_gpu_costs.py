"""The cost model: instructions of compiled code, sectors of a scene's tiles, bars."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from compilers import compile_for_gpus

from benchmarks.gpu_costs import model, scene
from benchmarks.gpu_costs.sass import Code
from benchmarks.scenes import Scene, particle_tracks

# Two instructions, a loop of four that loads ahead and multiplies, one of three that multiplies
# and that only programs in need of care reach, and an end.
LISTING = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, R2 ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R13], desc[UR6][R74.64], P1 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   FADD R3, R4, R5 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/              @!P2 BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0090*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   STG.E desc[UR6][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""


def test_the_loop_over_blocks() -> None:
    code = Code(LISTING)
    assert len(code.instructions) == 13
    assert [loop.length for loop in code.innermost_loops()] == [4, 3]
    loop = code.block_loop()
    assert loop is not None
    assert (loop.length, loop.counts["LDGSTS"], loop.counts["HMMA"]) == (4, 1, 1)
    # Before it the first two, after it the branch past the other loop, and the last two.
    assert code.path_outside(loop) == 2 + 3


def test_a_loop_that_is_not_pipelined_is_found_as_well() -> None:
    code = Code(LISTING.replace("LDGSTS.E.BYPASS.128", "LDG.E.128"))
    loop = code.block_loop()
    assert loop is not None
    assert (loop.length, loop.counts["LDGSTS"]) == (4, 0)
    assert Code(LISTING.replace("HMMA", "FFMA")).block_loop() is None


def test_counts_of_a_scene() -> None:
    """Three points in a row of cells and a far one, one level: counted by hand."""
    cells = torch.tensor([[0, 4, 4, 0], [0, 4, 5, 0], [0, 4, 6, 0], [0, 60, 60, 0]])
    found = scene.count(Scene(cells, ((64, 64),), (3,)))
    assert (found.points, found.slices, found.widest) == (4, 3, 3)
    for tiles in (found.queries, found.columns):
        assert (tiles.tiles, tiles.entries, tiles.blocks) == (1, 4, 1)
        assert tiles.row_stats == tiles.column_stats == 1  # four queries of 8 bytes


def test_entries_are_those_of_the_tiles_pairs() -> None:
    """A tile has at least the neighbors of each of its queries, at most those of all."""
    tracks = particle_tracks(3)
    found = scene.count(tracks)
    n = len(tracks.coordinates)
    assert (found.queries.tiles, found.columns.tiles) == (-(-n // 32), -(-n // 16))
    assert (found.queries.rows, found.columns.rows) == (32, 16)
    for tiles in (found.queries, found.columns):
        assert tiles.entries / 32 <= tiles.blocks <= tiles.entries / 32 + 1
        assert tiles.blocks <= tiles.level_blocks <= tiles.blocks + 3
        assert tiles.entries / 4 <= tiles.column_stats <= tiles.entries
        assert tiles.rows / 4 <= tiles.row_stats <= tiles.rows


def test_costs_grow_with_what_is_counted() -> None:
    tiles = scene.TileCounts(
        tiles=100,
        entries=64.0,
        blocks=2.0,
        level_blocks=2.0,
        row_stats=9.0,
        column_stats=20.0,
        rows=16,
    )
    counts = scene.SceneCounts(1600, 24, 9, tiles, tiles)
    cost = model.cost("attend", counts, block=300, outside=500)
    assert (cost.programs, cost.instructions) == (800, 500 + 2 * 300)
    # 16 rows of q and out with 2 sectors each, and a log-sum-exp; 64 keys and values with 2 each;
    # 2 blocks of a list with 8; 3 for where rows and list are.
    assert cost.sectors == 16 * 5 + 64 * 4 + 2 * 8 + 3
    least, predicted = cost.seconds()
    assert 0 < least < predicted
    assert model.cost("attend", counts, block=600, outside=500).seconds()[0] > least


def test_missed_bars_are_listed() -> None:
    met = {bar.name: bar.bar for bar in model.BARS}
    assert model.misses(met) == []
    for bar in model.BARS:
        worse = bar.bar - 1 if bar.at_least else bar.bar + 1
        (line,) = model.misses({**met, bar.name: worse})
        assert bar.name in line
        (line,) = model.misses({name: x for name, x in met.items() if name != bar.name})
        assert bar.name in line


CHECKS = """
import contextlib, functools, io, json
from benchmarks import kernels
from benchmarks.scenes import particle_tracks

def check():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            kernels.main()
        except SystemExit as end:
            return end.code, out.getvalue()
    return 0, out.getvalue()

kernels.sass.disassemble = functools.cache(kernels.sass.disassemble)
found = [check()]
kernels.particle_tracks = lambda *_, **__: particle_tracks(5)
kernels.model.BARS = tuple(bar._replace(bar=bar.bar * 0.1) for bar in kernels.model.BARS)
print(json.dumps([*found, check()]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux",
    reason="needs Triton and the tools that it ships for Linux",
)
def test_no_bar_is_missed_and_a_miss_is_printed(kernel_cache: Path) -> None:
    """With the bars as they are, then with bars that are too high, in one process."""
    (line,) = compile_for_gpus(CHECKS, "--check", cache=kernel_cache)
    for (status, out), expected in zip(json.loads(line), (0, 1), strict=True):
        assert status == expected, out
        assert ("instructions per block" in out) == (status == 1)
        assert ("plan of a step" in out) == (status == 1)


COSTS = """
import sys
from benchmarks import kernels
from benchmarks.gpu_costs import model

kernels.usages = None  # it compiles every variant
kernels.particle_tracks = kernels.scene.count = lambda *_, **__: None
cost = model.Cost(programs=2, instructions=10.0, sectors=4.0, bytes=100.0)
kernels.figures = lambda counts: ({bar.name: 7.25 for bar in model.BARS}, {"attend": cost})
sys.argv[1:] = ["--costs"]
kernels.main()
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_costs_alone_take_no_variants() -> None:
    first, *others = compile_for_gpus(COSTS)
    assert first.startswith("attend: 10 instructions and 4 sectors")
    for line, bar in zip(others, model.BARS, strict=True):
        assert line.startswith(f"{bar.name}: 7.25")
