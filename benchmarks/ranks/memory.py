"""The peak of the memory of tensors on the CPU."""

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_of_tensors(call: Callable[[], object]) -> int:
    """Bytes of the tensors on the CPU that a call has allocated and not freed, at their peak.

    What was there before the call does not count. The profiler of PyTorch reports each allocation,
    so memory that malloc retains and that libraries use for themselves is not in it.
    """
    with warnings.catch_warnings():
        # Of torch 2.11 on. To keep the events would parse them once more, which takes long.
        warnings.filterwarnings("ignore", ".*Profiler clears events", UserWarning)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event["name"] == "[memory]"]
    largest = live = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += int(change["Bytes"])
        largest = max(largest, live)
    return largest
