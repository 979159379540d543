"""Tests of the compiled kernel alone: precision, memory, safety, and use without it."""

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_scenes import own_calls
from hypothesis import given
from problems import (
    Answer,
    Inputs,
    OwnOps,
    Scene,
    answer,
    assert_close,
    assert_same_answers,
    crowded_scene,
    differentiate,
    forged,
    make_inputs,
    make_scene,
    run_python,
    scene_2d,
    scenes,
    wide_scene,
)
from started import run_light
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vicinal
from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    RotaryEncoding,
)
from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend, cpu, reference

SOURCES = Path(vicinal.__file__).parent / "backends" / "cpu" / "csrc"

# -------------------------------------------------------------------------------- precision


def plain_attention(scene: Scene) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """Dense attention as one writes it in PyTorch, all of it in the dtype of its inputs."""
    windows = scene.windows()
    level = torch.tensor([slot.level for slot, _ in windows[0]])
    image = torch.tensor(scene.images())
    empty = torch.tensor([[not points for _, points in window] for window in windows])
    is_neighbor = torch.zeros(len(windows), len(scene.pyramid), dtype=torch.bool)
    for query, point in scene.pairs():
        is_neighbor[query, point] = True

    def attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v, background, *_ = inputs
        logits = torch.einsum("nhd,mhd->nhm", q, k).masked_fill(~is_neighbor[:, None], -torch.inf)
        if background is not None:
            cells = torch.einsum("nkhd,khd->nhk", background.query[:, level], background.key)
            logits = torch.cat((logits, cells.masked_fill(~empty[:, None], -torch.inf)), -1)
        logits = logits * q.shape[-1] ** -0.5
        weights = logits.softmax(-1)
        out = torch.einsum("nhm,mhe->nhe", weights[..., : len(k)], v)
        if background is not None:
            values = background.value[image][:, level]
            out = out + torch.einsum("nhk,nkhe->nhe", weights[..., len(k) :], values)
        return out, logits.logsumexp(-1)

    return attend


def errors(actual: Answer, exact: Answer) -> Tensor:
    """``[results, 2]``: root mean square and 99th percentile of the errors of output, log-sum-exp
    and gradients. The largest of all is a matter of luck: it varies by a factor of three.
    """
    rows = []
    for left, right in zip(
        (actual.out, actual.lse, *actual.grads), (exact.out, exact.lse, *exact.grads), strict=True
    ):
        off = (left.double() - right).abs()
        rows.append(torch.stack((off.pow(2).mean().sqrt(), off.flatten().quantile(0.99))))
    return torch.stack(rows)


@functools.cache
def dense_problem(seed: int) -> tuple[NeighborhoodPlan, Callable[[Inputs], tuple[Tensor, Tensor]]]:
    """A plan in which every query has a neighbor, as plain attention needs, and that attention."""
    scene = make_scene(((16, 10), (8, 5)), (7, 5), (40, 60), 250, seed=seed)
    scene.positions = scene.positions.abs() % torch.tensor([16, 10])
    plan = scene.plan()
    assert plan.counts().min() > 0
    return plan, plain_attention(scene)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("background", [False, True])
def test_precision_is_that_of_plain_pytorch(dtype: torch.dtype, background: bool) -> None:
    ours, theirs = [], []
    for seed in range(4):
        plan, plain = dense_problem(seed)
        inputs = make_inputs(plan, width=32, background=background, dtype=dtype, seed=seed)
        exact = differentiate(inputs.map(Tensor.double), plain)
        ours.append(errors(answer(inputs, plan), exact))
        theirs.append(errors(differentiate(inputs, plain), exact))
    our, their = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)
    assert (our > 0).all()
    assert (our <= 2 * their).all(), our / their


