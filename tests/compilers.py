"""How tests compile."""

from contextlib import AbstractContextManager

import torch


def floats_are_constants() -> AbstractContextManager[None]:
    """A context in which compilers take Python numbers, such as rates of dropout, as constants.

    With ``dynamic=True`` torch first traces them as inputs of the graph, finds that it needs their
    values, and traces everything again with constants. The graphs are the same, and tracing takes
    half as long.
    """
    context: AbstractContextManager[None] = torch._dynamo.config.patch(specialize_float=True)
    return context
