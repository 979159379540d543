"""Files that are replaced as a whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a new file that replaces ``path`` once it is completely on the disk.

    The new file has a name of its own in the same folder until then, so several processes may
    replace the same file. Where anything fails, ``path`` stays as it is and the new file is
    removed. A symbolic link stays, and the file that it names is replaced.

    Raises:
        OSError: the file cannot be written; the error names ``path``.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    except OSError as error:
        if error.filename not in (None, str(part)):  # of another file, within the caller's block
            raise
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        part.unlink(missing_ok=True)
