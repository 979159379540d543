"""Multilinear sampling of sparse maps, by torch's ops and by kernels of back ends.

Those of Triton run on a GPU if there is one, else interpreted, so on small problems.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounds import Checked
from deformable_scenes import EXACT
from problems import assert_close, make_scene, opcheck
from torch import Tensor

from vicinal import FeaturePyramid, backends
from vicinal._index import sampling
from vicinal._index.cell_hash import CellIndex, index_cells
from vicinal._utils.types import BackendName
from vicinal.backends import triton

# Triton's interpreter computes with NumPy, which warns about values that kernels mask.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

PLAIN = sampling.sample
HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = HAS_TRITON and not triton.interprets()
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
KERNELS = ["cpu", pytest.param("triton", marks=NEEDS_TRITON)]


@pytest.fixture(params=[*KERNELS, "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BackendName:
    """A back end that samples; the reference has torch's ops, which other devices use."""
    use(request.param, monkeypatch)
    name: BackendName = request.param
    return name


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BackendName:
    """A back end with a kernel of its own."""
    use(request.param, monkeypatch)
    name: BackendName = request.param
    return name


def use(name: BackendName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "choose_backend", lambda *_: backends._BACKENDS[name])
    monkeypatch.setattr(sampling, "sample", sample_on_gpu if on_gpu(name) else PLAIN)


def on_gpu(name: BackendName) -> bool:
    return name == "triton" and ON_GPU


def sample_on_gpu(table: Tensor, index: CellIndex, *others: Tensor) -> Tensor:
    moved: dict[str, Any] = {
        name: x.cuda() if isinstance(x, Tensor) else x for name, x in vars(index).items()
    }
    return PLAIN(table.cuda(), CellIndex(**moved), *(x.cuda() for x in others)).cpu()


