"""Examples; run them from the root of the repository."""

import os

# These have to be set before torch is imported. Idle OpenMP threads spin for some tens of
# microseconds before they sleep: spinning longer makes training several times slower on a machine
# with other load, sleeping at once makes it a quarter slower. oneDNN caches a compiled primitive
# for every new number of points; where it differs at every step, this takes gigabytes and saves no
# time.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
