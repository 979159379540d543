"""Plans of permuted and of split rows: by ids, dropout keeps the weights of the whole problem."""

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from problems import scene_2d
from test_plan import tensors_of
from torch import Tensor

from vicinal import Background, FeaturePyramid, NeighborhoodPlan, neighborhood_attention
from vicinal import plan_neighborhoods as make_plan
from vicinal._utils.random import hash_integers
from vicinal._utils.types import BackendName

# The interpreter computes with NumPy, which warns about values that kernels mask.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("runs_by_reference"),
]
NEEDS_INTERPRETER = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is off where there is a GPU"
)
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=NEEDS_INTERPRETER)]
SHAPE, STRIDES, SIZES, RATE = (12, 9), ((1, 1), (2, 3)), [5, 3], 0.4


class Problem(NamedTuple):
    """Queries, points and what attention takes, of all rows."""

    positions: Tensor
    images: Tensor
    pyramid: FeaturePyramid
    leaves: list[Tensor]  # q, k, v and maybe the background

    def plan(self, queries: Tensor, points: Tensor) -> NeighborhoodPlan:
        """The plan of some of the queries and points."""
        whole = self.pyramid
        pyramid = FeaturePyramid(
            whole.values[points], whole.coordinates[points], whole.level_shapes,
            whole.batch_size, periodic_axes=whole.periodic_axes,
        )  # fmt: skip
        counts = torch.bincount(self.images[queries], minlength=whole.batch_size)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return make_plan(self.positions[queries], offsets, pyramid, SIZES)

    def part(self, queries: Tensor, points: Tensor) -> NeighborhoodPlan:
        """Likewise, with the rows as ids."""
        plan = self.plan(queries, points)
        return plan.with_dropout_ids(queries, points.int(), len(self.pyramid))

    def attend(
        self, plan: NeighborhoodPlan, queries: Tensor, points: Tensor, backend: BackendName
    ) -> list[Tensor]:
        """Output, log-sum-exp and the gradients of all leaves, always with the same seed."""
        q, k, v, *cells = leaves = [x.clone().requires_grad_() for x in self.leaves]
        background = Background(cells[0][queries], *cells[1:]) if cells else None
        torch.manual_seed(3)
        keys, values = (plan.append_copies(x[points]) for x in (k, v))
        out, lse = neighborhood_attention(
            q[queries], keys, values, plan, dropout_p=RATE, background=background,
            return_lse=True, backend=backend,
        )  # fmt: skip
        weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(out)
        loss = (out * weights[queries]).sum() + torch.where(lse.isfinite(), lse, 0).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    def rows(self) -> tuple[Tensor, Tensor]:
        return torch.arange(len(self.positions)), torch.arange(len(self.pyramid))


def make_problem(axes: tuple[int, ...], background: bool, backend: BackendName) -> Problem:
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "triton" else torch.float64
    cells = torch.stack([torch.randint(0, size, (40,)) for size in SHAPE], 1)
    placed = torch.cat((torch.randint(0, 2, (40, 1)), cells), 1)
    pyramid = FeaturePyramid.from_points(
        placed, torch.zeros(40, 1), SHAPE, 2, strides=STRIDES, periodic_axes=axes
    )
    images = torch.arange(22) // 13
    positions = torch.rand(22, 2, dtype=torch.float64) * torch.tensor(SHAPE)
    shapes: list[tuple[int, ...]] = [(22, 1, 4), (len(pyramid), 1, 4), (len(pyramid), 1, 4)]
    if background:
        shapes += [(22, 2, 1, 4), (5 * 5 + 3 * 3, 1, 4), (2, 2, 1, 4)]
    leaves = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return Problem(positions, images, pyramid, leaves)


