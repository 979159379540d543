"""Transforms of torch and its deterministic mode: right or refused, never silently wrong."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import block_scenes
import deformable_scenes
import pytest
import torch
from problems import assert_close, make_inputs, scene_2d
from torch import Tensor
from torch.autograd import forward_ad

from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend
from vicinal.backends.cpu import projection_ops

# Torch itself scripts its formulas of forward mode when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


# Torch types them with two or three results.
jvp: Any = torch.func.jvp
vjp: Any = torch.func.vjp
PLAN = scene_2d().plan()
INPUTS = make_inputs(PLAN)
FULL = make_inputs(PLAN, background=True, mask=True)
generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ROTATED = draw(7, 2, 4), draw(7, 3), draw(3, 2, 2)
PROJECTED = draw(5, 6), draw(3, 6), draw(4, 6), draw(3), draw(4), draw(6), draw(6)


def attend(q: Tensor) -> Tensor:
    return INPUTS._replace(q=q).attend(PLAN, "cpu")[0]


def rotate(x: Tensor) -> Tensor:
    cpu = choose_backend("cpu", torch.device("cpu"))
    return cpu.rotate(x, torch.ones(12, 3), torch.ones(3, 2, 2))


def project(x: Tensor) -> Tensor:
    return projection_ops.project(x.flatten(1), [torch.ones(3, 8).to(x)], [], [], 0.0, None)[0]


def by_dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("function", [attend, rotate, project])
@pytest.mark.parametrize(
    "transform", [by_dual, lambda f, x: torch.func.jvp(f, (x,), (x,)),
                  lambda f, x: torch.func.jacfwd(f)(x)],
)  # fmt: skip
def test_forward_mode_is_refused(function: Callable[[Tensor], Tensor], transform: Any) -> None:
    x = torch.randn(12, 2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        transform(function, x)


def raw_calls() -> dict[str, tuple[Any, list[Any]]]:
    """The differentiable ops, called without the functions around them, with a tensor first."""
    ops = torch.ops.vicinal
    weights = [PROJECTED[1]], [PROJECTED[3]], list(PROJECTED[5:])
    rotated = draw(7, 2, 4)
    return {
        "rotate": (ops.rotate, list(ROTATED)),
        "rotate_backward": (ops.rotate_backward, [rotated, rotated, *ROTATED[1:], True]),
        "project": (ops.project, [PROJECTED[0], *weights, 1e-3, None]),
        "layer_norm": (ops.layer_norm, [PROJECTED[0], *PROJECTED[5:], 1e-3]),
    }


@pytest.mark.parametrize("name", raw_calls())
@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_through_raw_ops_is_refused(name: str, needs_grad: bool) -> None:
    op, (x, *rest) = raw_calls()[name]
    x = x.clone().requires_grad_(needs_grad)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="backend='reference'"):
        op(forward_ad.make_dual(x, x.detach().cos()), *rest)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        jvp(lambda x: op(x, *rest), (x,), (x.detach().cos(),))


def test_a_tangent_in_a_list_is_refused_by_the_raw_op() -> None:
    op, (x, (weight,), *rest) = raw_calls()["project"]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="backend='reference'"):
        op(x, [forward_ad.make_dual(weight, weight.cos())], *rest)


def attend_all(name: BackendName, *leaves: Tensor) -> Tensor:
    """The values and finite logarithms of the attention ``[N, H, d + 1]``."""
    out, lse = FULL.with_leaves(leaves).attend(PLAN, name)
    return torch.cat((out, lse.nan_to_num(neginf=0)[..., None]), -1)


def rotate_all(name: BackendName, *leaves: Tensor) -> Tensor:
    return choose_backend(name, torch.device("cpu")).rotate(*leaves)


def project_all(name: BackendName, *leaves: Tensor) -> Tensor:
    x, left, right, *rest = leaves
    backend = projection_ops if name == "cpu" else choose_backend(name, torch.device("cpu"))
    outs = backend.project(x, [left, right], rest[:2], rest[2:4], 1e-3, None)
    return torch.cat(outs, 1)


OPS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "attend": (attend_all, FULL.leaves()),
    "rotate": (rotate_all, ROTATED),
    "project": (project_all, PROJECTED),
}


@pytest.fixture(params=OPS)
def function(
    request: pytest.FixtureRequest, backend: BackendName
) -> tuple[Any, tuple[Tensor, ...]]:
    """An op by a back end, and its differentiable arguments."""
    op, leaves = OPS[request.param]
    return lambda *args: op(backend, *args), leaves


def plain_gradients(run: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Of the sum of squares, by autograd."""
    fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(run(*fresh).square().sum(), fresh))


