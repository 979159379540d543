"""Examples; run them from the root of the repository."""

import os

# Before torch starts its threads: waiting threads sleep instead of spinning. On a machine with
# other work to do, threads that spin slow this down several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
