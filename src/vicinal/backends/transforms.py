"""Ops under the transforms of `torch.func`, which do not differentiate ops of `torch.library`.

While a transform is active, `call` runs an op as a `torch.autograd.Function`. Its gradients are
functions too, so that `torch.func.jacrev` can vectorize them. Compiled graphs hold the ops alone.
"""

import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Torch has no public way to ask. Where its private name is missing, it refuses such transforms.
_any_active: Callable[[], bool] | None = getattr(
    importlib.import_module("torch._C"), "_are_functorch_transforms_active", None
)


def transforms_active() -> bool:
    """Whether a transform of `torch.func` is active in code that torch.compile does not trace."""
    return _any_active is not None and not torch.compiler.is_compiling() and _any_active()


class Rule(NamedTuple):
    """An op and its gradients, which are None for an op that is not differentiable.

    Attributes:
        op: takes tensors, lists of tensors and other values; returns tensors and lists of tensors.
        setup: saves what the gradients need, as in `torch.library.register_autograd`.
        gradients: takes the context, which arguments need a gradient, and the gradients of the
            results. Returns a gradient or None for each argument, for a list of tensors a list.
    """

    op: Callable[..., Any]
    setup: Callable[..., None]
    gradients: Callable[..., Any]


def call(rule: Rule, *arguments: Any) -> Any:
    """Calls the op of ``rule`` as a function that any transform of `torch.func` takes."""
    leaves, lengths = _flatten(arguments)
    made = _Call(rule, lengths)
    return made.result(_Function.apply(made, *leaves))


def map_batch(
    function: type[torch.autograd.Function], batch_size: int, dims: Sequence[Any],
    arguments: Sequence[Any],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
    """The `vmap` of a function that returns a tuple of tensors, as a loop over the batch.

    ``dims`` are integers for batched tensors.
    """
    pairs = list(zip(arguments, dims, strict=True))
    rows = [
        [x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs]
        for i in range(batch_size)
    ]
    results = [function.apply(*row) for row in rows]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


class _Call:
    """A rule with the structure of its arguments and, once it has run, of its result."""

    def __init__(self, rule: Rule, lengths: list[int | None]) -> None:
        self.rule, self.lengths = rule, lengths
        self.result_lengths: list[int | None] = []
        self.is_single = False

    def run(self, leaves: Sequence[Any]) -> tuple[Tensor, ...]:
        """The flat result."""
        result = self.rule.op(*_unflatten(leaves, self.lengths))
        self.is_single = not isinstance(result, tuple)
        flat, self.result_lengths = _flatten([result] if self.is_single else result)
        return tuple(flat)

    def result(self, flat: Sequence[Tensor]) -> Any:
        """The result as the op returned it."""
        parts = _unflatten(flat, self.result_lengths)
        return parts[0] if self.is_single else parts


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(made: _Call, *leaves: Any) -> tuple[Tensor, ...]:
        return made.run(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.made, *leaves = inputs
        made = ctx.made
        made.rule.setup(ctx, _unflatten(leaves, made.lengths), made.result(output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.made
        needs = _unflatten(ctx.needs_input_grad[1:], made.lengths)
        found = made.rule.gradients(ctx, needs, *_unflatten(grads, made.result_lengths))
        return None, *_flatten(found)[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return map_batch(_Function, info.batch_size, in_dims, arguments)


def refuse_forward_mode() -> None:
    raise NotImplementedError(
        "the compiled kernels have no forward-mode formulas; use backend='reference', where there "
        "is a choice, for torch.func.jvp, jacfwd and torch.autograd.forward_ad"
    )


def refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the compiled kernels are differentiable once; use backend='reference', where there is a "
        "choice, for higher orders"
    )


def once(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, which computes gradients and is not differentiable itself, by `call`."""
    rule = Rule(op, lambda ctx, inputs, output: None, refuse_double_backward)
    return lambda *arguments: call(rule, *arguments)


def _flatten(parts: Iterable[Any]) -> tuple[list[Any], list[int | None]]:
    """The parts with lists of tensors (or None) opened, and the lists' lengths; None for no list.

    Torch takes any other list as one argument.
    """
    leaves: list[Any] = []
    lengths: list[int | None] = []
    for part in parts:
        opened = isinstance(part, list) and all(x is None or isinstance(x, Tensor) for x in part)
        leaves += part if opened else [part]
        lengths.append(len(part) if opened else None)
    return leaves, lengths


def _unflatten(leaves: Iterable[Any], lengths: Iterable[int | None]) -> tuple[Any, ...]:
    rest = iter(leaves)
    return tuple(next(rest) if n is None else list(itertools.islice(rest, n)) for n in lengths)
