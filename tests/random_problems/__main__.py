"""Runs many random problems: ``python -m tests.random_problems --problems 10000``."""

import argparse
import os
import time
import traceback

import torch

BACKENDS = ("reference", "cpu", "triton")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.random_problems", description=__doc__)
    parser.add_argument("--problems", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem; default: 0")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["reference", "cpu"])
    parser.add_argument(
        "--gradients", type=int, default=3, help="compare those of every n-th problem; default: 3"
    )
    return parser.parse_args()


def main() -> int:
    """The exit status: 1 if a problem failed."""
    options = parse()
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    torch.set_num_threads(1)
    from .check import run_problem

    started, failed = time.monotonic(), 0
    largest = dict.fromkeys(options.backend, 0.0)
    for seed in range(options.seed, options.seed + options.problems):
        gradients = seed % options.gradients == 0
        for backend in options.backend:
            try:
                found = run_problem(seed, backend, gradients=gradients)
                largest[backend] = max(largest[backend], found)
            except Exception:
                failed += 1
                print(traceback.format_exc(limit=-2), flush=True)
                again = f"--seed {seed} --problems 1 --backend {backend} --gradients 1"
                print(f"seed {seed} failed. Repeat: python -m tests.random_problems {again}\n")
        done = seed - options.seed + 1
        if done % max(1, options.problems // 20) == 0 or done == options.problems:
            worst = ", ".join(f"{name} {value:.2g}" for name, value in largest.items())
            seconds = time.monotonic() - started
            print(
                f"{done} problems, {failed} failures, largest difference: {worst}; {seconds:.0f} s",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
