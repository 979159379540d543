"""The first minutes on a GPU: with fakes for its steps, and where there is no GPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from started import run_light

from benchmarks import first, profiled
from benchmarks.first import Result, Step
from benchmarks.machine import ROOT

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def saved(stem: Path) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads(stem.with_suffix(".json").read_text())["steps"]
    return steps


def run(steps: Sequence[Step], folder: Path) -> list[Result]:
    stem = folder / "first"
    results = first.run_all(steps, {"size": "first"}, stem)
    assert [each["status"] for each in saved(stem)] == [each.status for each in results]
    return results


def test_a_failure_stops_no_other_step(tmp_path: Path) -> None:
    steps = [
        Step("wrong", 30, [python("raise ValueError('no')"), python("print('one')")]),
        Step("missing", 30, [["no-such-program"], python("print('two')")]),
        Step("right", 30, [python("print('=== 3 passed ===')")]),
    ]
    wrong, missing, right = run(steps, tmp_path)
    assert (wrong.status, wrong.reason) == ("failed", "ValueError: no; one")
    assert missing.status == "refused"
    assert missing.reason.startswith("no-such-program does not run")
    assert (right.status, right.reason) == ("passed", "3 passed")
    assert right.tails == ["=== 3 passed ===\n"]


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_a_step_ends_at_its_limit_with_all_its_processes(tmp_path: Path) -> None:
    steps = [
        Step("slow", 3, [python("print('quick')"), python(PARENT, SLEEP)]),
        Step("next", 30, [python("print('next')")]),
    ]
    began = time.monotonic()
    slow, following = run(steps, tmp_path)
    assert time.monotonic() - began < 30
    assert (slow.status, following.status) == ("timed out", "passed")
    assert slow.tails[0] == "quick\n"
    if slow.tails[1]:  # on a busy machine it may not have begun
        for _ in range(100):
            if not running(int(slow.tails[1])):
                break
            time.sleep(0.1)
        assert not running(int(slow.tails[1]))


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_each_step_is_saved_before_the_next(tmp_path: Path) -> None:
    code = "import json, sys; print(len(json.load(open(sys.argv[1]))['steps']))"
    later = [Step(str(i), 30, [python(code, str(tmp_path / "first.json"))]) for i in (1, 2)]
    results = run([Step("0", 30, [python("")]), *later], tmp_path)
    assert [each.reason for each in results] == ["no output", "1", "2"]


def test_a_study_gets_the_time_that_is_left(tmp_path: Path) -> None:
    steps = [
        Step("quick", 60, [python("")]),
        Step("study", 40, [python("import sys; print(sys.argv[1])", first.SECONDS)]),
    ]
    _, study = run(steps, tmp_path)
    assert 40 < float(study.reason) < 100 - first.SPARE + 1


def test_a_shard_without_tests_is_no_failure(tmp_path: Path) -> None:
    none, some = python(f"raise SystemExit({first.NO_TESTS})"), python("print('1 passed')")
    together, alone = run([Step("two", 30, [none, some]), Step("one", 30, [none])], tmp_path)
    assert (together.status, alone.status) == ("passed", "failed")


def test_a_step_of_skipped_tests_alone_did_not_run(tmp_path: Path) -> None:
    only, some = python("print('2 skipped in 1s')"), python("print('1 passed, 2 skipped')")
    refused, passed = run([Step("only", 30, [only]), Step("some", 30, [only, some])], tmp_path)
    assert (refused.status, passed.status) == ("refused", "passed")


def test_counters_that_may_not_be_read_are_no_failure(tmp_path: Path) -> None:
    code = "print('==ERROR== ERR_NVGPUCTRPERM - no permission'); raise SystemExit({})"
    denied, right = python(code.format(1)), python("print('1 passed')")
    refused, failed = run(
        [
            Step("counters", 30, [right, denied]),
            Step("both", 30, [python("raise SystemExit(1)"), denied]),
        ],
        tmp_path,
    )
    assert (refused.status, failed.status) == ("refused", "failed")


def collect_shards(shards: tuple[str, ...], folder: Path, printed: Path) -> None:
    os.chdir(folder)
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        for shard in shards:
            print(shard)
            status = pytest.main(["-q", "--collect-only", "--shard", shard, "."])
            if status:
                sys.exit(int(status))


def test_the_shards_have_each_test_once(tmp_path: Path) -> None:
    (tmp_path / "test_many.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_it(i): pass\n"
    )
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    shards, printed = ("0/3", "1/3", "2/3"), tmp_path / "printed"
    assert run_light(collect_shards, shards, tmp_path, printed) == 0, printed.read_text()
    lines = printed.read_text().splitlines()
    assert [line for line in lines if line in shards] == list(shards)
    found = [line for line in lines if "::" in line]
    assert sorted(found) == [f"test_many.py::test_it[{i}]" for i in range(7)]


WITHOUT_NUMPY = """
import os, sys, pytest

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # zarr has one, which needs NumPy
sys.modules["numpy"] = None
options = "--collect-only", "-q", "-p", "no:cacheprovider", "-W", "ignore::UserWarning"
sys.exit(pytest.main([*options, "tests/test_gpu.py"]))
"""


def test_the_gpu_tests_need_no_numpy() -> None:
    done = subprocess.run(python(WITHOUT_NUMPY), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_a_decoder_in_a_cuda_graph" in done.stdout


def test_the_steps_take_less_than_eight_minutes(tmp_path: Path) -> None:
    steps = first.all_steps(tmp_path)
    assert sum(step.seconds for step in steps) <= 480
    names = ["gpu tests", "triton tests", "figures", "cost model and ncu", "sweep", "flex",
             "sanitizer"]  # fmt: skip
    assert [step.name for step in steps] == names
    for step in steps:
        for command in step.commands:
            for part in command:
                file = part.partition("::")[0]
                assert not file.startswith("tests/") or (ROOT / file).exists()
    assert {"attend", "query_gradients", "point_gradients"} <= set(first.kernel_names())


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_sanitizer_sees_each_tensor_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a block of PyTorch's cache, accesses beyond the end of a tensor are no errors."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "cache off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n')
    sanitizer.chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", os.pathsep.join((str(tmp_path), path)))
    (result,) = run(first.all_steps(tmp_path)[-1:], tmp_path)
    assert (result.status, result.reason) == ("passed", "cache off: 1")
    monkeypatch.setattr(first, "_tool", lambda name: "no-such-program")
    (result,) = run(first.all_steps(tmp_path)[-1:], tmp_path)
    assert result.status == "refused"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["first", "--out", str(tmp_path)])
    assert first.main() == 2
    (file,) = tmp_path.glob("*.json")
    steps = json.loads(file.read_text())["steps"]
    assert len(steps) == len(first.all_steps(tmp_path))
    assert {step["status"] for step in steps} == {"refused"}
    assert all("GPU" in step["reason"] for step in steps)
    assert "GPU" in capsys.readouterr().err
    assert profiled.main() == 2


NCU = """==PROF== Connected to process 7
{"figures": {}}
"ID","Kernel Name","Context","gpu__time_duration.sum","smsp__inst_executed.sum","lts__t_sectors.sum"
"","","","ns","inst","sector"
"0","attend","1","650,000","12","34"
"1","rotate","1","21,000","5","6"
"""


def test_profiled_kernels() -> None:
    rows = [*first.profiled_kernels(NCU)]
    assert rows == [
        ("attend", "650,000", "12", "34", "-", "-"),
        ("rotate", "21,000", "5", "6", "-", "-"),
    ]
    assert not [*first.profiled_kernels("==ERROR== no permission\n")]


def test_the_summary_has_predictions_and_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, text in enumerate(("predicted: 620 sectors", NCU)):
        (tmp_path / f"cost-model-and-ncu-{i}.log").write_text(text)
    first.show([Result("figures", 90, "failed", 5, "a reason")], tmp_path)
    told = capsys.readouterr().out
    for part in ("figures", "failed", "a reason", "predicted: 620 sectors", "650,000"):
        assert part in told
