"""The Triton back end: on a GPU if there is one, else interpreted, so on small problems."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import golden_cases
import pytest
import torch
from bounds import Checked
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Answer,
    Inputs,
    OwnOps,
    Scene,
    answer,
    as_leaves,
    crowded_scene,
    differentiate,
    forged,
    full_window_scene,
    make_inputs,
    make_scene,
    opcheck,
    rotate_by_hand,
    scene_2d,
    scenes,
)
from torch import Tensor

from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    RotaryEncoding,
    SparseNeighborhoodAttentionBlock,
    Window,
    neighborhood_attention,
    plan_neighborhoods,
)
from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend, reference
from vicinal.backends import triton as back_end
from vicinal.backends.types import LIST_BLOCK, POINT_TILE, TILE, Tiles

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from vicinal.backends.triton import ops as triton_ops
from vicinal.backends.triton import plan_ops

if triton_ops.INTERPRETS:
    import numpy as np

# The interpreter computes with NumPy, which warns about values that kernels mask.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("runs_by_reference"),
]

DEVICE = torch.device("cpu" if triton_ops.INTERPRETS else "cuda")


@pytest.fixture(autouse=True)
def interpreted_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter widen bfloat16 before products; it multiplies the bits as integers."""
    if triton_ops.INTERPRETS:
        from triton.language import bfloat16, float32
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        create_dot = InterpreterBuilder.create_dot

        def widened(x: Any) -> Any:
            if x.dtype.scalar != bfloat16:
                return x
            bits = x.data.astype(np.uint32) << 16
            return TensorHandle(bits.view(np.float32), float32)

        def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            return create_dot(builder, widened(a), widened(b), *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


choose_backend("triton", DEVICE, torch.float32)  # registers the kernels

TOLERANCE = 2e-5  # of float32 results, relative to the largest number of the float64 result


def on_device(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Inputs:
    mask = None if inputs.query_mask is None else inputs.query_mask.to(DEVICE)
    return inputs.map(lambda x: x.to(DEVICE, dtype))._replace(query_mask=mask)


def on_cpu(result: Answer) -> Answer:
    return Answer(result.out.cpu(), result.lse.cpu(), tuple(x.cpu() for x in result.grads))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest number; the same entries must be finite."""
    actual = actual.double()
    assert torch.equal(actual.isfinite(), exact.isfinite())
    if not exact.numel():
        return 0.0
    finite = (torch.where(exact.isfinite(), x, 0) for x in (actual - exact, exact))
    error, scale = (x.abs().max() for x in finite)
    return float(error / scale.clamp(min=1e-3))


def assert_exact(
    scene: Scene, *, dropout_p: float = 0.0, tolerance: float = TOLERANCE, **options: Any
) -> None:
    """Compares output, log-sum-exp and all gradients in float32 with the float64 reference."""
    plan = scene.plan()
    inputs = make_inputs(plan, **options)
    plan = plan.to(DEVICE)  # for the reference as well: both draw the seed on this device
    exact = on_cpu(answer(on_device(inputs, torch.float64), plan, "reference", dropout_p=dropout_p))
    actual = on_cpu(answer(on_device(inputs), plan, "triton", dropout_p=dropout_p))
    errors = [relative_error(actual.out, exact.out), relative_error(actual.lse, exact.lse)]
    errors += [relative_error(*pair) for pair in zip(actual.grads, exact.grads, strict=True)]
    assert max(errors) < tolerance, errors


# -------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_golden_case(name: str) -> None:
    """Positions stay in float64: in float32, some would be in another cell."""
    case = golden_cases.load(name)
    block = SparseNeighborhoodAttentionBlock(**case.config, backend="triton").to(DEVICE)
    block.load_state_dict(case.state_dict, strict=True)
    arguments: dict[str, Any] = case.arguments()
    for key, value in arguments.items():
        if value.is_floating_point() and key != "query_spatial_positions":
            arguments[key] = value.detach().float().to(DEVICE).requires_grad_()
        else:
            arguments[key] = value.detach().to(DEVICE).requires_grad_(value.is_floating_point())
    out = block(**arguments)
    (out * case.cotangent.to(out)).sum().backward()

    errors = {"out": relative_error(out.detach().cpu(), case.out)}
    for key, expected in case.grads.items():
        if key.startswith("param."):
            grad = block.get_parameter(key.removeprefix("param.").replace("subset_attn.", "")).grad
        elif key == "map_values":
            grad = arguments["stacked_feature_maps"].grad
            grad = None if grad is None else grad.coalesce().values()
        else:
            grad = arguments[key].grad
        assert grad is not None, key
        errors[key] = relative_error(grad.cpu(), expected)
    assert max(errors.values()) < TOLERANCE, errors


@settings(max_examples=8)
@given(
    scene=scenes(), background=st.booleans(), mask=st.booleans(), dropout=st.booleans(),
    bias=st.booleans(),
)  # fmt: skip
def test_any_scene(scene: Scene, background: bool, mask: bool, dropout: bool, bias: bool) -> None:
    dropout_p = 0.4 if dropout else 0.0
    options: dict[str, Any] = {"background": background, "mask": mask, "bias": bias}
    assert_exact(scene, heads=1, dropout_p=dropout_p, **options)


@pytest.mark.parametrize("n_queries", [1, TILE - 1, TILE, TILE + 1, 2 * TILE + 5])
def test_any_number_of_queries(n_queries: int) -> None:
    assert_exact(scene_2d(n_queries=n_queries, n_points=50), heads=1)


@pytest.mark.parametrize("n_points", [1, 31, 32, 33, 70])
def test_any_number_of_points(n_points: int) -> None:
    assert_exact(full_window_scene(20, n_points), heads=1)


@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (2, 33), (17, 16), (72, 5), (130, 256)])
def test_any_width(width: int, value_width: int) -> None:
    scene = scene_2d(n_queries=20, n_points=40)
    assert_exact(scene, heads=2, width=width, value_width=value_width, background=True)


def test_many_tiles() -> None:
    assert_exact(crowded_scene(100, 200), heads=2, mask=True)


@pytest.mark.parametrize("few", ["queries", "points"])
def test_few_rows_among_many_columns(few: str) -> None:
    """A tile is a single row if its rows are few, and of full height on the other side."""
    counts, n_points = ((3, 2), 200) if few == "queries" else ((20, 80), 3)
    scene = make_scene(((16, 10), (8, 5)), (7, 5), counts, n_points)
    plan = scene.plan().to(DEVICE)
    tiles = plan._query_tiles(back_end.find_runs), plan._point_tiles(back_end.find_runs)
    single, full = tiles if few == "queries" else tiles[::-1]
    assert len(single.firsts) == len(single.traversal)
    height = POINT_TILE if few == "queries" else TILE
    assert len(full.firsts) == math.ceil(len(full.traversal) / height)
    assert_exact(scene, heads=1, background=True, dropout_p=0.2)


@pytest.fixture(params=["all", "some", "none"])
def listed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tiles have a list; kernels search the runs of the others."""
    space = {"all": 2**14, "some": 5, "none": 0}[request.param]
    monkeypatch.setattr(triton_ops, "list_space", lambda *_: space)


@pytest.mark.usefixtures("listed")
def test_tiles_with_and_without_lists() -> None:
    scene = make_scene(((9, 7), (5, 4)), (3, 3), (30, 25), 60)
    assert_exact(scene, heads=2, background=True, mask=True, dropout_p=0.2)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    plan = full_window_scene(20, 30).plan()
    inputs = make_inputs(plan, background=True, heads=2)

    def attend(inputs: Inputs, name: BackendName) -> Answer:
        leaves = inputs.fresh()
        out, lse = leaves.attend(plan.to(DEVICE), name, scale=scale)
        (out.square().sum() + lse.sin().sum()).backward()
        return Answer(
            out.detach(), lse.detach(), tuple(x.grad for x in leaves.leaves() if x.grad is not None)
        )

    exact = on_cpu(attend(on_device(inputs, torch.float64), "reference"))
    actual = on_cpu(attend(on_device(inputs), "triton"))
    errors = [relative_error(actual.out, exact.out), relative_error(actual.lse, exact.lse)]
    errors += [relative_error(*pair) for pair in zip(actual.grads, exact.grads, strict=True)]
    assert max(errors) < TOLERANCE


def test_a_scale_of_nan_is_not_hidden() -> None:
    plan = full_window_scene(20, 30).plan().to(DEVICE)
    inputs = on_device(make_inputs(plan, heads=2))
    for backend in ("reference", "triton"):
        out, lse = inputs.attend(plan, backend, scale=math.nan)
        assert out.isnan().all()
        assert lse.isnan().all()


def test_windows_wider_than_a_block_of_cells() -> None:
    scene = make_scene(((60,), (9,)), (37, 5), (5, 8), 30)
    assert_exact(scene, heads=1, background=True, bias=True)


CAUSAL = (False, True)
SHAPES_OF_WINDOWS = {
    "per axis": ((3, 5), (1, 3)),
    "balls, one dilated": (Window(5, shape="ball"), Window(3, dilation=2, shape="ball")),
    "no level, dilated": (0, Window(3, dilation=(1, 2))),
    "causal, a causal ball": (Window((3, 4), causal=CAUSAL), Window((5, 2), 1, CAUSAL, "ball")),
}


@pytest.mark.parametrize("sizes", SHAPES_OF_WINDOWS.values(), ids=SHAPES_OF_WINDOWS)
def test_windows_of_other_shapes(sizes: tuple[Any, ...]) -> None:
    scene = make_scene(((8, 6), (4, 3)), sizes, (9, 0, 12), 50)
    assert_exact(scene, heads=1, background=True, bias=True, mask=True, dropout_p=0.2)


@pytest.mark.usefixtures("listed")
def test_balls_of_one_level_without_a_background() -> None:
    """Rows and columns have one level each, so that nothing but the op's arguments tells them."""
    scene = make_scene(((7, 7),), (Window((5, 3), 1, CAUSAL, "ball"),), (30,), 40)
    assert_exact(scene, heads=2, bias=True)


@pytest.mark.parametrize("n_same", [2, 40])
def test_a_bias_where_points_share_a_cell(n_same: int) -> None:
    """More than there are in a block, too."""
    coordinates = torch.tensor([[0, 3, 4, 0], [0, 3, 5, 0], [0, 1, 2, 1], [1, 3, 4, 0]])
    coordinates = coordinates.repeat(n_same, 1)
    pyramid = FeaturePyramid(torch.zeros(len(coordinates), 1), coordinates, ((8, 8), (4, 4)), 2)
    positions = torch.rand(20, 2, dtype=torch.float64) * 4 + 2
    assert_exact(Scene(positions, torch.tensor([0, 15, 20]), pyramid, (3, 3)), heads=1, bias=True)


@pytest.mark.parametrize("few", [False, True])
def test_a_bias_of_few_sums(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sums of its gradient take much memory, there are fewer; also for tiles of a row."""
    monkeypatch.setattr(triton_ops, "_BIAS_SUMS", 1)
    counts, n_points = ((2, 2), 200) if few else ((30, 20), 40)
    assert_exact(make_scene(((6, 5), (3, 3)), (3, 3), counts, n_points), heads=2, bias=True)


def test_a_bias_that_hides_cells() -> None:
    plan = scene_2d(n_queries=20, n_points=50).plan()
    inputs = make_inputs(plan, heads=1, bias=True, background=True)
    assert inputs.bias is not None
    inputs.bias[::3] = -math.inf
    exact = answer(inputs, plan, "reference")
    actual = on_cpu(answer(on_device(inputs), plan.to(DEVICE), "triton"))
    for result, expected in zip(
        (actual.out, *actual.grads), (exact.out, *exact.grads), strict=True
    ):
        assert relative_error(result, expected) < TOLERANCE


def test_a_bias_that_is_not_finite_reaches_its_pairs_alone() -> None:
    plan = scene_2d(n_queries=20, n_points=50).plan()
    inputs = on_device(make_inputs(plan, heads=1, bias=True))
    assert inputs.bias is not None
    clean, _ = inputs.attend(plan.to(DEVICE), "triton")
    inputs.bias[4] = math.nan
    out, _ = inputs.attend(plan.to(DEVICE), "triton")
    affected = out.isnan().all(-1).flatten()
    expected, _ = inputs.map(lambda x: x.cpu().double()).attend(plan, "reference")
    assert torch.equal(affected.cpu(), expected.isnan().all(-1).flatten())
    assert 0 < affected.sum() < 20
    assert same(out[~affected], clean[~affected])


@pytest.mark.usefixtures("runs_by_triton")
def test_more_slices_than_a_program_sorts() -> None:
    scene = make_scene(((4, 4, 4), (3, 3, 3)), (13, 3), (9, 9), 30)
    assert plan_ops.LARGEST_SORT < TILE * 13**2
    assert_exact(scene, heads=1)


def test_no_queries_no_points_and_no_heads() -> None:
    assert_exact(make_scene(((4,),), (3,), (0, 0), 6), background=True)
    assert_exact(make_scene(((4,),), (3,), (3, 2), 0), background=True)
    assert_exact(make_scene(((4,),), (3,), (3, 2), 5), heads=0)
    assert_exact(make_scene(((4,),), (3,), (3, 2), 5), value_width=0, background=True)


def test_tiny_scales_of_huge_logits() -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan)
    huge = inputs._replace(q=inputs.q * 2.0**60, k=inputs.k * 2.0**50)
    exact, _ = huge.attend(plan, "reference", scale=2.0**-110)
    actual, _ = on_device(huge).attend(plan.to(DEVICE), "triton", scale=2.0**-110)
    assert relative_error(actual.cpu(), exact) < TOLERANCE


def test_custom_scale() -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan)
    exact, _ = inputs.attend(plan, "reference", scale=0.9)
    actual, _ = on_device(inputs).attend(plan.to(DEVICE), "triton", scale=0.9)
    assert relative_error(actual.cpu(), exact) < TOLERANCE


def dense_attention(scene: Scene) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """Dense PyTorch attention in the dtype of the inputs; every query must have a neighbor."""
    mask = torch.zeros(len(scene.positions), len(scene.pyramid), dtype=torch.bool)
    for query, point in scene.pairs():
        mask[query, point] = True

    def attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("nhd,mhd->nhm", inputs.q, inputs.k) * inputs.q.shape[-1] ** -0.5
        logits = logits.masked_fill(~mask[:, None], -torch.inf)
        return torch.einsum("nhm,mhe->nhe", logits.softmax(-1), inputs.v), logits.logsumexp(-1)

    return attend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_precision_is_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    scene = full_window_scene(40, 60)
    scene.positions = scene.positions.clamp(0, 4)
    plan = scene.plan()
    inputs = make_inputs(plan, width=32, dtype=dtype)
    exact = answer(inputs.map(Tensor.double), plan, "reference")
    actual = on_cpu(answer(on_device(inputs, dtype), plan.to(DEVICE), "triton"))
    dense = differentiate(inputs, dense_attention(scene))
    results = ((x.out, *x.grads) for x in (actual, dense, exact))
    for result, dense_result, exact_result in zip(*results, strict=True):
        assert result.dtype == dtype
        error, dense_error = (
            (x.double() - exact_result).pow(2).mean().sqrt() for x in (result, dense_result)
        )
        assert 0 < error <= 2 * dense_error
    assert actual.lse.dtype == torch.float32
    assert relative_error(actual.lse, exact.lse) < 2e-5


@pytest.fixture
def restored_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter does not round to TF32")
def test_float32_is_rounded_only_where_torch_is_set_to() -> None:
    plan = full_window_scene(40, 60).plan()
    inputs = make_inputs(plan, width=32, dtype=torch.float32)
    exact = answer(inputs.map(Tensor.double), plan, "reference")
    errors = []
    for setting in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = setting
        actual = on_cpu(answer(on_device(inputs), plan.to(DEVICE), "triton"))
        errors.append(relative_error(actual.out, exact.out))
    assert errors[0] < TOLERANCE < errors[1]


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at launches, of which none runs")
@pytest.mark.parametrize(("setting", "expected"), [("ieee", "tf32x3"), ("tf32", "tf32")])
def test_products_of_float32_follow_the_setting_of_torch(
    setting: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def record(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        launched.append(options["PRECISION"])

    torch.backends.cuda.matmul.fp32_precision = setting
    plan = scene_2d().plan()
    plan._query_tiles(back_end.find_runs, back_end.find_lists)
    plan._point_tiles(back_end.find_runs, back_end.find_lists)
    monkeypatch.setattr(triton_ops, "launch", record)
    for dtype in (torch.float32, torch.bfloat16):
        answer(on_device(make_inputs(plan), dtype), plan, "triton")
    assert launched == [expected] * 3 + ["ieee"] * 3


def test_the_same_bits_twice(uninitialized_is_nan: None) -> None:
    plan = crowded_scene(40, 80).plan().to(DEVICE)
    inputs = on_device(make_inputs(plan, background=True, mask=True, bias=True, heads=1))
    first, second = (answer(inputs, plan, "triton", dropout_p=0.3) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
    for left, right in zip(first.grads, second.grads, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_gradients_do_not_depend_on_which_are_needed(name: BackendName) -> None:
    """Neither on which inputs are frozen, nor on which gradients are requested."""
    device = torch.device("cpu") if name == "cpu" else DEVICE
    plan = make_scene(((6, 4), (5, 5)), (3, 3), (7, 11), 30).plan().to(device)
    options: dict[str, Any] = {"background": True, "bias": True, "dtype": torch.float32}
    inputs = make_inputs(plan.to("cpu"), heads=1, **options)
    leaves = inputs.map(lambda x: x.to(device)).fresh()
    out, lse = leaves.attend(plan, name)
    loss = out.square().sum() + lse.sin().sum()
    expected = torch.autograd.grad(loss, leaves.leaves(), retain_graph=True)
    # q; v; the bias; the background's value; q and the background's key; k and its value.
    for numbers in ((0,), (2,), (3,), (6,), (0, 5), (1, 6)):
        some, expected_some = ([x[i] for i in numbers] for x in (leaves.leaves(), expected))
        found = torch.autograd.grad(loss, some, retain_graph=True)
        frozen = [x.detach() for x in leaves.leaves()]
        not_frozen = [frozen[i].requires_grad_() for i in numbers]
        out, lse = leaves.with_leaves(frozen).attend(plan, name)
        (out.square().sum() + lse.sin().sum()).backward()
        for leaf, grad, expected_grad in zip(not_frozen, found, expected_some, strict=True):
            assert expected_grad.count_nonzero()
            assert torch.equal(grad, expected_grad)
            assert leaf.grad is not None
            assert relative_error(leaf.grad.cpu(), expected_grad.cpu().double()) < 1e-6


def test_strides_of_any_kind() -> None:
    """A slice of a wider tensor, heads before rows, strided channels, an expanded gradient."""
    plan = scene_2d().plan().to(DEVICE)
    inputs = on_device(make_inputs(plan, width=6))
    wide = torch.cat((inputs.k, inputs.v), 2)
    k, v = wide.split(6, 2)
    q = inputs.q.transpose(0, 1).contiguous().transpose(0, 1)
    strided = inputs.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert strided.stride(2) != 1
    expected, _ = inputs.attend(plan, "triton")
    for queries in (q, strided):
        leaf = queries.detach().requires_grad_()
        out = neighborhood_attention(leaf, k, v, plan, backend="triton")
        assert torch.equal(out.detach(), expected)
        out.sum().backward()
        grad = leaf.grad
        plain = inputs.q.clone().requires_grad_()
        (neighborhood_attention(plain, k, v, plan, backend="triton") * 1.0).sum().backward()
        assert grad is not None
        assert torch.equal(grad, plain.grad)  # type: ignore[arg-type]


# ------------------------------------------------------------------------ non-finite numbers


def same(actual: Tensor, expected: Tensor) -> bool:
    """To the bit; on a GPU to rounding, where the loop for numbers that are not finite adds in
    another order.
    """
    if triton_ops.INTERPRETS:
        return torch.equal(actual, expected)
    return relative_error(actual, expected) < TOLERANCE


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_non_finite_inputs_reach_their_neighborhoods_alone(name: str, value: float) -> None:
    scene = scene_2d(n_queries=20, n_points=60)
    plan = scene.plan()
    inputs = on_device(make_inputs(plan, heads=2)).fresh()
    pairs, head = plan.pairs(), 1
    index = int(pairs[0, 0 if name == "q" else 1])
    poisoned = getattr(inputs, name).detach().clone()
    poisoned[index, head, 1] = value
    poisoned.requires_grad_()
    poisoned_inputs = inputs._replace(**{name: poisoned})
    with_index = pairs[:, 0] == index if name == "q" else pairs[:, 1] == index
    affected_queries = pairs[with_index, 0].unique()
    # All neighbors of these queries get their gradient from a non-finite result.
    affected_points = pairs[(pairs[:, :1] == affected_queries).any(1), 1].unique()

    out, _ = poisoned_inputs.attend(plan.to(DEVICE), "triton")
    clean, _ = inputs.attend(plan.to(DEVICE), "triton")
    queries = torch.ones(out.shape[:2], dtype=torch.bool)  # unaffected ones
    queries[affected_queries, head] = False
    assert same(out.detach().cpu()[queries], clean.detach().cpu()[queries])
    assert not out.detach().cpu()[~queries].isfinite().all(-1).any()

    out.sum().backward()
    clean.sum().backward()
    points = torch.ones(inputs.k.shape[:2], dtype=torch.bool)
    points[affected_points, head] = False
    for leaf, clean_leaf, unaffected in zip(
        poisoned_inputs[:3], inputs[:3], (queries, points, points), strict=True
    ):
        if leaf is clean_leaf:  # it has the gradients of both backward passes
            continue
        grad, expected = leaf.grad, clean_leaf.grad
        assert grad is not None
        assert expected is not None
        assert same(grad.cpu()[unaffected], expected.cpu()[unaffected])


@pytest.mark.usefixtures("listed")
def test_non_finite_gradients_reach_their_neighborhoods_alone() -> None:
    plan = scene_2d(n_queries=20, n_points=60).plan()
    inputs = on_device(make_inputs(plan, heads=1))
    grads = []
    for poison in (False, True):
        leaves = inputs.fresh()
        out, _ = leaves.attend(plan.to(DEVICE), "triton")
        cotangent = torch.ones_like(out)
        if poison:
            cotangent[3, 0, 0] = math.nan
        out.backward(cotangent)
        grads.append([leaf.grad.cpu() for leaf in leaves.leaves()])  # type: ignore[union-attr]
    pairs = plan.pairs()
    points = torch.ones(plan.n_points, dtype=torch.bool)
    points[pairs[pairs[:, 0] == 3, 1]] = False
    assert 0 < points.sum() < plan.n_points
    queries = torch.arange(20) != 3
    for (clean, poisoned), unaffected in zip(
        zip(*grads, strict=True), (queries, points, points), strict=True
    ):
        assert same(clean[unaffected], poisoned[unaffected])
        assert not poisoned[~unaffected].isfinite().all(-1).any()


# ---------------------------------------------------------------------------- rotation, plan


@pytest.mark.parametrize("pattern", ["single", "closure"])
@pytest.mark.parametrize("extent", [1.0, 1e3])
def test_rotation(pattern: str, extent: float) -> None:
    torch.manual_seed(1)
    width = 34 if pattern == "single" else 18
    options: dict[str, Any] = {
        "freq_group_pattern": pattern,
        "enforce_freq_groups_equal": False,
    }
    exact = RotaryEncoding(width, 3, 2, **options).double()
    encoding = RotaryEncoding(width, 3, 2, backend="triton", **options).to(DEVICE)
    encoding.load_state_dict(exact.state_dict())
    exact.load_state_dict(encoding.state_dict())  # both have the frequencies as float32
    x = torch.randn(130, 3, width)
    coordinates = torch.rand(130, 3) * extent
    x64, coordinates64 = (leaf.double().requires_grad_() for leaf in (x, coordinates))
    expected = rotate_by_hand(exact, x64, coordinates64)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in (x, coordinates)]
    rotated = encoding(*leaves)
    assert rotated.dtype == torch.float32
    cotangent = torch.randn(x.shape)
    expected.backward(cotangent.double())
    rotated.backward(cotangent.to(DEVICE))
    assert relative_error(rotated.detach().cpu(), expected.detach()) < TOLERANCE
    pairs = [(leaves[0].grad, x64.grad), (leaves[1].grad, coordinates64.grad)]
    pairs += [(p.grad, e.grad) for p, e in zip(encoding.freqs, exact.freqs, strict=True)]
    for grad, expected_grad in pairs:
        assert grad is not None
        assert expected_grad is not None
        assert relative_error(grad.cpu(), expected_grad) < TOLERANCE


def test_rotation_by_large_coordinates_in_float64() -> None:
    """In float32, cells 2^25 and 2^25 + 1 would be rotated alike."""
    encoding = RotaryEncoding(4, 1, 1, backend="triton").to(DEVICE)
    coordinates = torch.tensor([[2.0**25, 0.0], [2.0**25 + 1, 0.0]], dtype=torch.float64)
    x = torch.ones(2, 1, 4)
    exact = RotaryEncoding(4, 1, 1).double()
    exact.load_state_dict(encoding.state_dict())
    expected = rotate_by_hand(exact, x.double(), coordinates)
    rotated = encoding(x.to(DEVICE), coordinates.to(DEVICE)).detach().cpu()
    assert relative_error(rotated, expected.detach()) < TOLERANCE


def test_rotation_converts_float32_coordinates_and_frequencies_itself() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(70, 2, 6, generator=generator).to(DEVICE)
        coordinates, frequencies = (
            (torch.rand(shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()
            for shape, scale in (((70, 3), 1e4), ((3, 2, 3), 1.0))
        )
        out = back_end.BACKEND.rotate(x, coordinates, frequencies)
        grads = torch.autograd.grad(out.square().sin().sum(), (coordinates, frequencies))
        found.append([out.detach(), *(grad.float() for grad in grads)])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@settings(max_examples=10)
@given(scene=scenes(), rows=st.sampled_from([1, 4, TILE]), is_long=st.booleans())
@pytest.mark.usefixtures("runs_by_triton")
def test_runs(scene: Scene, rows: int, is_long: bool) -> None:
    """The reference's runs; their entries are the columns of the tile's slices, each once."""
    plan = scene.plan()
    slices = plan._tensors.query_slices
    n_slices = plan._tensors.slices_per_level()
    first_slices = [sum(n_slices[:level]) for level in range(len(n_slices))]
    n_columns = 2**31 - 1 if is_long else len(slices.order)  # then keys are int64
    expected = reference.find_runs(*slices[:3], n_columns, n_slices, rows)
    traversal, starts, stops = (part.to(DEVICE) for part in slices[:3])
    found = back_end.find_runs(traversal, starts, stops, n_columns, n_slices, rows)
    assert torch.equal(found[2].cpu(), expected[2])
    for tile, counts in enumerate(expected[2].tolist()):
        for level, (n_runs, n_entries) in enumerate(counts):
            first_slice = first_slices[level]
            runs = slice(rows * first_slice, rows * first_slice + n_runs)
            for actual, wanted in zip(found[:2], expected[:2], strict=True):
                assert torch.equal(actual.cpu()[tile, runs], wanted[tile, runs])
            firsts, shifts = (part[tile, runs] for part in expected[:2])
            entries = torch.arange(n_entries)
            run = torch.searchsorted(firsts, entries.int(), right=True) - 1
            columns = entries + shifts[run]
            members = slices.traversal[tile * rows : (tile + 1) * rows].tolist()
            union = {
                column
                for row in members
                for index in range(first_slice, first_slice + n_slices[level])
                for column in range(slices.starts[row, index], slices.stops[row, index])
            }
            assert columns.tolist() == sorted(union)


def members_of(tiles: Tiles, n_slices: int) -> set[tuple[int, int]]:
    """(row, item) of all lists, each once; the lists do not overlap."""
    rows = tiles.firsts.shape[1] // n_slices
    found: list[tuple[int, int]] = []
    blocks: list[int] = []
    for tile, (first, n_blocks) in enumerate(tiles.lists.tolist()):
        entries = slice(first * LIST_BLOCK, (first + n_blocks) * LIST_BLOCK)
        blocks += range(first, first + n_blocks)
        own = tiles.traversal[tile * rows : (tile + 1) * rows].tolist()
        for item, members in zip(
            tiles.items[entries].tolist(), tiles.members[entries].tolist(), strict=True
        ):
            found += [(row, item) for i, row in enumerate(own) if members >> i & 1]
    assert len(set(blocks)) == len(blocks)
    assert len(set(found)) == len(found)
    return set(found)


@settings(max_examples=10)
@given(scene=scenes())
def test_lists_hold_every_pair_once(scene: Scene) -> None:
    plan = scene.plan().to(DEVICE)
    pairs = {(query, point) for query, point in plan.pairs().tolist()}
    find, slices = (back_end.find_runs, back_end.find_lists), plan._tensors.slices_per_level()
    assert members_of(plan._query_tiles(*find), sum(slices)) == pairs
    assert members_of(plan._point_tiles(*find), max(slices)) == {
        (point, query) for query, point in pairs
    }


def test_tiles_without_space_have_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "list_space", lambda *_: 9)
    tiles = crowded_scene(100, 200).plan().to(DEVICE)._query_tiles(
        back_end.find_runs, back_end.find_lists
    )  # fmt: skip
    listed = tiles.lists[:, 1] >= 0
    assert listed.any()
    assert not listed.all()
    assert int(tiles.lists.sum(1).max()) <= 9


# ----------------------------------------------------------------------------- bounds of buffers


def bad_plan(scene: Scene) -> NeighborhoodPlan:
    """Unsorted offsets, non-finite positions, and points outside the map, images and levels."""
    scene.positions[::5] = math.nan
    scene.positions[1] = math.inf
    scene.positions[2] = -1e30
    coordinates = scene.pyramid.coordinates.clone()
    coordinates[::7, 1] = 10**9
    coordinates[1::7, 2] = -5
    coordinates[2::7, 0] = 77
    coordinates[3::7, -1] = -(2**40)
    values, shapes = scene.pyramid.values.to(DEVICE), scene.pyramid.level_shapes
    pyramid = FeaturePyramid(values, coordinates.to(DEVICE), shapes, 3, check_contents=False)
    offsets = torch.tensor([9, 3, 2**40, -5], device=DEVICE)
    return plan_neighborhoods(
        scene.positions.to(DEVICE), offsets, pyramid, scene.sizes, check_contents=False
    )


@pytest.mark.usefixtures("runs_by_triton")
@pytest.mark.parametrize("bad", [False, True])
def test_kernels_stay_in_their_buffers(
    bad: bool, checked: Checked | None, uninitialized_is_nan: None
) -> None:
    """With invalid contents as well, and invalid queries and points are masked."""
    scene = scene_2d(n_queries=19, n_points=45)
    scene.sizes = (3, Window(5, shape="ball"), (3, 1))
    plan = bad_plan(scene) if bad else scene.plan()
    inputs = make_inputs(plan, heads=1, width=5, background=True, mask=True, bias=True)
    plan = plan.to(DEVICE)
    exact = on_cpu(answer(on_device(inputs, torch.float64), plan, "reference", dropout_p=0.2))
    actual = on_cpu(answer(on_device(inputs), plan, "triton", dropout_p=0.2))
    results = ((x.out, x.lse, *x.grads) for x in (actual, exact))
    for result, expected in zip(*results, strict=True):
        assert relative_error(result, expected) < TOLERANCE
    encoding = RotaryEncoding(6, 1, 2, backend="triton").to(DEVICE)
    x = torch.randn(19, 1, 6, device=DEVICE).requires_grad_()
    encoding(x, torch.full((19, 3), math.nan, device=DEVICE)).sum().backward()
    assert checked is None or checked.n_checked > 10_000


@pytest.mark.parametrize("background", [False, True])
def test_a_strided_mask(background: bool, checked: Checked | None) -> None:
    """As a column of a table is, and a mask that holds one number."""
    scene = scene_2d(n_queries=19, n_points=45)
    plan = scene.plan().to(DEVICE)
    inputs = on_device(make_inputs(plan, heads=1, background=background, mask=True))
    assert inputs.query_mask is not None
    table = torch.stack((inputs.query_mask, ~inputs.query_mask), 1)
    for mask in (table[:, 1], torch.ones(1, dtype=torch.bool, device=DEVICE).expand(19)):
        actual, expected = (
            answer(inputs._replace(query_mask=own), plan, "triton")
            for own in (mask, mask.clone(memory_format=torch.contiguous_format))
        )
        assert torch.equal(actual.out, expected.out)
        assert torch.equal(actual.lse, expected.lse)
        for grad, other in zip(actual.grads, expected.grads, strict=True):
            assert torch.equal(grad, other)


def test_lists_of_forged_counts_stay_in_their_blocks() -> None:
    plan = scene_2d(n_queries=TILE + 3, n_points=25).plan().to(DEVICE)
    with OwnOps("vicinal_triton") as ops:
        on_device(make_inputs(plan, heads=1)).attend(plan, "triton")
    find_lists, (tiles, *windows) = ops.calls["find_lists"]
    lists, *expected = find_lists(tiles, *windows)
    assert lists[0].tolist() == [0, 1]
    forged_counts = tiles[4].clone()
    assert forged_counts.shape[:2] == (2, 3)
    forged_counts[1, 0, 1] = -LIST_BLOCK  # entries of the second tile's first level
    found = find_lists([*tiles[:4], forged_counts, *tiles[5:]], *windows)[1:]
    for actual, before in zip(found, expected, strict=True):
        assert torch.equal(actual[:LIST_BLOCK], before[:LIST_BLOCK])


@pytest.mark.parametrize("seed", range(4))
def test_forged_plans_stay_in_their_buffers(seed: int, checked: Checked | None) -> None:
    scene = scene_2d(n_queries=19, n_points=45)
    scene.sizes = (3, Window(5, shape="ball"), (3, 1))
    plan = scene.plan().to(DEVICE)
    background = seed == 0  # its loops over garbage take long
    inputs = on_device(make_inputs(plan, heads=1, width=5, background=background, bias=True))
    ids = torch.arange(45, device=DEVICE)
    plan = plan.with_dropout_ids(ids[:19], ids, 45)
    with OwnOps("vicinal_triton") as forward:
        inputs.attend(plan, "triton", dropout_p=0.1)
    with OwnOps("vicinal_triton") as step:
        out, _ = inputs.fresh().attend(plan, "triton", dropout_p=0.1)
        out.sum().backward()
    assert "find_lists" in forward.calls.keys() & step.calls.keys()  # of queries, then of points
    generator = torch.Generator().manual_seed(seed)
    for op, arguments in (*forward.calls.values(), *step.calls.values()):
        garbage = [
            [forged(part.cpu(), seed % 4 + 1, generator).to(DEVICE) for part in x]
            if isinstance(x, list) and x and isinstance(x[0], Tensor) and x[0].dtype == torch.int32
            else x
            for x in arguments
        ]
        op(*garbage)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()  # an error belongs to this test
    assert checked is None or checked.n_checked


@pytest.mark.skipif(DEVICE.type == "cuda", reason="checks the interpreter")
def test_the_bounds_are_checked(checked: Checked) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, dtype=torch.float32)
    allow = checked.allow

    def allow_all_but_the_last(arguments: Any) -> None:
        allow(arguments)
        checked.ranges = checked.ranges[:-1]

    checked.allow = allow_all_but_the_last  # type: ignore[method-assign]
    with pytest.raises(Exception, match="out of bounds"):
        inputs.attend(plan, "triton")


# ----------------------------------------------------------------------------- ops of torch


@pytest.mark.usefixtures("runs_by_triton")
def test_opcheck(uninitialized_is_nan: None) -> None:  # lists have meaningless entries
    scene = make_scene(((5, 4), (3, 3)), (3, Window(3, shape="ball")), (4, 2), 9)
    plan = scene.plan().to(DEVICE)
    with OwnOps("vicinal_triton") as ops:
        options: dict[str, Any] = {"background": True, "mask": True, "bias": True}
        inputs = on_device(make_inputs(plan, heads=1, **options)).fresh()
        inputs.attend(plan, "triton", dropout_p=0.1)[0].sum().backward()
        encoding = RotaryEncoding(4, 2, 2, backend="triton").to(DEVICE)
        encoding(inputs.q.expand(-1, 2, -1), torch.rand(6, 3, device=DEVICE)).sum().backward()
        slices = plan._tensors.query_slices
        back_end.find_runs(*slices[:3], len(slices.order), plan._tensors.slices_per_level(), TILE)
    assert len(ops.calls) == (
        6 if triton_ops.INTERPRETS else 7
    )  # on a GPU, it finds the lists, too
    backward, arguments = ops.calls["neighborhood_attention_backward"]
    for needs in ((False, True), (True, False)):
        leaves = as_leaves((*arguments[:-2], *needs), requires_grad=False)
        opcheck(backward, leaves, test_utils=("test_schema", "test_faketensor"))
    for name, (op, arguments) in ops.calls.items():
        differentiable = name in ("neighborhood_attention", "rotate")
        opcheck(op, as_leaves(arguments, requires_grad=differentiable))


def test_autocast_keeps_positions_exact() -> None:
    """In bfloat16, cells 300 and 301 would be one."""
    cells = torch.arange(290, 310)[:, None]
    pyramid = FeaturePyramid(
        torch.randn(20, 8, device=DEVICE),
        torch.nn.functional.pad(cells, (1, 1)).to(DEVICE),
        ((400,),),
        1,
    )
    block = SparseNeighborhoodAttentionBlock(8, 2, 1, [3], 1, backend="triton").to(DEVICE)
    arguments = pyramid.positions(), pyramid.batch_offsets(), pyramid
    exact = block(pyramid.values, *arguments)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rounded = block(pyramid.values, *arguments)
    assert rounded.dtype == torch.float32
    assert 0 < relative_error(rounded.detach().cpu(), exact.detach().cpu().double()) < 2e-2


@pytest.mark.parametrize(
    "options",
    [
        {"point_dim": 5, "rope_axis_scales": (0.3, 4.0)},
        {"point_dim": 20, "rotary": False},
        {"rope_axis_scales": (1 / 3, 1.0), "rope_freq_group_pattern": "closure"},
    ],
)
def test_options_of_the_block(options: dict[str, Any]) -> None:
    scene = scene_2d()
    width = options.get("point_dim", 12)
    drawn = [torch.randn(*shape) for shape in ((12, 12), (60, width), (3, 3, width))]
    answers = []
    cases: tuple[tuple[BackendName, torch.dtype, torch.device], ...] = (
        ("reference", torch.float64, torch.device("cpu")),
        ("triton", torch.float32, DEVICE),
    )
    for name, dtype, device in cases:
        torch.manual_seed(0)
        block = SparseNeighborhoodAttentionBlock(12, 2, 3, scene.sizes, backend=name, **options).to(
            device, dtype
        )
        query, values, background = (x.to(device, dtype, copy=True).requires_grad_() for x in drawn)
        pyramid = scene.pyramid.to(device).with_values(values)
        positions, offsets = scene.positions.to(device), scene.offsets.to(device)
        out = block(query, positions, offsets, pyramid, background_embedding=background)
        leaves = [query, values, background, *block.parameters()]
        answers.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for exact, ours in zip(*answers, strict=True):
        assert relative_error(ours.detach().cpu(), exact.detach()) < 2e-5


def test_choice_of_back_end() -> None:
    if DEVICE.type == "cuda":
        assert choose_backend(None, DEVICE, torch.float32).attend is back_end.BACKEND.attend
        assert choose_backend(None, DEVICE, torch.bfloat16).attend is back_end.BACKEND.attend
    assert choose_backend(None, DEVICE, torch.float64).attend is not back_end.BACKEND.attend
    with pytest.raises(ValueError, match=r"backend: .*float64"):
        choose_backend("triton", DEVICE, torch.float64)
    with pytest.raises(ValueError, match=r"backend: .*float8_e5m2"):
        choose_backend("triton", DEVICE, torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"backend: .*256"):
        choose_backend("triton", DEVICE, torch.float32, 257)
    assert choose_backend(None, DEVICE, torch.float32, 257).attend is not back_end.BACKEND.attend
    with pytest.raises(ValueError, match=r"backend: .*GPU"):
        choose_backend("triton", torch.device("meta"), torch.float32)


def test_maps_too_large_for_32_bits_are_refused() -> None:
    scene = make_scene(((2**31,),), (3,), (2,), 3)
    plan, inputs = scene.plan(), make_inputs(scene.plan(), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"level_shapes: .*2\^30"):
        on_device(inputs).attend(plan.to(DEVICE), "triton")
