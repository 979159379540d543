"""Small tables of numbers as tensors, on a GPU without a stall."""

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[int] | Sequence[Sequence[int]]

_KEEPING = ("cuda",)  # kinds of devices that keep what they were sent
_KEPT = 4096  # tables, of a few hundred bytes
_kept: dict[object, tuple[Tensor, torch.cuda.Event]] = {}
_captured: dict[object, Tensor] = {}  # which CUDA graphs read for good


def constant(numbers: Numbers, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """``numbers`` as a tensor that nobody may change.

    To send numbers to a GPU takes a wait, or memory that the system must leave alone until they
    got there. So a GPU keeps what it has been sent. What `torch.compile` and `torch.export` make
    asks for it by an op, `vicinal::numbers`.

    Raises:
        RuntimeError: while a CUDA graph is captured, for numbers that were never sent before.
    """
    if device.type not in _KEEPING:
        return torch.tensor(numbers, dtype=dtype, device=device)
    flat, shape = _flattened(numbers)
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_available():
        return _keep(tuple(flat), tuple(shape), dtype, device)
    made: Tensor = torch.ops.vicinal.numbers(flat, shape, dtype, device)
    return made


def computing(device: torch.device) -> str:
    """Who will compute what is asked of a device now: Python itself, what a compiler makes, or a
    CUDA graph; "python", "compiler" or "graph".
    """
    if device.type != "cuda":
        return "python"
    if torch.compiler.is_compiling():
        return "compiler"
    if not torch.cuda.is_available():
        return "python"
    with torch.cuda.device(device):  # whose current stream it is, not that of another GPU
        return "graph" if torch.cuda.is_current_stream_capturing() else "python"


def _flattened(numbers: Numbers) -> tuple[list[int], list[int]]:
    """All the numbers, row by row, and the shape of the table."""
    flat: list[int] = []
    shape = [len(numbers)]
    for row in numbers:
        if isinstance(row, Sequence):
            flat += row
            shape = [len(numbers), len(row)]
        else:
            flat.append(row)
    return flat, shape


def _keep(
    flat: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The table on the GPU that keeps it, sent if it was not yet."""
    key = flat, shape, dtype, device
    captured = computing(device) == "graph"
    if key not in _kept:
        if captured:
            raise RuntimeError("run once with maps of this shape before capturing a CUDA graph")
        if len(_kept) == _KEPT:
            torch.cuda.synchronize(device)  # other streams may still read them
            _kept.clear()
        with torch.inference_mode(False):  # others will compute gradients with it
            waiting = torch.tensor(flat, dtype=dtype, pin_memory=True).view(shape)
            made = waiting.to(device, non_blocking=True)
        if type(made) is not Tensor:  # a tracer's stand-in for one
            return made
        _kept[key] = made, torch.cuda.current_stream(device).record_event()
    kept, sent = _kept[key]
    if captured:
        _captured[key] = kept
    elif not sent.query():  # it may be another stream that sends it
        torch.cuda.current_stream(device).wait_event(sent)
    return kept


# A compiled graph may overwrite what an op gives it, so it gets a copy, made on the GPU. Where a
# compiler captures CUDA graphs it leaves the op out of them, since it may send.
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
        return _keep(tuple(flat), tuple(shape), dtype, device).clone()
    return torch.tensor(flat, dtype=dtype, device=device).view(shape)


@torch.library.register_fake("vicinal::numbers")
def _(
    flat: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
