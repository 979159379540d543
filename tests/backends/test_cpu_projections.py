"""The block's dense projections on the CPU: any chunks of rows, against plain PyTorch."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, opcheck
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend, chunks, cpu, reference
from vicinal.backends.cpu import projection_ops

WIDTH, EPS = 6, 1e-3
FIXED = ("test_schema", "test_faketensor")  # of an op whose result is never filled


class Inputs(NamedTuple):
    """The arguments of a projection, in order."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    norm: list[Tensor]
    eps: float
    residual: Tensor | None

    def leaves(self) -> list[Tensor]:
        tensors = [self.x, *self.weights, *self.biases, *self.norm]
        return tensors if self.residual is None else [*tensors, self.residual]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers as leaves of their own."""

        def change(x: Tensor) -> Tensor:
            return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)

        return Inputs(
            change(self.x),
            [change(x) for x in self.weights],
            [change(x) for x in self.biases],
            [change(x) for x in self.norm],
            self.eps,
            None if self.residual is None else change(self.residual),
        )


def make_inputs(
    rows: int = 13, *, parts: int = 1, bias: bool = False, norm: bool = False,
    residual: bool = False, width: int = WIDTH,
) -> Inputs:  # fmt: skip
    assert cpu.unsupported_reason(torch.device("cpu"), None) is None
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    out_width = width - 2
    return Inputs(
        draw(rows, width),
        [draw(out_width, width) for _ in range(parts)],
        [draw(out_width) for _ in range(parts if bias else 0)],
        [draw(width) for _ in range(2 if norm else 0)],
        EPS,
        draw(rows, out_width) if residual else None,
    )


def plain(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], norm: list[Tensor], eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The projections by the modules' own functions."""
    assert residual is not None
    x = F.layer_norm(x, x.shape[1:], norm[0], norm[1], eps)
    return tuple(residual + F.linear(x, *part) for part in zip(weights, biases, strict=True))


ALL = make_inputs(parts=2, bias=True, norm=True, residual=True)