@pytest.mark.usefixtures("implementation")
# Triton's kernels are held against the others, whose calls take less time.
@pytest.mark.parametrize("implementation", ["cpu", "reference"], indirect=True)
@pytest.mark.parametrize("background", [False, True])
def test_gradcheck(background: bool) -> None:
    scene = make_scene(((3, 2), (2, 4)), (1, 1), (2, 1), 8)
    index, images = index_cells(scene.pyramid), torch.tensor([0, 0, 1])
    rows = index.n_cells + (4 if background else 0)

    def sample(table: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return sampling.sample(table, index, images, locations, weights)

    table = torch.randn(rows, 2, 2, dtype=torch.float64, requires_grad=True)
    locations = (4 * torch.rand(3, 2, 2, 2, 2, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sample, (table, locations, weights))


@pytest.mark.usefixtures("implementation")
def test_one_row_of_empty_cells() -> None:
    """One image and one level have one, which is no row of zeros."""
    index = index_cells(FeaturePyramid(torch.zeros(1, 1), torch.tensor([[0, 1, 0]]), ((4,),), 1))
    table = torch.tensor([[[1.0]], [[10]]], dtype=torch.float64).requires_grad_()
    locations = torch.tensor([1.75, 3.5], dtype=torch.float64).view(2, 1, 1, 1, 1).requires_grad_()
    weights = torch.ones(2, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    out = sampling.sample(table, index, torch.tensor([0, 0]), locations, weights)
    assert out.flatten().tolist() == [0.75 * 1 + 0.25 * 10, 10]
    grads = torch.autograd.grad(out.sum(), (table, locations, weights))
    expected = [0.75, 0.25 + 1], [10 - 1, 0], [3.25, 10]
    assert [grad.flatten().tolist() for grad in grads] == [list(x) for x in expected]


def sampled_weights() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`sample` as a function of the weights, and weights."""
    scene = make_scene(((3, 2), (2, 4)), (1, 1), (2, 1), 8)
    index, images = index_cells(scene.pyramid), torch.tensor([0, 1])
    table = torch.randn(index.n_cells + 4, 1, 2, dtype=torch.float64)
    locations = 4 * torch.rand(2, 1, 2, 2, 2, dtype=torch.float64)
    weights = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    return lambda x: sampling.sample(table, index, images, locations, x), weights


@pytest.mark.usefixtures("implementation")
def test_transforms() -> None:
    sample, weights = sampled_weights()
    expected = torch.autograd.functional.jacobian(sample, weights)
    assert_close(torch.func.jacrev(sample)(weights), expected, EXACT)
    both = torch.func.vmap(sample)(torch.stack((weights, 2 * weights)))
    assert_close(both, torch.stack((sample(weights), sample(2 * weights))), EXACT)


@pytest.mark.usefixtures("implementation")
# Torch itself uses it, when forward mode is first used in a process.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_other_derivatives_are_refused() -> None:
    sample, weights = sampled_weights()
    leaf = weights.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sample(leaf).pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(sample, (weights,), (weights,))


@pytest.mark.usefixtures("implementation")
def test_linear_functions_are_interpolated_exactly_in_four_dimensions() -> None:
    shape, dim = (4, 3, 4, 3), 4
    cells = torch.cartesian_prod(*[torch.arange(size) for size in shape])
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    table = ((cells.double() + 0.5) @ slope)[:, None, None]
    coordinates = F.pad(cells, (1, 1))
    pyramid = FeaturePyramid(torch.zeros(len(cells), 1), coordinates, (shape,), 1)
    spans = torch.tensor([3.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    locations = 0.5 + spans * torch.rand(20, 1, 1, 1, dim, dtype=torch.float64)
    weights = torch.ones(20, 1, 1, 1, dtype=torch.float64)
    images = torch.zeros(20, dtype=torch.int64)
    out = sampling.sample(table, index_cells(pyramid), images, locations, weights)
    assert_close(out.flatten(), (locations @ slope).flatten(), EXACT)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("size", [2**24 + 1, 2**28 + 17, 2**40 + 2**16 + 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_far_beyond_a_large_map_are_empty(size: int, dtype: torch.dtype) -> None:
    """Its size is no float32: less by one, greater by 15, greater by 65,436."""
    cells = torch.tensor([0, 8, 9, 10, 65_429, 65_430, 65_431, size - 1])
    images = torch.arange(2).repeat_interleave(len(cells))
    coordinates = torch.stack((images, cells.repeat(2), torch.zeros_like(images)), 1)
    pyramid = FeaturePyramid(torch.zeros(len(images), 1), coordinates, ((size,),), 2)
    far = [math.ldexp(1, exponent) for exponent in (42, 62, 63, 64, 100)]
    far += [-value for value in far]
    locations = torch.tensor(far, dtype=dtype).view(-1, 1, 1, 1, 1)
    weights = torch.ones(len(far), 1, 1, 1, dtype=dtype)
    index, image = index_cells(pyramid), torch.zeros(len(far), dtype=torch.int64)
    table = torch.ones(index.n_cells, 1, 1, dtype=dtype)
    assert not sampling.sample(table, index, image, locations, weights).any()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("size", [8, 2**24 + 1, 2**24 + 3, 2**40 + 2**16 + 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_maps_repeat_after_their_exact_size(size: int, dtype: torch.dtype) -> None:
    """The cell before the first is the last one, also where the size is no float32."""
    cells = torch.tensor([[0, 0, 0], [0, size - 1, 0]])
    pyramid = FeaturePyramid(torch.zeros(2, 1), cells, ((size,),), 1, periodic_axes=(0,))
    table = torch.tensor([1.0, 10], dtype=dtype).view(2, 1, 1)
    far = math.ldexp(1, 63)  # beyond any map
    locations = torch.tensor([0.25, 0.5, -0.5, far, -far], dtype=dtype).view(5, 1, 1, 1, 1)
    images, weights = torch.zeros(5, dtype=torch.int64), torch.ones(5, 1, 1, 1, dtype=dtype)
    out = sampling.sample(table, index_cells(pyramid), images, locations, weights)
    assert out.flatten().tolist() == [0.75 * 1 + 0.25 * 10, 1, 10, 0, 0]


def random_arguments(
    dim: int, width: int, background: bool, periodic: bool, dtype: torch.dtype,
    small: bool = False,
) -> tuple[CellIndex, tuple[Tensor, ...]]:  # fmt: skip
    """An index, and what `sample` takes besides it: queries on two images of three levels."""
    n_queries, n_points, heads = (9, 18, 2) if small else (40, 120, 3)
    generator = torch.Generator().manual_seed(dim)
    shapes = tuple((size,) * dim for size in (9, 5, 2))
    cells = torch.randint(0, 9, (n_points, dim + 2), generator=generator)
    cells[:, 0] %= 2
    cells[:, -1] = torch.arange(n_points) % 3
    cells[:, 1:-1] %= torch.tensor([9, 5, 2])[cells[:, -1], None]
    axes = (0,) if periodic else ()
    pyramid = FeaturePyramid(torch.zeros(n_points, 1), cells, shapes, 2, periodic_axes=axes)
    index = index_cells(pyramid)
    rows = index.n_cells + (6 if background else 0)
    table = torch.randn(rows, heads, width, dtype=dtype, generator=generator)
    sizes = n_queries, heads, 3, 2
    locations = 16 * torch.rand(*sizes, dim, dtype=dtype, generator=generator) - 3
    weights = torch.randn(*sizes, dtype=dtype, generator=generator)
    return index, (table, torch.arange(n_queries) % 2, locations, weights)


def sample_with_gradients(index: CellIndex, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    table, images, locations, weights = arguments
    leaves = [x.clone().requires_grad_() for x in (table, locations, weights)]
    out = sampling.sample(leaves[0], index, images, leaves[1], leaves[2])
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_agreement(
    index: CellIndex, arguments: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Compares the kernel with torch's ops; returns its output and gradients."""
    found = sample_with_gradients(index, arguments)
    exact = arguments[0].dtype == torch.float64
    use("reference", monkeypatch)
    for actual, expected in zip(found, sample_with_gradients(index, arguments), strict=True):
        assert_close(actual, expected, EXACT if actual.dtype == torch.float64 and exact else 1e-4)
    return found


PROBLEMS = [
    (dim, width, background, periodic, dtype)
    for dim, width in ((1, 8), (2, 21), (3, 1), (4, 16))
    for background, periodic in itertools.product((False, True), repeat=2)
    for dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *(("cpu", problem) for problem in PROBLEMS),
        *(pytest.param("triton", problem, marks=NEEDS_TRITON) for problem in PROBLEMS[::5]),
    ],
)
def test_the_kernel_agrees_with_torch(
    name: BackendName,
    problem: tuple[int, int, bool, bool, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(name, monkeypatch)
    small = name == "triton" and not ON_GPU
    index, arguments = random_arguments(*problem, small=small)
    assert_agreement(index, arguments, monkeypatch)


@pytest.mark.parametrize(
    ("dim", "width", "sizes"),
    [
        (2, 300, (2, 1, 2, 1)),  # more channels than a program of Triton takes
        (6, 3, (1, 1, 1, 2)),  # more corners
        (1, 2, (70, 1, 1, 1)),  # fewer
        (2, 0, (2, 1, 2, 1)),
        (2, 4, (3, 1, 2, 0)),
        (2, 4, (3, 0, 2, 1)),
        (2, 4, (0, 2, 2, 1)),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_unusual_sizes(
    dim: int, width: int, sizes: tuple[int, ...], background: bool, kernel: BackendName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    n_queries, heads, n_levels, _ = sizes
    cells = torch.randint(0, 2, (12, dim + 2))
    cells[:, 0] = 0
    cells[:, -1] %= n_levels
    pyramid = FeaturePyramid(torch.zeros(12, 1), cells, ((2,) * dim,) * n_levels, 1)
    index = index_cells(pyramid)
    table = torch.randn(index.n_cells + background * n_levels, heads, width)
    locations, weights = 4 * torch.rand(*sizes, dim) - 1, torch.randn(sizes)
    images = torch.zeros(n_queries, dtype=torch.int64)
    arguments = tuple(
        x.double() if x.is_floating_point() else x for x in (table, images, locations, weights)
    )
    if weights.numel() and width:  # torch's ops refuse others
        assert_agreement(index, arguments, monkeypatch)
    else:
        assert not any(x.any() for x in sample_with_gradients(index, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_locations_in_another_dtype(
    dtype: torch.dtype, kernel: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, (table, images, locations, weights) = random_arguments(2, 5, True, True, dtype, True)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    found = assert_agreement(index, (table, images, locations.to(other), weights), monkeypatch)
    assert [x.dtype for x in found] == [dtype, dtype, other, dtype]


def test_strides_of_any_kind(kernel: BackendName, monkeypatch: pytest.MonkeyPatch) -> None:
    index, arguments = random_arguments(2, 5, True, True, torch.float64, True)
    strided = tuple(x.movedim(0, -1).contiguous().movedim(-1, 0) for x in arguments)
    assert not strided[0].is_contiguous()
    assert_agreement(index, strided, monkeypatch)


@pytest.mark.usefixtures("kernel")
def test_numbers_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    index, arguments = random_arguments(2, 4, False, True, torch.float64, True)
    table, _, locations, weights = arguments
    locations[0, 0, 0, 0, 1], locations[1, 1, 1, 0, 0] = math.nan, math.inf
    weights[2, 1, 2, 1], table[3, 1, 2] = math.nan, math.inf
    found = sample_with_gradients(index, arguments)
    use("reference", monkeypatch)
    expected = sample_with_gradients(index, arguments)
    assert torch.equal(found[0].isfinite(), expected[0].isfinite())
    rows = torch.arange(9) > 2
    rows &= found[0].isfinite().flatten(1).all(1)
    assert rows.sum() > 3
    for actual, wanted in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
        assert_close(actual[rows], wanted[rows], EXACT)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("periodic_axes", [(), (0, 1)])
def test_locations_that_are_not_finite_have_no_cells(periodic_axes: tuple[int, ...]) -> None:
    """Neither the first cell of the map, to which keys that overflow may lead."""
    cell = torch.tensor([[0, 0, 0, 0]])
    pyramid = FeaturePyramid(torch.zeros(1, 1), cell, ((4, 6),), 1, periodic_axes=periodic_axes)
    bad = [[value, 0.5] for value in (math.nan, math.inf, -math.inf)]
    locations = torch.tensor([*bad, *(x[::-1] for x in bad)]).view(6, 1, 1, 1, 2)
    index, images, weights = index_cells(pyramid), torch.zeros(6).long(), torch.ones(6, 1, 1, 1)
    table = torch.ones(1, 1, 1, requires_grad=True)
    out = sampling.sample(table, index, images, locations, weights)
    assert out.isnan().all()
    assert torch.autograd.grad(out.sum(), table)[0].item() == 0
    masked = torch.zeros(6, dtype=torch.bool)
    assert not len(sampling.cell_weights(index, images, masked, locations, weights).cells)


def test_any_number_of_threads_gives_the_same_bits(restored_threads: None) -> None:
    index, arguments = random_arguments(2, 21, True, False, torch.float32)
    torch.set_num_threads(1)
    expected = sample_with_gradients(index, arguments)
    for n_threads in (2, 3, 7):
        torch.set_num_threads(n_threads)
        assert all(map(torch.equal, sample_with_gradients(index, arguments), expected))


@pytest.mark.usefixtures("kernel")
def test_the_same_bits_twice(uninitialized_is_nan: None) -> None:
    problem = random_arguments(2, 5, True, False, torch.float32, True)
    first, second = (sample_with_gradients(*problem) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(x.isfinite().all() for x in first)


def op_arguments(kernel: BackendName = "cpu", has_background: bool = True) -> list[Any]:
    small = kernel == "triton"
    index, tensors = random_arguments(2, 4, True, True, torch.float64, small)
    moved = [x.cuda() if on_gpu(kernel) else x for x in tensors]
    table, images, locations, weights = moved
    hash_table, sizes, periodic = index.lookup_arguments()
    return [
        *(x.requires_grad_() for x in (table, locations, weights)), images,
        [x.to(images.device) for x in hash_table], sizes, periodic, has_background,
    ]  # fmt: skip


def ops_of(kernel: BackendName) -> Any:
    return torch.ops.vicinal_triton if kernel == "triton" else torch.ops.vicinal


def test_opcheck(kernel: BackendName) -> None:
    opcheck(ops_of(kernel).sample.default, op_arguments(kernel))


@pytest.mark.usefixtures("kernel")
def test_one_compiled_graph() -> None:
    sample, weights = sampled_weights()
    compiled = torch.compile(sample, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for function in (compiled, sample):
        leaf = weights.clone().requires_grad_()
        out = function(leaf)
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaf)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("position", "change", "match"),
    [
        (0, lambda x: x[:, :1], "table(:| must be)"),
        (0, lambda x: x[:2], "at least 6 rows"),
        (0, lambda x: x.half(), "table(: expected a float32| must be Float)"),
        (1, lambda x: x[..., 0], "locations(:| must have).* 5 dimensions"),
        (1, lambda x: x.long(), "locations(: expected a float32| must be Float)"),
        (2, lambda x: x.float(), "weights(:| must be)"),
        (3, lambda x: x[1:], "images(:| must be)"),
        (3, lambda x: x.int(), "images(:| must be)"),
        (4, lambda x: x[1:], "index(:| must have).* 5 tensors"),
        (4, lambda x: [x[0][:0], *x[1:]], "an image"),
        (4, lambda x: [x[0], x[1].t(), *x[2:]], "steps(:| must be)"),
        (4, lambda x: [*x[:2], x[2][1:], *x[3:]], "power of two"),
        (4, lambda x: [*x[:3], x[3][1:], x[4]], "corners(:| must be)"),
        (5, lambda x: x[1:], "6 sizes"),
        (6, lambda x: [*x, 0], "2 periods"),
    ],
)
def test_the_op_refuses_arguments(
    position: int, change: Any, match: str, kernel: BackendName
) -> None:
    arguments = op_arguments(kernel)
    arguments[position] = change(arguments[position])
    with pytest.raises((RuntimeError, ValueError), match=match):
        ops_of(kernel).sample(*arguments)


def survive_bad_tables(trials: int, kernel: BackendName = "cpu", every: int = 1) -> None:
    """Runs the kernel with hash tables of random numbers. `tests.soak` does it in a kernel with
    sanitizers.
    """
    for trial in range(0, trials, every):
        torch.manual_seed(trial)
        arguments = op_arguments(kernel, has_background=trial % 2 > 0)
        bound = 2 ** (8 * (trial % 8))
        arguments[3] = torch.randint(-bound, bound, arguments[3].shape).to(arguments[3])
        arguments[4] = [
            torch.randint(-bound, bound, x.shape).to(x) if torch.rand(()) < 0.5 else x
            for x in arguments[4]
        ]
        arguments[1] = arguments[1].detach() * bound
        out = ops_of(kernel).sample(*arguments)
        ops_of(kernel).sample_backward(torch.ones_like(out), *arguments)


def test_bad_tables() -> None:
    survive_bad_tables(24)


@NEEDS_TRITON
def test_bad_tables_in_triton(checked: Checked | None, uninitialized_is_nan: None) -> None:
    survive_bad_tables(8, "triton", every=3)
    if ON_GPU:
        torch.cuda.synchronize()  # an error belongs to this test
    assert checked is None or checked.n_checked > 10_000
