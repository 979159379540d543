"""A training step for a profiler, after those that compile: ``ncu ... -m benchmarks.profiled``.

`benchmarks.first` runs it with ``--profile-from-start off``.
"""

import sys

import torch

from benchmarks.cases import SETTINGS
from benchmarks.measure import WARM_UPS


def main() -> int:
    if not torch.cuda.is_available():
        print("A profile needs a GPU, and PyTorch finds none.", file=sys.stderr)
        return 2
    step = SETTINGS["cuda"]["full"].layer().whole().step
    for _ in range(WARM_UPS):
        step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
