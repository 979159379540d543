"""Small constant tensors, which reach a GPU without a synchronization."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Numbers = Sequence[int] | Sequence[list[int]] | Sequence[tuple[int, ...]]

_CACHED_DEVICES = ("cuda",)
_CACHE_SIZE = 4096  # constants of a few hundred bytes
_cache: dict[Hashable, tuple[Any, torch.cuda.Event | None]] = {}
_captured: dict[Hashable, Any] = {}  # CUDA graphs read these for as long as they live
A = TypeVar("A", bound=Hashable)
P = ParamSpec("P")
T = TypeVar("T", bound=Tensor | tuple[Tensor, ...])


def constant(numbers: Numbers, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns ``numbers`` as a tensor, which must not be changed in place.

    Copying from the host to a GPU needs a synchronization or pinned memory, so the tensors of GPUs
    are cached. Graphs of `torch.compile` and `torch.export` get them by the op `vicinal::numbers`.

    Raises:
        RuntimeError: a CUDA graph is being captured, and these numbers are not cached yet.
    """
    if device.type not in _CACHED_DEVICES:
        return torch.tensor(numbers, dtype=dtype, device=device)
    flat, shape = _flattened(numbers)
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_available():
        return _cached_numbers(tuple(flat), tuple(shape), dtype, device)
    made: Tensor = torch.ops.vicinal.numbers(flat, shape, dtype, device)
    return made


def cached_on_gpu(
    find: Callable[Concatenate[A, torch.device, P], T],
) -> Callable[Concatenate[A, torch.device, P], T]:
    """``find``, a function of hashable arguments, one of them a device, that returns constants.

    On GPUs its results are cached, since looking up each constant by its numbers takes longer.
    Compiled graphs get each constant as they get others.
    """

    @functools.wraps(find)
    def run(first: A, device: torch.device, /, *others: P.args, **named: P.kwargs) -> T:
        if device.type not in _CACHED_DEVICES or torch.compiler.is_compiling():
            return find(first, device, *others, **named)
        key = find, first, device, others, tuple(named.items())
        return _cached(key, lambda: find(first, device, *others, **named), device)

    return run


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextlib.contextmanager
def trainable_tensors() -> Iterator[None]:
    """Makes tensors that a training step can use, also under `torch.inference_mode`."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def execution_mode(device: torch.device) -> str:
    """What runs the ops issued now on a device: "python" (eager mode), "compiler" (a graph that
    torch.compile or torch.export traces) or "graph" (a CUDA graph being captured).
    """
    if device.type != "cuda":
        return "python"
    if torch.compiler.is_compiling():
        return "compiler"
    if not torch.cuda.is_initialized():  # as with fake tensors
        return "python"
    with torch.cuda.device(device):  # its current stream, not that of another GPU
        return "graph" if torch.cuda.is_current_stream_capturing() else "python"


def _flattened(numbers: Numbers) -> tuple[list[int], list[int]]:
    """The numbers in row-major order, and the shape of the tensor."""
    flat: list[int] = []
    shape = [len(numbers)]
    for row in numbers:
        if isinstance(row, list | tuple):
            flat += row
            shape = [len(numbers), len(row)]
        else:
            flat.append(row)
    return flat, shape


def _cached_numbers(
    flat: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The cached tensor of these numbers on the GPU."""

    def copy() -> Tensor:
        if execution_mode(device) == "graph":
            raise RuntimeError(
                "constants for maps of this shape are not on the GPU yet; run one eager step "
                "before CUDA-graph capture"
            )
        pinned = torch.tensor(flat, dtype=dtype, pin_memory=True).view(shape)
        return pinned.to(device, non_blocking=True)

    return _cached((flat, shape, dtype, device), copy, device)


def _cached(key: Hashable, make: Callable[[], T], device: torch.device) -> T:
    """The constants of a key on a device, made by ``make`` if they are not cached yet."""
    captured = execution_mode(device) == "graph"
    if key not in _cache:
        with torch.inference_mode(False):  # they may be used in a training step later
            made = make()
        tensors = made if isinstance(made, tuple) else (made,)
        if captured or any(type(x) is not Tensor for x in tensors):  # fake tensors
            return made
        if len(_cache) >= _CACHE_SIZE:
            torch.cuda.synchronize(device)  # other streams may still read the tensors
            _cache.clear()
        is_cuda = device.type == "cuda"
        copied = torch.cuda.current_stream(device).record_event() if is_cuda else None
        _cache[key] = made, copied
    cached, copied = _cache[key]
    if captured:
        _captured[key] = cached
    elif copied is not None:
        if copied.query():
            _cache[key] = cached, None
        else:  # another stream may be copying them
            torch.cuda.current_stream(device).wait_event(copied)
    found: T = cached
    return found


# A compiled graph may overwrite the result of an op, so the op returns a copy, made on the GPU. The
# tag keeps the op out of CUDA graphs, where it could not copy from the host.
torch.library.define(
    "vicinal::numbers",
    "(SymInt[] flat, SymInt[] shape, ScalarType dtype, Device device) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl("vicinal::numbers", "CompositeExplicitAutograd")
def _(
    flat: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if device.type == "cuda":
        return _cached_numbers(tuple(flat), tuple(shape), dtype, device).clone()
    return torch.tensor(flat, dtype=dtype, device=device).view(shape)


@torch.library.register_fake("vicinal::numbers")
def _(
    flat: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
