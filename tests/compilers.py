"""How tests compile."""

from typing import Any

import torch


def floats_are_constants() -> Any:
    """A context in which compilers take Python numbers, such as rates of dropout, as constants.

    With ``dynamic=True`` torch first traces them as inputs of the graph, finds that it needs their
    values, and traces everything again with constants. The graphs are the same, and compiling takes
    half as long.
    """
    return torch._dynamo.config.patch(specialize_float=True)
