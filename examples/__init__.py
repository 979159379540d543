"""Examples; run them from the root of the repository."""

import os

# Before torch starts. Threads that wait spin for some tens of microseconds, then sleep: longer, and
# they slow down a machine that has other work several times over; sleeping at once takes a quarter
# more time. And oneDNN keeps what it compiles for every new number of points, which in a training
# with a new one at every step takes gigabytes and no less time.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
