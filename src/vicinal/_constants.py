"""Small tables of numbers as tensors, on a GPU without a stall."""

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[int] | Sequence[Sequence[int]]

_KEPT = 4096  # tables, of a few hundred bytes
_kept: dict[object, tuple[Tensor, torch.cuda.Event]] = {}
_captured: dict[object, Tensor] = {}  # which CUDA graphs read for good


def constant(numbers: Numbers, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """``numbers`` as a tensor that nobody may change.

    To send numbers to a GPU takes a wait, or memory that the system must leave alone until they
    got there. So a GPU keeps what it has been sent.

    Raises:
        RuntimeError: while a CUDA graph is captured, for numbers that were never sent before.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return torch.tensor(numbers, dtype=dtype, device=device)
    key = (*(tuple(row) if isinstance(row, Sequence) else row for row in numbers), device, dtype)
    capturing = torch.cuda.is_current_stream_capturing()
    if key not in _kept:
        if capturing:
            raise RuntimeError("run once with maps of this shape before capturing a CUDA graph")
        if len(_kept) == _KEPT:
            torch.cuda.synchronize(device)  # other streams may still read them
            _kept.clear()
        with torch.inference_mode(False):  # others will compute gradients with it
            waiting = torch.tensor(numbers, dtype=dtype, pin_memory=True)
            made = waiting.to(device, non_blocking=True)
        if type(made) is not Tensor:  # a tracer's stand-in for one
            return made
        _kept[key] = made, torch.cuda.current_stream(device).record_event()
    kept, sent = _kept[key]
    if capturing:
        _captured[key] = kept
    elif not sent.query():  # it may be another stream that sends it
        torch.cuda.current_stream(device).wait_event(sent)
    return kept