def test_grad_and_vjp_of_the_ops(function: tuple[Any, tuple[Tensor, ...]]) -> None:
    run, leaves = function
    expected = plain_gradients(run, leaves)
    every = tuple(range(len(leaves)))
    found = torch.func.grad(lambda *args: run(*args).square().sum(), argnums=every)(*leaves)
    out, pull_back = vjp(run, *leaves)
    for left, middle, right in zip(found, pull_back(2 * out), expected, strict=True):
        assert_close(left, right, 1e-12)
        assert_close(middle, right, 1e-12)


def test_gradients_of_one_argument(function: tuple[Any, tuple[Tensor, ...]]) -> None:
    run, leaves = function
    for index, expected in enumerate(plain_gradients(run, leaves)):
        found = torch.func.grad(lambda *args: run(*args).square().sum(), argnums=index)(*leaves)
        assert_close(found, expected, 1e-12)


def test_jacrev_of_the_ops(function: tuple[Any, tuple[Tensor, ...]]) -> None:
    run, leaves = function
    every = tuple(range(len(leaves)))

    def some(*args: Tensor) -> Tensor:
        rows: Tensor = run(*args)[:2]
        return rows.flatten(1).sum(1)

    fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    rows = [torch.autograd.grad(x, fresh, retain_graph=True) for x in some(*fresh)]
    for found, *expected in zip(torch.func.jacrev(some, every)(*leaves), *rows, strict=True):
        assert_close(found, torch.stack(expected), 1e-12)


def test_vmap_of_the_ops(function: tuple[Any, tuple[Tensor, ...]]) -> None:
    run, (first, *rest) = function
    batch = torch.stack((first, 2 * first), 1)
    found = torch.func.vmap(lambda x: run(x, *rest), in_dims=1)(batch)
    assert_close(found, torch.stack([run(x, *rest) for x in (first, 2 * first)]), 1e-12)
    grads = torch.func.vmap(
        torch.func.grad(lambda x: run(x, *rest).square().sum()), in_dims=1, out_dims=1
    )(batch)
    expected = [plain_gradients(run, (x, *rest))[0] for x in (first, 2 * first)]
    assert_close(grads, torch.stack(expected, 1), 1e-12)


@pytest.mark.parametrize("name", OPS)
def test_second_order_transforms_are_refused_or_right(name: str) -> None:
    op, (first, *rest) = OPS[name]

    def loss(backend: BackendName, x: Tensor) -> Tensor:
        return op(backend, x, *rest).sin().sum()

    def twice(backend: BackendName) -> Tensor:
        inner = torch.func.grad(lambda x: loss(backend, x))
        outer: Tensor = torch.func.grad(lambda x: inner(x).square().sum())(first)
        return outer

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        twice("cpu")
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.func.hessian(lambda x: loss("cpu", x))(first)
    x = first.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss("reference", x), x, create_graph=True)
    assert_close(twice("reference"), torch.autograd.grad(grad.square().sum(), x)[0], 1e-12)


