"""How often tests look for garbage that refers to itself."""

import atexit
import gc
import os
import sys

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


def exit_at_once() -> None:
    """Has this process end without freeing all its objects and modules, which takes seconds.

    Whatever else is to be done at exit is done before.
    """
    atexit.register(_exit_at_once)


def _exit_at_once() -> None:
    atexit.unregister(_exit_at_once)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