def gradients(outs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """Gradients of every leaf that requires one, for random gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]
    reached = [index for index, out in enumerate(outs) if out.requires_grad]
    wanted = [leaf for leaf in inputs.leaves() if leaf.requires_grad]
    outs, cotangents = ([parts[index] for index in reached] for parts in (outs, cotangents))
    return list(torch.autograd.grad(outs, wanted, cotangents))


def assert_as_the_reference(inputs: Inputs) -> None:
    ours, theirs = projection_ops.project(*inputs), reference.project(*inputs)
    for left, right in zip(ours, theirs, strict=True):
        assert_close(left, right, 1e-13)
    for left, right in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert_close(left, right, 1e-12)


@pytest.fixture(params=[1, 4, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The rows of a chunk."""
    rows: int = request.param
    monkeypatch.setattr(chunks, "chunk_rows", lambda x: rows)
    return rows


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.usefixtures("chunk")
def test_any_parts_in_any_chunks(parts: int, bias: bool, norm: bool, residual: bool) -> None:
    assert_as_the_reference(make_inputs(parts=parts, bias=bias, norm=norm, residual=residual))


@pytest.mark.parametrize("wanted", range(len(ALL.leaves())))
@pytest.mark.parametrize("alone", [False, True])
def test_gradients_of_some_leaves(wanted: int, alone: bool) -> None:
    """One alone, or all but one."""
    inputs = ALL.to(torch.float64)
    for index, leaf in enumerate(inputs.leaves()):
        leaf.requires_grad_((index == wanted) == alone)
    assert_as_the_reference(inputs)


def test_an_unused_output() -> None:
    inputs = make_inputs(parts=2, norm=True)
    (ours, _), (theirs, _) = projection_ops.project(*inputs), reference.project(*inputs)
    found = [
        torch.autograd.grad(out.sin().sum(), inputs.leaves(), materialize_grads=True)
        for out in (ours, theirs)
    ]
    for left, right in zip(*found, strict=True):
        assert_close(left, right, 1e-13)


def test_strided_rows_and_expanded_gradients() -> None:
    inputs = make_inputs(norm=True, residual=True)
    strided = inputs._replace(x=torch.randn(WIDTH, 13, dtype=torch.float64).t().requires_grad_())
    assert_as_the_reference(strided)
    grads = [
        torch.autograd.grad(project(*strided)[0].sum(), strided.leaves())
        for project in (projection_ops.project, reference.project)
    ]
    for left, right in zip(*grads, strict=True):
        assert_close(left, right, 1e-12)


@pytest.mark.parametrize("norm", [False, True])
def test_no_rows(norm: bool) -> None:
    assert_as_the_reference(make_inputs(0, parts=2, bias=True, norm=norm, residual=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("project", [projection_ops.project, reference.project])
def test_projections_round_no_more_than_plain_torch(
    project: Callable[..., Sequence[Tensor]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "chunk_rows", lambda x: 512)
    inputs = make_inputs(20_000, bias=True, norm=True, residual=True, width=16).to(dtype)
    exact = inputs.to(torch.float64)

    def answers(project: Callable[..., Sequence[Tensor]], inputs: Inputs) -> list[Tensor]:
        outs = project(*inputs)
        return [*outs, *gradients(outs, inputs)]

    right = answers(plain, exact)
    theirs = answers(plain, inputs)
    ours = answers(project, inputs)
    for index, (left, other, true) in enumerate(zip(ours, theirs, right, strict=True)):
        errors = [(part.double() - true).square().mean().sqrt() for part in (left, other)]
        # Sums over rows are taken in another order; rows themselves are not.
        assert errors[0] <= (1.02 if index == 0 else 1.5) * errors[1]


def test_opcheck() -> None:
    inputs = ALL.to(torch.float64)
    opcheck(torch.ops.vicinal.project.default, inputs)
    grads = [torch.randn(13, WIDTH - 2, dtype=torch.float64) for _ in inputs.weights]
    op = torch.ops.vicinal.project_backward.default
    x, weights, norm = (
        inputs.x.detach(),
        *([part.detach() for part in group] for group in (inputs.weights, inputs.norm)),
    )
    for needs in itertools.product((False, True), repeat=3):
        arguments = (grads, x, weights if needs[0] else [], norm, EPS, *needs)
        opcheck(op, arguments)
    opcheck(torch.ops.vicinal.new_rows.default, (x, 3, 4), test_utils=FIXED)


@pytest.mark.parametrize("parts", [1, 2])
def test_flops_are_counted(parts: int) -> None:
    inputs = make_inputs(parts=parts, norm=True)
    with FlopCounterMode(display=False) as counter:
        outs = projection_ops.project(*inputs)
        product = 2 * 13 * WIDTH * (WIDTH - 2) * parts
        assert counter.get_total_flops() == product
        gradients(outs, inputs)
    assert counter.get_total_flops() == 3 * product


def test_weights_may_change_before_the_backward_pass_of_nothing_before_them() -> None:
    inputs = make_inputs(norm=True).to(torch.float64)
    for leaf in (inputs.x, *inputs.norm):
        leaf.requires_grad_(False)
    outs = projection_ops.project(*inputs)
    with torch.no_grad():
        inputs.weights[0].mul_(2)
    assert_close(
        gradients(outs, inputs)[0], gradients(reference.project(*inputs), inputs)[0], 1e-12
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_do_not_depend_on_the_number_of_threads(
    threads: int, restored_threads: None
) -> None:
    torch.set_num_threads(threads)
    assert chunks.chunk_rows(torch.empty(7, 256)) == 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [40, 700])  # below and above the rows of a chunk
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_gradients_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, rows: int, name: BackendName, monkeypatch: pytest.MonkeyPatch,
    restored_threads: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(chunks, "chunk_rows", lambda x: 300)
    inputs = make_inputs(rows, bias=True, norm=True, width=66).to(dtype)
    backend = choose_backend(name, torch.device("cpu"))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(backend.project(*inputs), inputs)[-2:])
    for other in found[1:]:
        for left, right in zip(other, found[0], strict=True):
            assert torch.equal(left, right)


def test_a_second_derivative_is_refused() -> None:
    inputs = make_inputs(norm=True)
    (grad,) = torch.autograd.grad(
        projection_ops.project(*inputs)[0].pow(2).sum(), inputs.x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.sum().backward()


def test_the_norm_is_not_kept_for_the_backward_pass() -> None:
    inputs = make_inputs(norm=True, residual=True)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        projection_ops.project(*inputs)
    assert {x.data_ptr() for x in saved} == {
        x.data_ptr() for x in (inputs.x, *inputs.weights, *inputs.norm)
    }


def test_rows_of_large_pages() -> None:
    like = torch.zeros(1, dtype=torch.float16)
    made = torch.ops.vicinal.new_rows(like, 40_000, 300)
    assert (made.shape, made.dtype) == ((40_000, 300), torch.float16)
    assert made.is_contiguous()
    assert int(made.fill_(1).sum(dtype=torch.int64)) == 12_000_000


@pytest.mark.parametrize("project", [projection_ops.project, cpu.project])
def test_one_graph_for_any_number_of_rows(project: Callable[..., Sequence[Tensor]]) -> None:
    counter = CompileCounter()
    compiled = torch.compile(project, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 9, 5000, 13):
        inputs = make_inputs(rows, parts=2, norm=True)
        for left, right in zip(compiled(*inputs), reference.project(*inputs), strict=True):
            assert_close(left, right, 1e-13)
    assert counter.frame_count == 1
