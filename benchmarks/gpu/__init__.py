"""The study on a GPU: what `benchmarks.study` is on the CPU."""