@pytest.mark.parametrize("name", OPS)
def test_jvp_of_the_reference(name: str) -> None:
    op, leaves = OPS[name]
    tangents = tuple(leaf.cos() for leaf in leaves)
    _, found = jvp(lambda *args: op("reference", *args).sin().sum(), leaves, tangents)
    _, pull_back = vjp(lambda *args: op("reference", *args).sin().sum(), *leaves)
    grads = pull_back(torch.ones((), dtype=torch.float64))
    expected = sum((x * y).sum() for x, y in zip(grads, tangents, strict=True))
    assert_close(found, torch.as_tensor(expected), 1e-11)


def modules() -> Iterator[tuple[str, Any, Any]]:
    scene = scene_2d()
    options = {"background": True, "mask": True}
    for name in ("cpu", "reference"):
        yield (
            name,
            block_scenes.make_block(scene, name),
            block_scenes.make_arguments(scene, **options),
        )
    scene = deformable_scenes.SCENES[2]
    arguments = deformable_scenes.make_arguments(scene, **options)
    yield "deformable", deformable_scenes.make_module(scene), arguments


@pytest.fixture(params=["cpu", "reference", "deformable"])
def module(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A module and its arguments."""
    return next((made, args) for name, made, args in modules() if name == request.param)


def functional(module: Any, arguments: Any) -> Callable[..., Tensor]:
    """The module as a function of its parameters and its differentiable arguments."""

    def run(parameters: dict[str, Tensor], *leaves: Tensor) -> Tensor:
        query, positions, values, background = leaves
        changed = arguments._replace(
            query=query,
            query_spatial_positions=positions,
            stacked_feature_maps=arguments.stacked_feature_maps.with_values(values),
            background_embedding=background,
        )
        out: Tensor = torch.func.functional_call(module, parameters, (), changed._asdict())
        return out

    return run


def test_functional_calls_of_modules(module: tuple[Any, Any]) -> None:
    made, arguments = module
    run, parameters = functional(made, arguments), dict(made.named_parameters())
    leaves = arguments.leaves()
    loss = run(parameters, *leaves).square().sum()
    expected = torch.autograd.grad(loss, [*parameters.values(), *leaves])
    given = {name: x.detach() for name, x in parameters.items()}, *[x.detach() for x in leaves]
    every = tuple(range(len(given)))
    by_grad = torch.func.grad(lambda *args: run(*args).square().sum(), argnums=every)(*given)
    out, pull_back = vjp(run, *given)
    for grads in (by_grad, pull_back(2 * out)):
        found = [*grads[0].values(), *grads[1:]]
        for left, right in zip(found, expected, strict=True):
            assert_close(left, right, 1e-10)


def test_grad_by_the_query_of_a_module(module: tuple[Any, Any]) -> None:
    made, arguments = module

    def loss(query: Tensor) -> Tensor:
        out: Tensor = made(**arguments._replace(query=query)._asdict())
        return out.square().sum()

    query = arguments.query.detach()
    (expected,) = torch.autograd.grad(loss(arguments.query), arguments.query)
    assert_close(torch.func.grad(loss)(query), expected, 1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "reference", "deformable"])
def test_deterministic_algorithms(dropout: float, background: bool, kind: str) -> None:
    if kind == "deformable":
        scene = deformable_scenes.SCENES[2]
        made: Any = deformable_scenes.make_module(scene, dropout=dropout)
        arguments: Any = deformable_scenes.make_arguments(scene, background=background)
    else:
        made = block_scenes.make_block(scene_2d(), cast(BackendName, kind), dropout=dropout)
        arguments = block_scenes.make_arguments(scene_2d(), background=background)

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        out = made(**arguments._asdict())
        leaves = [*made.parameters(), *arguments.leaves()]
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    expected = step()
    torch.use_deterministic_algorithms(True)
    try:
        found = step()
    finally:
        torch.use_deterministic_algorithms(False)
    for left, right in zip(found, expected, strict=True):
        assert_close(left, right, 1e-12)
