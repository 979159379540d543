"""Long checks of the C++ kernel: ``python -m tests.soak``."""