def close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    tolerance = 2e-5 if expected[0].dtype == torch.float32 else 1e-12
    return all(map(lambda x, y: torch.allclose(x, y, 0, tolerance), actual, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("axes", [(), (1,), (0, 1)])
def test_permuted_rows_with_ids(
    axes: tuple[int, ...], background: bool, backend: BackendName
) -> None:
    problem = make_problem(axes, background, backend)
    queries, points = problem.rows()
    out, lse, *grads = problem.attend(problem.plan(queries, points), queries, points, backend)
    points = points[torch.randperm(len(points))]
    queries = torch.cat([part[torch.randperm(len(part))] for part in queries.split([13, 9])])
    expected = [out[queries], lse[queries], *grads]
    part = problem.part(queries, points)
    assert close(problem.attend(part, queries, points, backend), expected)
    plain = problem.plan(queries, points)
    assert not close(problem.attend(plain, queries, points, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("axes", [(), (1,)])
def test_parts_with_ids_give_the_whole(
    axes: tuple[int, ...], background: bool, backend: BackendName
) -> None:
    problem = make_problem(axes, background, backend)
    queries, points = problem.rows()
    whole = problem.plan(queries, points)
    out, lse, *grads = problem.attend(whole, queries, points, backend)
    sums = [torch.zeros_like(x) for x in grads]
    for half in (queries[::2], queries[1::2]):
        seen = whole.pairs(half)[:, 1].unique()  # the points that a part must have
        assert len(seen) < len(points)
        part = problem.part(half, seen)
        actual = problem.attend(part, half, seen, backend)
        assert close(actual[:2], [out[half], lse[half]])
        for total, grad in zip(sums, actual[2:], strict=True):
            total += grad
    assert close(sums, grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("axes", [(), (1,)])
def test_the_hash_of_ids_decides(
    axes: tuple[int, ...], with_ids: bool, backend: BackendName
) -> None:
    """Also where a point is a copy beyond the seam, which has no id of its own."""
    problem = make_problem(axes, False, backend)
    queries, points = problem.rows()
    plan = problem.plan(queries, points)
    n_copies = plan.n_keys - plan.n_points
    assert (n_copies > 0) == bool(axes)
    if with_ids:
        queries, points = 2**31 - 1 - queries, 3 * points
        plan = plan.with_dropout_ids(queries, points, 2**31 - 1)
    q, k, *_ = problem.leaves
    units = torch.eye(plan.n_points, dtype=q.dtype)[:, None]
    keys, values = map(plan.append_copies, (k, units))
    torch.manual_seed(7)
    weights = neighborhood_attention(q, keys, values, plan, dropout_p=RATE, backend=backend)[:, 0]
    torch.manual_seed(7)
    seed = torch.randint(2**62, ())
    kept = hash_integers(seed, (torch.tensor(0), queries[:, None], points)) >= int(RATE * 2**32)
    seen = torch.zeros_like(kept)
    seen[tuple(plan.pairs().t())] = True
    assert torch.equal(weights != 0, kept & seen)


@pytest.mark.parametrize("axes", [(), (1,)])
def test_copies_of_a_plan_keep_the_ids(axes: tuple[int, ...]) -> None:
    problem = make_problem(axes, True, "cpu")
    queries, points = problem.rows()
    plan = problem.part(queries.flip(0)[9:], points.flip(0))
    arguments: tuple[Tensor, Tensor, BackendName] = queries[:13], points, "cpu"
    copied = pickle.loads(pickle.dumps(plan))
    for actual, expected in zip(
        problem.attend(copied, *arguments), problem.attend(plan, *arguments), strict=True
    ):
        assert torch.equal(actual, expected)
    assert {x.device.type for x in tensors_of(plan.to("meta"))} == {"meta"}


def test_the_plan_with_ids_is_another_one() -> None:
    problem = make_problem((1,), False, "cpu")
    queries, points = problem.rows()
    plan = problem.plan(queries, points)
    before = problem.attend(plan, queries, points, "cpu")
    other = plan.with_dropout_ids(queries + 100, points, plan.n_points)
    assert torch.equal(other.pairs(), plan.pairs())
    assert not close(problem.attend(other, queries, points, "cpu"), before)
    again = other.with_dropout_ids(queries, points, plan.n_points)
    for left in (plan, again):
        for actual, expected in zip(
            problem.attend(left, queries, points, "cpu"), before, strict=True
        ):
            assert torch.equal(actual, expected)


def test_ids_without_queries_or_points() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    problem = make_problem((1,), True, "cpu")
    queries, points = problem.rows()
    for backend in ("reference", "cpu"):
        for own, seen in ((queries[:0], points), (queries, points[:0]), (nothing, nothing)):
            out, *_ = problem.attend(problem.part(own, seen), own, seen, backend)
            assert out.shape == (len(own), 1, 4)
    plan = problem.plan(nothing, nothing).with_dropout_ids(nothing, nothing, 0)
    assert plan.n_points == 0


ROWS = torch.arange(60)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("query_ids", ROWS[:11]),
        ("query_ids", ROWS[:12].float()),
        ("query_ids", ROWS[:12].bool()),
        ("query_ids", ROWS[:12] - 1),
        ("query_ids", ROWS[:12] + 2**31 - 11),
        ("query_ids", ROWS[:12, None]),
        ("query_ids", ROWS[:12].to("meta")),
        ("query_ids", None),
        ("point_ids", ROWS[:59]),
        ("point_ids", ROWS.double()),
        ("point_ids", ROWS - 1),
        ("point_ids", ROWS + 1),
        ("point_ids", ROWS[None]),
        ("point_ids", ROWS.to("meta")),
        ("point_ids", list(range(60))),
        ("n_points", 2.5),
        ("n_points", -1),
        ("n_points", 2**31),
        ("n_points", None),
        ("n_points", True),
    ],
)
def test_refusals(argument: str, value: Any) -> None:
    plan = scene_2d().plan()
    arguments: dict[str, Any] = {"query_ids": ROWS[:12], "point_ids": ROWS, "n_points": 60}
    assert plan.with_dropout_ids(**arguments).n_points == 60
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        plan.with_dropout_ids(**{**arguments, argument: value})
