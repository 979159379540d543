"""The scaling study of several processes: ``python -m benchmarks.ranks``."""
