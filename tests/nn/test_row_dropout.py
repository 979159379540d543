"""Dropout of rows: one mask however rows are split, the rates and modes of torch's dropout."""

import math
from typing import Any

import deformable_scenes
import pytest
import torch
from block_scenes import EXACT, make_arguments, make_block
from problems import assert_close, scene_2d
from torch import Tensor, nn

from vicinal import FeaturePyramid
from vicinal._utils.random import hash_integers
from vicinal.nn import RowDropout


def expected_mask(seed: int, rows: Tensor, width: int, rate: float) -> Tensor:
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, ())
    return hash_integers(drawn, (rows[:, None], torch.arange(width))) >= int(rate * 2**32)


@pytest.mark.parametrize("rate", [1e-12, 0.1, 0.5, 0.9, 1 - 1e-12])
@pytest.mark.parametrize("shape", [(300, 256), (7, 3), (3, 40_000), (70_000, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("given", [False, True])
def test_the_mask_is_the_hash_of_row_and_channel(
    rate: float, shape: tuple[int, int], given: bool
) -> None:
    rows = torch.randint(-(2**33), 2**33, shape[:1]) if given else torch.arange(shape[0])
    keep = expected_mask(3, rows, shape[1], rate)
    torch.manual_seed(3)
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    x.requires_grad_()
    out = RowDropout(rate)(x, *([rows] if given else []))
    assert torch.equal(out != 0, keep)
    assert_close(out * (1 - rate), torch.where(keep, x, 0), 1e-14)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_close(grad * (1 - rate), keep.double(), 1e-14)


def test_parts_of_the_rows_get_their_part_of_the_mask() -> None:
    dropout, x, rows = RowDropout(0.3), torch.randn(500, 24), torch.randperm(500)
    torch.manual_seed(1)
    whole = dropout(x)
    for part in rows.split(170):
        torch.manual_seed(1)
        assert torch.equal(dropout(x[part], part.int()), whole[part])


def test_elements_are_dropped_independently_at_the_rate() -> None:
    dropped = RowDropout(0.2)(torch.ones(2000, 64)) == 0
    deviation = math.sqrt(0.2 * 0.8 / dropped.numel())
    assert abs(float(dropped.double().mean()) - 0.2) < 4 * deviation
    for axis in (0, 1):
        means = dropped.double().mean(axis)
        assert ((means - 0.2).abs() < 5 * deviation * math.sqrt(len(means))).all()
        first, second = dropped.unbind(axis)[:2]
        both = float((first & second).double().mean())
        assert abs(both - 0.04) < 5 * math.sqrt(0.04 / len(first))
    assert not torch.equal(RowDropout(0.2)(torch.ones(2000, 64)) == 0, dropped), "a new mask"


def test_it_is_torch_dropout_in_all_else() -> None:
    x, ours, theirs = torch.randn(5, 4), RowDropout(0.25), nn.Dropout(0.25)
    assert repr(ours) == "Row" + repr(theirs)
    assert isinstance(ours, nn.Dropout)
    assert not ours.state_dict()
    state = torch.get_rng_state()
    assert ours.eval()(x) is x
    assert RowDropout(0.0)(x, torch.arange(5)) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert not RowDropout(1.0)(x).any()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert ours.train()(x.to(dtype)).dtype == dtype
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            RowDropout(rate)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.ones(5)),
        ("x", torch.ones(5, 4, 1)),
        ("x", torch.ones(5, 4, dtype=torch.int64)),
        ("x", 1.0),
        ("row_ids", torch.arange(4)),
        ("row_ids", torch.arange(5)[:, None]),
        ("row_ids", torch.arange(5.0)),
        ("row_ids", torch.arange(5, device="meta")),
    ],
)
def test_refusals(argument: str, value: Any) -> None:
    arguments = {"x": torch.ones(5, 4), "row_ids": torch.arange(5), argument: value}
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        RowDropout()(**arguments)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_derivatives_of_every_order_and_transforms() -> None:
    x, dropout = torch.randn(4, 3, dtype=torch.float64).requires_grad_(), RowDropout(0.5)

    def compute(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        dropped: Tensor = dropout(x, torch.arange(3, 7))
        return dropped**2

    assert torch.autograd.gradcheck(compute, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(compute, x)
    expected = torch.autograd.functional.jacobian(compute, x)
    for jacobian in (torch.func.jacrev(compute), torch.func.jacfwd(compute, randomness="same")):
        assert_close(jacobian(x), expected, EXACT)
    batch = torch.ones(6, 50, 40)
    for randomness in ("same", "different"):
        out = torch.func.vmap(dropout, randomness=randomness)(batch)
        assert torch.equal(out[0], out[1]) == (randomness == "same")


@pytest.mark.floats_are_inputs
def test_compiled_and_exported() -> None:
    dropout, rows = RowDropout(0.5), torch.randint(0, 2**31, (9,))
    compiled = torch.compile(dropout, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 5):
        for ids in ((), (rows[:n],)):
            answers = []
            for function in (compiled, dropout):
                torch.manual_seed(4)
                answers.append(function(torch.ones(n, 8), *ids))
            assert torch.equal(*answers)
    shapes = {"x": {0: torch.export.Dim("rows", min=2)}, "row_ids": None}
    program = torch.export.export(dropout, (torch.ones(9, 8), None), dynamic_shapes=shapes)
    out = program.module()(torch.ones(7, 8), None)
    assert out.shape == (7, 8)
    assert set(out.unique().tolist()) == {0.0, 2.0}


def layer_and_call(kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    if kind == "block":
        return make_block(scene_2d(), "cpu", **options), make_arguments(scene_2d())._asdict()
    scene = deformable_scenes.SCENES[2]
    module = deformable_scenes.make_module(scene, **options)
    return module, deformable_scenes.make_arguments(scene)._asdict()


def with_ids(kind: str, module: Any, call: dict[str, Any], ids: Tensor) -> Any:
    keys = "query_spatial_positions", "query_batch_offsets"
    (pyramid,) = (x for x in call.values() if isinstance(x, FeaturePyramid))
    plan = module.make_plan(*(call[key] for key in keys), pyramid)
    if kind == "deformable":
        return plan.with_dropout_ids(ids)
    return plan.with_dropout_ids(ids, torch.arange(plan.n_points), plan.n_points)


@pytest.mark.parametrize("kind", ["block", "deformable"])
def test_layers_count_rows_by_the_ids_of_the_plan(kind: str) -> None:
    module, call = layer_and_call(kind, dropout=0.4)
    n_rows, width = call["query"].shape
    if kind == "block":
        module.attn_drop_rate = 0.0
    full = module.eval()(**call) - call["query"]
    module.train()
    ids = torch.arange(n_rows).flip(0) + 2**30
    for plan, rows in ((None, torch.arange(n_rows)), (with_ids(kind, module, call, ids), ids)):
        keep = expected_mask(6, rows, width, 0.4)
        torch.manual_seed(6)
        added = module(**call, plan=plan) - call["query"]
        assert_close(added, torch.where(keep, full / 0.6, 0), EXACT)


@pytest.mark.parametrize("with_plan", [False, True])
def test_a_compiled_block_in_training(with_plan: bool) -> None:
    module, call = layer_and_call("block", dropout=0.4)
    ids = torch.arange(len(call["query"])).flip(0)
    plan = with_ids("block", module, call, ids) if with_plan else None
    torch.compiler.reset()
    compiled = torch.compile(module.train(), fullgraph=True, backend="aot_eager")
    answers = []
    for function in (compiled, module):
        torch.manual_seed(8)
        answers.append(function(**call, plan=plan))
    assert_close(answers[0], answers[1], EXACT)


@pytest.mark.parametrize("kind", ["block", "deformable"])
def test_modules_in_its_place_get_one_argument(kind: str) -> None:
    module, call = layer_and_call(kind, dropout=0.4)
    plan = with_ids(kind, module, call, torch.arange(len(call["query"])))
    full = module.eval()(**call, plan=plan) - call["query"]
    module.dropout = nn.Sequential(nn.Identity(), nn.Dropout(0.0))
    assert_close(module.train(False)(**call, plan=plan) - call["query"], full, EXACT)
    module.dropout = nn.Dropout(0.5).train()
    added = module(**call, plan=plan) - call["query"]
    assert_close(added[added != 0], (2 * full)[added != 0], EXACT)
    assert (added == 0).any()


def test_other_numbers_of_queries_than_ids_are_refused() -> None:
    module, call = layer_and_call("deformable", dropout=0.4)
    plan = with_ids("deformable", module, call, torch.arange(len(call["query"]) + 1))
    with pytest.raises(ValueError, match="row_ids: expected "):
        module(**call, plan=plan)
