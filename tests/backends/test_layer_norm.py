"""The layer norm: as torch's, with gradients of the same bits for any number of threads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, opcheck
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from vicinal.backends import chunks
from vicinal.backends.layer_norm import layer_norm

# Torch itself scripts its formulas of forward mode when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

EPS = 1e-3
jvp: Any = torch.func.jvp


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_leaves(rows: int = 13, width: int = 6, bias: bool = True) -> list[Tensor]:
    """Rows, weight and bias."""
    leaves = [3 * draw(rows, width) + 1, draw(width, seed=1), draw(width, seed=2)]
    return [leaf.requires_grad_() for leaf in leaves[: 2 + bias]]


def normed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return layer_norm(x, weight, bias, EPS)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[1:], weight, bias, EPS)


@pytest.fixture(params=[1, 4, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The rows of a chunk."""
    rows: int = request.param
    monkeypatch.setattr(chunks, "chunk_rows", lambda x: rows)
    return rows


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("rows", [0, 1, 13])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_torch(rows: int, bias: bool) -> None:
    leaves = make_leaves(rows, bias=bias)
    answers = []
    for function in (normed, plain):
        out = function(*leaves)
        cotangent = draw(rows, 6, seed=3)
        answers.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for left, right in zip(*answers, strict=True):
        assert_close(left, right, 1e-13)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("wanted", range(3))
def test_a_gradient_alone(wanted: int) -> None:
    leaves = make_leaves()
    answers = []
    for function in (normed, plain):
        fresh = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(leaves)]
        answers.append(torch.autograd.grad(function(*fresh).sin().sum(), fresh[wanted])[0])
    assert_close(answers[0], answers[1], 1e-13)


@pytest.mark.usefixtures("chunk")
def test_strided_rows_and_expanded_gradients() -> None:
    _, *affine = make_leaves()
    x = draw(6, 13).t().requires_grad_()
    answers = [torch.autograd.grad(f(x, *affine).sum(), [x, *affine]) for f in (normed, plain)]
    for left, right in zip(*answers, strict=True):
        assert_close(left, right, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_it_rounds_no_more_than_torch(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with weights that are wider than the rows."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda x: 512)
    dtypes = dtype, weight_dtype or dtype, weight_dtype or dtype
    leaves = make_leaves(2000)
    cotangent = draw(2000, 6, seed=3)

    def answers(function: Any, exactly: bool) -> list[Tensor]:
        parts = [
            leaf.detach().to(kind).to(torch.float64 if exactly else kind).requires_grad_()
            for leaf, kind in zip(leaves, dtypes, strict=True)
        ]
        out = function(*parts)
        return [out, *torch.autograd.grad(out, parts, cotangent.to(dtype).to(out.dtype))]

    exact, theirs, ours = answers(plain, True), answers(plain, False), answers(normed, False)
    for left, other, true in zip(ours, theirs, exact, strict=True):
        assert left.dtype == other.dtype
        errors = [(part.double() - true).square().mean().sqrt() for part in (left, other)]
        assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 6, 66])
@pytest.mark.usefixtures("restored_threads")
def test_the_same_bits_for_any_number_of_threads(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "chunk_rows", lambda x: 2000)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in make_leaves(5000, width)]
    cotangent = draw(5000, width, seed=3).to(dtype)
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = normed(*leaves)
        answers.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for other in answers[1:]:
        assert all(map(torch.equal, other, answers[0]))


@pytest.mark.parametrize("bias", [False, True])
def test_derivatives_of_every_order(bias: bool) -> None:
    leaves = make_leaves(3, bias=bias)
    assert torch.autograd.gradcheck(normed, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(normed, leaves)


@pytest.mark.parametrize("wanted", range(3))
def test_a_second_derivative_of_one_leaf(wanted: int) -> None:
    answers = []
    for function in (normed, plain):
        leaves = make_leaves(3)
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index == wanted)
        loss = function(*leaves).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, leaves[wanted], create_graph=True)
        answers.append(torch.autograd.grad(grad.sin().sum(), leaves[wanted])[0])
    assert_close(answers[0], answers[1], 1e-12)


def test_transforms() -> None:
    leaves = tuple(leaf.detach() for leaf in make_leaves(3))
    tangents = tuple(leaf.cos() for leaf in leaves)
    every = 0, 1, 2
    pairs = [
        [
            jvp(function, leaves, tangents)[1],
            *torch.func.jacrev(function, every)(*leaves),
            *torch.func.jacfwd(function, every)(*leaves),
            torch.func.vmap(function, (0, None, None))(torch.stack((leaves[0], leaves[0].sin())),
                                                       *leaves[1:]),
            torch.func.hessian(lambda x, f=function: f(x, *leaves[1:]).pow(3).sum())(leaves[0]),
        ]
        for function in (normed, plain)
    ]  # fmt: skip
    for left, right in zip(*pairs, strict=True):
        assert_close(left, right, 1e-11)


def test_what_is_kept_for_the_backward_pass() -> None:
    x, weight, bias = make_leaves(13)
    kept: list[Tensor] = []

    def pack(part: Tensor) -> Tensor:
        kept.append(part)
        return part

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        normed(x, weight, bias)
    others = [part for part in kept if part.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sum(part.numel() for part in others) == 2 * 13


def test_moments_have_no_gradient() -> None:
    out, *moments = torch.ops.vicinal.layer_norm(*make_leaves(), EPS)
    assert out.requires_grad
    assert not any(part.requires_grad for part in moments)


@pytest.mark.usefixtures("chunk")
def test_opcheck() -> None:
    leaves = make_leaves()
    op = torch.ops.vicinal.layer_norm.default
    for bias in (leaves[2], None):
        opcheck(op, (*leaves[:2], bias, EPS))
    x, weight, _ = (leaf.detach() for leaf in leaves)
    _, *moments = op(x, weight, None, EPS)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        arguments = (draw(13, 6), x, *moments, weight, *needs)
        backward = torch.ops.vicinal.layer_norm_backward.default
        opcheck(backward, arguments)


def test_meta_tensors() -> None:
    out = normed(*(leaf.to("meta") for leaf in make_leaves()))
    assert out.shape == (13, 6)
    assert out.device.type == "meta"


def test_one_graph_for_any_number_of_rows() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(normed, fullgraph=True, dynamic=True, backend=counter)
    compilations: set[int] = set()
    for rows in (5, 9, 70, 13):
        leaves = make_leaves(rows)
        out = compiled(*leaves)
        assert_close(out, plain(*leaves), 1e-13)
        found = torch.autograd.grad(out.sin().sum(), leaves)
        expected = torch.autograd.grad(plain(*leaves).sin().sum(), leaves)
        for left, right in zip(found, expected, strict=True):
            assert_close(left, right, 1e-12)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_tangents_without_a_gradient() -> None:
    x, weight, bias = (leaf.detach() for leaf in make_leaves())
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()), weight, bias)).tangent
            for function in (normed, plain)
        ]
    assert_close(tangents[0], tangents[1], 1e-12)