def rotate_units(coordinates: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines ``[n, d / 2, 2]`` of coordinates ``[n, C]`` @ frequencies ``[C, d / 2]``,
    from unit vectors that the kernel rotates.
    """
    units = torch.tensor([1, 0], dtype=dtype).expand(len(coordinates), frequencies.shape[1], 2)
    x = units.flatten(1)[:, None].contiguous()
    backend = choose_backend("cpu", x.device, x.dtype)
    rotated = backend.rotate(x, coordinates, frequencies[:, None])[:, 0].double()
    pairs: Tensor = rotated.unflatten(-1, (-1, 2))
    return pairs


def cosines_and_sines(angles: Tensor) -> Tensor:
    return torch.stack((angles.cos(), angles.sin()), -1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-7), (torch.float64, 5e-16)])
@pytest.mark.parametrize("far", [1.0, 1e3, 1e6, 1e9, 1e10])
def test_cosines_and_sines(far: float, dtype: torch.dtype, bound: float) -> None:
    """Of angles that float64 holds, their errors are those of rounding the result. An angle of a
    turn in float32 would be off by twice as much.
    """
    generator = torch.Generator().manual_seed(0)
    coordinates = (torch.randn(5000, 3, generator=generator, dtype=torch.float64) * far).round()
    frequencies = (torch.rand(3, 13, generator=generator, dtype=torch.float64) * 256).round() / 256
    rotated = rotate_units(coordinates, frequencies, dtype)
    assert_close(rotated, cosines_and_sines(coordinates @ frequencies), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_that_the_c_library_takes(dtype: torch.dtype) -> None:
    far = [2.0**33, -(2.0**36), 1e300, torch.inf, torch.nan]
    coordinates = torch.tensor([[x, 1.0] for x in (0.25, *far, -7.0)], dtype=torch.float64)
    frequencies = torch.tensor([[1.0, -0.5, 0.25], [0.75, 0.125, 0.0]], dtype=torch.float64)
    rotated = rotate_units(coordinates, frequencies, dtype)
    assert rotated[4:6].isnan().all()
    finite = coordinates.isfinite().all(1)
    assert_close(rotated[finite], cosines_and_sines(coordinates @ frequencies)[finite], 1e-7)
    one_by_one = [rotate_units(row[None], frequencies, dtype) for row in coordinates]
    assert torch.equal(rotated.nan_to_num(9), torch.cat(one_by_one).nan_to_num(9))


# ----------------------------------------------------------------------------- ops of torch


def assert_slices_of_the_reference(scene: Scene) -> None:
    with OwnOps() as ops:
        scene.plan()
    op, arguments = ops.calls["find_slices"]
    for left, right in zip(op(*arguments), reference.find_slices(*arguments), strict=True):
        assert torch.equal(left, right)


@given(scenes(max_dim=4))
def test_slices_are_those_of_the_reference(scene: Scene) -> None:
    assert_slices_of_the_reference(scene)


def test_slices_of_thousands_of_queries_are_those_of_the_reference() -> None:
    assert_slices_of_the_reference(wide_scene())


def test_without_gradients() -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True)
    expected = inputs.attend(plan, "cpu")[0]
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert torch.equal(inputs.attend(plan, "cpu")[0], expected)


def test_calls_from_several_threads() -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, background=True, dtype=torch.float32)
    expected = answer(inputs, plan)
    results: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: results.append(answer(inputs, plan))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert_same_answers(result, expected, 0)


def test_plans_of_other_sizes_are_an_error_of_the_op() -> None:
    op, arguments = own_calls()["neighborhood_attention"]
    op(*arguments)
    is_plan = [isinstance(x, list) and x[0].dtype == torch.int32 for x in arguments[:-3]]
    at = is_plan.index(True)
    tensors = arguments[at]
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[1:],
        lambda x: x.long(),
        lambda x: torch.cat((x, x[:1])),
        lambda x: torch.stack((x, x), -1)[..., 0],
    ]
    bad_plans = [tensors[:-1], [*tensors, tensors[0], tensors[0]]]
    for index, x in enumerate(tensors):
        bad_plans += [[*tensors[:index], f(x), *tensors[index + 1 :]] for f in changes]
    for bad in bad_plans:
        with pytest.raises(RuntimeError, match="vicinal"):
            op(*arguments[:at], bad, *arguments[at + 1 :])


def test_windows_that_do_not_fit_the_slices_are_an_error_of_the_op() -> None:
    # A plan's slices are walked window row by window row: these sizes must agree.
    op, arguments = own_calls()["neighborhood_attention"]
    changed = list(arguments)
    for index, x in enumerate(arguments):
        if isinstance(x, list) and isinstance(x[0], int):
            assert x == [3, 5, 3]
            changed[index] = [3, 5, 7]
        if isinstance(x, list) and len(x) == 3 and isinstance(x[0], Tensor):
            query, key, value = x
            changed[index] = [query, key.new_zeros(9 + 25 + 49, *key.shape[1:]), value]
    with pytest.raises(RuntimeError, match="vicinal"):
        op(*changed)


# ----------------------------------------------------------------------------------- memory


def allocations(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Its result, and the bytes of every allocation (and, negative, release) while it ran."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = call()
    events: Any = profiler.profiler
    sizes = [x.nbytes() for x in events.kineto_results.events() if x.name() == "[memory]"]
    return result, sizes


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


@pytest.mark.parametrize("background", [False, True])
def test_allocations_are_those_of_the_results(background: bool) -> None:
    plan = crowded_scene(400, 400).plan()
    inputs = make_inputs(plan, width=64, background=background, mask=True, dtype=torch.float32)
    inputs = inputs.fresh()
    pairs = len(plan.pairs()) * inputs.k[0].nbytes
    (out, lse), forward = allocations(lambda: inputs.attend(plan, "cpu"))
    slack = 16 << 10
    assert 0 < sum(x for x in forward if x > 0) <= nbytes(out, lse) + slack

    cotangent = torch.randn_like(out)
    _, backward = allocations(lambda: out.backward(cotangent))
    # Gradients, delta and the log-sum-exp's; for cells, partial sums of up to 32 work items.
    bound = nbytes(inputs.q, inputs.k, inputs.v, lse, lse)
    if inputs.background is not None:
        query, key, value = inputs.background
        bound += nbytes(query) + 34 * nbytes(key, value)
    allocated = sum(x for x in backward if x > 0)
    assert nbytes(inputs.q) < allocated <= bound + slack
    assert background or allocated < pairs / 4


@pytest.mark.parametrize("background", [False, True])
def test_nothing_of_the_pairs_is_kept_for_the_backward_pass(
    background: bool, backend: BackendName
) -> None:
    plan = crowded_scene(600, 600).plan()
    inputs = make_inputs(plan, width=32, background=background, dtype=torch.float32).fresh()
    pairs = len(plan.pairs()) * inputs.k[0].nbytes
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def attend() -> tuple[Tensor, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return inputs.attend(plan, backend)

    (out, lse), sizes = allocations(attend)
    slack = 64 << 10
    parts = (
        *plan._tensors.query_slices,
        plan.query_batch,
        plan._tensors.first_columns,
        plan._tensors.point_columns,
    )
    assert sum(saved.values()) <= nbytes(*inputs.leaves(), out, lse, *parts) + slack
    # Whoever may hold it: what was allocated and not yet released.
    kept = sum(sizes)
    assert 0 < kept <= 2 * nbytes(out, lse) + slack
    assert kept < pairs / 8


MEASURE_PEAK = """
import torch
from vicinal import FeaturePyramid, neighborhood_attention, plan_neighborhoods
from problems import resident_bytes

def growth(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident_bytes("VmRSS")
    result = call()
    return result, resident_bytes("VmHWM") - before

def measure(side):
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    coordinates = torch.nn.functional.pad(cells, (1, 1))
    pyramid = FeaturePyramid(torch.zeros(side**2, 1), coordinates, [(side, side)], 1)
    plan = plan_neighborhoods(cells + 0.5, torch.tensor([0, side**2]), pyramid, [7])
    q, k, v = (torch.randn(side**2, 4, 32).requires_grad_() for _ in range(3))
    out, forward = growth(lambda: neighborhood_attention(q, k, v, plan, backend="cpu"))
    _, backward = growth(lambda: out.sum().backward())
    return forward / q.nbytes, backward / q.nbytes

measure(8)
print(*measure(256))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_the_process() -> None:
    # Of 65,536 queries with 49 neighbors: whoever stored a number per pair and head alone would
    # need one and a half times the queries' memory, per pair and channel 49 times.
    forward, backward = map(float, run_python(MEASURE_PEAK).split())
    assert 0.9 < forward < 1.4
    assert 2.9 < backward < 4.9  # three gradients, and the expanded one of the sum


# ------------------------------------------------------------------------ bounds of buffers


def guarded(x: Tensor, *, at_end: bool) -> Tensor:
    """A copy of ``x`` right before or after a page that must not be touched."""
    if not x.numel():
        return x
    page = mmap.PAGESIZE
    span = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, span + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    for guard in (address, address + page + span):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page + (span - x.nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


@pytest.mark.parametrize(("heads", "value_width"), [(0, 5), (2, 0), (0, 0)])
def test_no_heads_and_no_values(heads: int, value_width: int) -> None:
    """Nothing to attend with, or nothing to fetch: gradients are those of the log-sum-exp."""
    plan = scene_2d(n_queries=40, n_points=200).plan()
    grads = []
    for backend in ("cpu", "reference"):
        inputs = make_inputs(plan, heads=heads, width=6, value_width=value_width).fresh()
        out, lse = inputs.attend(plan, backend)
        assert out.shape == (40, heads, value_width)
        lse.sum().backward()
        grads.append([inputs.q.grad, inputs.k.grad])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def laid_out(x: Any, rows: Tensor, at_end: bool, spoil: torch.Generator | None) -> Any:
    """An op's argument in guarded memory, with invalid contents of indices on request.

    ``rows`` of windows begin anywhere then. Their widths change places, since ops refuse negative
    ones, and another number of cells than bias and background have.
    """
    if isinstance(x, list | tuple):
        return [laid_out(part, rows, at_end, spoil) for part in x]
    if not isinstance(x, Tensor) or not x.dim():
        return x
    if x.dtype in (torch.int32, torch.int64) and spoil is not None:
        kind = int(torch.randint(5, (), generator=spoil))
        if x.data_ptr() == rows.data_ptr():
            starts, widths = x.unbind(1)
            x = torch.stack((forged(starts, kind, spoil), widths.flip(0)), 1)
        else:
            x = forged(x, kind, spoil)
    return guarded(x, at_end=at_end)


def survive_bad_plans(trials: int = 48) -> None:
    """For subprocesses: good and forged plans between pages that must not be touched."""
    torch.set_num_threads(2)
    few, many = (scene_2d(n_queries=n, n_points=183) for n in (37, 1300))
    for trial in range(trials):
        scene = many if trial % 8 == 7 else few
        spoil = torch.Generator().manual_seed(trial) if trial >= 6 else None
        dtype = (torch.float64, torch.float32, torch.bfloat16)[trial % 3]
        with OwnOps() as ops:
            plan = scene.plan()
            heads, background = (2, 4, 8)[trial // 3 % 3], trial % 2 == 0
            options: dict[str, Any] = {"background": background, "bias": trial % 5 < 3}
            inputs = make_inputs(plan, heads=heads, width=5, value_width=3, dtype=dtype, **options)
            if trial % 4 > 1:
                queries, points = map(torch.arange, (plan.n_queries, plan.n_points))
                plan = plan.with_dropout_ids(queries, points, plan.n_points)
            rate = 0.2 * (trial % 4 > 0)
            inputs.fresh().attend(plan, "cpu", dropout_p=rate)[0].sum().backward()
        assert len(ops.calls) == 3
        for name, (op, arguments) in ops.calls.items():
            # The rows of windows come from sizes alone, never from contents.
            sizes = arguments[3:] if name == "find_slices" else ()
            contents = arguments[: len(arguments) - len(sizes)]
            rows = plan._tensors.window_rows
            op(*[laid_out(x, rows, trial % 4 < 2, spoil) for x in contents], *sizes)
    print("survived")


@pytest.mark.parametrize("widths", [[-1, 3, 5], [3, 4, 3], [2**31 - 1] * 3])
def test_rows_of_windows_that_do_not_fit_are_refused(widths: list[int]) -> None:
    """They are negative, have other cells than the bias, or more than 32-bit numbers count."""
    plan = make_scene(((16, 16),), (3,), (40,), 100).plan()
    inputs = make_inputs(plan, bias=True, dtype=torch.float32)
    with OwnOps() as ops:
        inputs.fresh().attend(plan, "cpu")[0].sum().backward()
    rows = plan._tensors.window_rows
    forged_rows = torch.stack((rows[:, 0], torch.tensor(widths, dtype=torch.int32)), 1)
    bias = inputs.leaves()[3]
    many = torch.zeros(()).expand(sum(widths), bias.shape[1])  # takes no memory

    def forge(x: Any) -> Any:
        if isinstance(x, list):
            return [forge(part) for part in x]
        if not isinstance(x, Tensor):
            return x
        if x.shape == bias.shape and max(widths) > 5:
            return many
        return forged_rows if x.data_ptr() == rows.data_ptr() else x

    for name in ("neighborhood_attention", "neighborhood_attention_backward"):
        op, arguments = ops.calls[name]
        with pytest.raises(RuntimeError, match=r"plan\.window_rows|bias"):
            op(*map(forge, arguments))


def check_instruction_set() -> None:
    """For subprocesses: every feature at once, forward and backward, in float64 and float32."""
    scene = scene_2d(n_queries=40, n_points=200)
    plan = scene.plan()
    for heads, width, value_width in (
        *((2, 6, 5), (2, 40, 33), (8, 6, 7)),
        *((4, 16, 16), (2, 32, 24), (4, 8, 16)),  # rows of whole vectors, of one head to four
    ):
        inputs = make_inputs(
            plan,
            heads=heads,
            width=width,
            value_width=value_width,
            background=True,
            bias=True,
            mask=True,
        )
        for leaves, tolerance in ((inputs, 1e-11), (inputs.map(Tensor.float), 1e-4)):
            expected = answer(leaves, plan, "reference", dropout_p=0.2)
            assert_same_answers(answer(leaves, plan, dropout_p=0.2), expected, tolerance)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        turned = []
        for backend in ("cpu", "reference"):
            torch.manual_seed(0)
            rotary = RotaryEncoding(34, 2, 2, backend=backend).to(dtype)
            x = torch.randn(40, 2, 34).to(dtype).requires_grad_()
            positions = (torch.rand(40, 3) * 40).to(dtype).requires_grad_()
            sources = [x, positions, *rotary.parameters()]
            out = rotary(x, positions)
            turned.append([out, *torch.autograd.grad(out.sin().sum(), sources)])
        for left, right in zip(*turned, strict=True):
            assert_close(left, right, tolerance * float(right.detach().abs().max()))


@pytest.mark.parametrize("n_points", [40, 500, 1200])
def test_keys_that_queries_share(n_points: int) -> None:
    """Consecutive queries have the coarse level in common, in one or several blocks of keys."""
    scene = make_scene(((12, 12), (6, 6)), (3, 17), (41, 30), n_points)
    plan = scene.plan()
    for heads, width, value_width in ((2, 5, 3), (4, 32, 16)):
        inputs = make_inputs(
            plan, heads=heads, width=width, value_width=value_width, bias=True, mask=True
        )
        expected = answer(inputs, plan, "reference", dropout_p=0.2)
        assert_same_answers(answer(inputs, plan, dropout_p=0.2), expected, 1e-11)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("dtype", "heads", "width"),
    [
        (torch.float32, 1, 5),
        (torch.float32, 4, 8),
        (torch.float32, 8, 32),
        (torch.float64, 2, 12),
        (torch.float64, 4, 4),
        (torch.float64, 4, 8),
        (torch.bfloat16, 2, 16),
    ],
)
def test_the_bits_of_a_query_depend_on_no_other(
    dtype: torch.dtype, heads: int, width: int, background: bool
) -> None:
    """Which queries share keys, and load them together, depends on the others."""
    scene = make_scene(((12, 12), (6, 6)), (5, 3), (41, 30), 300)
    plan = scene.plan()
    inputs = make_inputs(
        plan, heads=heads, width=width, background=background, mask=True, bias=True, dtype=dtype
    )
    assert inputs.query_mask is not None
    kept = ~inputs.query_mask
    some, every = (answer(x, plan) for x in (inputs, inputs._replace(query_mask=None)))
    for ours, theirs in (
        (some.out, every.out),
        (some.lse, every.lse),
        (some.grads[0], every.grads[0]),
    ):
        assert torch.equal(ours[kept], theirs[kept])


# Vectors of AVX-512 are compiled for any x86 processor, as several of its own.
@pytest.mark.parametrize(("n_bytes", "heads"), [(32, 1), (64, 4)])
def test_products_of_wide_vectors(n_bytes: int, heads: int, tmp_path: Path) -> None:
    compiler, program = os.environ.get("CXX", "g++"), tmp_path / "gathered"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    options = ["-std=c++20", "-O1", "-mavx2", "-mfma", "-Wno-psabi", "-Wno-ignored-attributes"]
    includes = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{SOURCES}"]
    values = [f"-DHEADS={heads}", f"-DVICINAL_BYTES={n_bytes}"]
    source = Path(__file__).with_name("gathered.cpp")
    command = [compiler, *options, *includes, *values, str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    assert 0 < float(done.stdout) < 2e-5


def use_instruction_set(capability: str, log: Path) -> None:
    """For processes in which no op has run: torch and the kernel decide at their first."""
    os.environ["ATEN_CPU_CAPABILITY"] = capability
    with log.open("w") as file, contextlib.redirect_stdout(file):
        try:
            warnings.simplefilter("error")
            print(torch.backends.cpu.get_cpu_capability(), cpu.instruction_set())
            check_instruction_set()
            survive_bad_plans()
        except BaseException:
            traceback.print_exc(file=file)
            raise


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    ours = torch.backends.cpu.get_cpu_capability()
    if capability == "avx512" and ours != "AVX512":
        pytest.skip(f"torch would use it where the processor lacks it: this one has {ours}")
    log = tmp_path / "log"
    status = run_light(use_instruction_set, capability, log, timeout=120)
    lines = log.read_text().splitlines()
    assert (status, lines[1:]) == (0, ["survived"]), log.read_text()
    if ours in ("AVX2", "AVX512"):  # else the variable may mean nothing
        names = {"default": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}
        assert lines[0].startswith(f"{capability.upper()} ")
        assert names[capability] in lines[0]


# Rows and heads this far apart are addressed beyond 2^31 elements, and so 2^32 bytes.
FAR = 2**29 + 9


@pytest.mark.parametrize("far", ["rows", "heads"])
def test_addresses_beyond_2_to_the_31(far: str, backend: BackendName) -> None:
    scene = Scene(
        torch.full((5, 1), 2.0),
        torch.tensor([0, 5]),
        FeaturePyramid(torch.zeros(5, 1), torch.tensor([[0, i, 0] for i in range(5)]), ((5,),), 1),
        (5,),
    )
    plan = scene.plan()
    assert plan.counts().tolist() == [5] * 5
    heads, width = 5, 6
    strides = (FAR, width, 1) if far == "rows" else (width, FAR, 1)
    compact = make_inputs(plan, heads=heads, width=width, dtype=torch.bfloat16)

    def spread(x: Tensor) -> Tensor:
        # Memory that is never touched costs nothing.
        wide = torch.empty(4 * FAR + 5 * 5 * width, dtype=x.dtype).as_strided(x.shape, strides)
        return wide.copy_(x).detach()

    def run(inputs: Inputs, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in inputs.leaves()]
        out, _ = inputs.attend(plan, backend)
        return out, *torch.autograd.grad(out, leaves, cotangent)

    cotangent = torch.randn(5, heads, width).bfloat16()
    wide = compact.map(spread)
    assert 4 * max(wide.q.stride()) > 2**31
    for left, right in zip(run(wide, spread(cotangent)), run(compact, cotangent), strict=True):
        assert torch.equal(left, right)


# ------------------------------------------------------------------------- without a kernel

USE_WITHOUT_KERNEL = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import vicinal
    from problems import scene_2d, make_inputs
    from vicinal import SparseNeighborhoodAttentionBlock, neighborhood_attention
    silent = [str(w.message) for w in caught]
    scene = scene_2d()
    plan = scene.plan()
    q, k, v, *_ = make_inputs(plan).fresh()
    block = SparseNeighborhoodAttentionBlock(6, 1, 3, scene.sizes).double()
    arguments = (torch.randn(12, 6).double(), scene.positions, scene.offsets,
                 scene.pyramid.with_values(torch.randn(60, 6).double()))
    for _ in range(2):
        out = neighborhood_attention(q, k, v, plan)
        out.sum().backward()
        block(*arguments).sum().backward()
    assert torch.equal(out, neighborhood_attention(q, k, v, plan, backend="reference"))
    assert q.grad.any()
    refusals = []
    for call in (
        lambda: neighborhood_attention(q, k, v, plan, backend="cpu"),
        lambda: SparseNeighborhoodAttentionBlock(
            6, 1, 3, scene.sizes, backend="cpu").double()(*arguments),
    ):
        try:
            call()
        except ValueError as error:
            refusals.append(str(error))
print(vicinal.__file__)
print(silent)
print([(w.category.__name__, str(w.message)) for w in caught])
print(refusals)
"""


def use_without_kernel(root: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Warnings and refusals of a process that uses the package at ``root``."""
    where, silent, warned, refusals = run_python(USE_WITHOUT_KERNEL, path=root).splitlines()
    assert Path(where).is_relative_to(root)
    assert silent == "[]", "importing says nothing"
    return eval(warned), eval(refusals)


def copied_package(root: Path) -> Path:
    """The package without its compiled kernel; returns the folder that the kernel belongs in."""
    source = Path(vicinal.__file__).parent
    ignored = shutil.ignore_patterns("_cpu*.so", "__pycache__")
    return Path(shutil.copytree(source, root / "vicinal", ignore=ignored)) / "backends" / "cpu"


def test_without_a_compiler(tmp_path: Path) -> None:
    copied_package(tmp_path)
    ((category, message),), refusals = use_without_kernel(tmp_path)
    assert category == "RuntimeWarning"
    assert "not built" in message
    assert "reference" in message
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith("backend: expected ")
        assert "not built" in refusal


def test_with_a_kernel_that_does_not_load(tmp_path: Path) -> None:
    (copied_package(tmp_path) / "_cpu.abi3.so").write_bytes(b"not a library")
    ((category, message),), refusals = use_without_kernel(tmp_path)
    assert category == "RuntimeWarning"
    assert "does not load" in message
    assert len(refusals) == 2
    assert all("does not load" in refusal for refusal in refusals)


def test_the_kernel_is_built() -> None:
    # Else half of these tests would compare the reference with itself.
    assert platform.system() in ("Linux", "Darwin")
    assert list(Path(vicinal.__file__).parent.glob("backends/cpu/_cpu*.so"))
