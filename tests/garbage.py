"""How often tests look for garbage that refers to itself."""

import atexit
import gc
import os

# Torch reads it when its compiler is imported, also in processes that tests start.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")


def rarely() -> None:
    """Nothing that exists now is looked at again, and new objects once there are many.

    Imported modules and thousands of tests are no garbage, but each collection of all objects would
    look at them.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()
    atexit.register(gc.unfreeze)  # extension modules report what is left at the very end
