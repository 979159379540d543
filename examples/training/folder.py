"""The output folder of a run: who may write to it, and files that are replaced as a whole."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

from examples.training.processes import (
    PEER_STOPPED,
    PeerError,
    all_reduce_sums,
    rank_and_world_size,
)
from vicinal.visualize.files import replace_file

LOCK = "run.lock"
_LOCKED_BYTE = 2**30


class LockError(Exception):
    """Another run writes to the folder."""


class WriteError(OSError):
    """A file cannot be written, for example because the disk is full."""


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a `WriteError` that names the file and the free space."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free / 2**20
            reason += f"; {free:,.1f} MiB are free there"
        kept = ", and the file before is kept" if path.is_file() else ""
        raise WriteError(f"cannot write {path}: {reason}{kept}") from error


def write_file(
    path: Path, content: bytes, before_replacing: Callable[[], object] | None = None
) -> None:
    """Replaces ``path`` once ``content`` is completely written.

    Args:
        path: the file. Its folder is created if necessary.
        content: of the file.
        before_replacing: called when ``content`` is written beside ``path``, which still is as
            before.

    Raises:
        WriteError: the file cannot be written; it is as before.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(content)
            file.flush()
            if before_replacing is not None:
                before_replacing()


@contextlib.contextmanager
def lock_for_run(folder: Path, device: torch.device) -> Iterator[None]:
    """Locks ``folder`` for all processes of this run, by the first one.

    Raises:
        LockError: another run has locked the folder.
        WriteError: the lock cannot be written.
        PeerError: the first process raised one of these.
    """
    problem: Exception | None = None
    with contextlib.ExitStack() as lock:
        if rank_and_world_size()[0] == 0:
            try:
                lock.enter_context(lock_folder(folder))
            except (LockError, WriteError) as error:
                problem = error
        (failed,) = all_reduce_sums([problem is not None], device)
        if problem is not None:
            raise problem
        if failed:
            raise PeerError(PEER_STOPPED)
        yield


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds ``run.lock``, which says who writes to ``folder``: process, host and since when.

    The operating system releases the lock when the process ends, however it ends. The lock of a
    process that was killed is therefore taken over, and files that it left half-written are
    removed.

    Raises:
        LockError: another process holds the lock.
        WriteError: the lock cannot be written.
    """
    path = folder / LOCK
    with explain_write_errors(path):
        file = _open_locked(path)
    with file:
        before = _describe_holder(file)
        if before:
            print(f"Took over {path} of {before}: that run ended without releasing it.", flush=True)
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
        with explain_write_errors(path):
            file.truncate(0)
            json.dump(_this_process(), file)
            file.flush()
        try:
            yield
        finally:
            _remove(file, path)


def _open_locked(path: Path) -> TextIO:
    """Opens the lock file and locks it."""
    while True:
        with contextlib.ExitStack() as on_failure:
            file = on_failure.enter_context(path.open("a+"))
            if not _try_lock(file):
                holder = _describe_holder(file) or "another process"
                raise LockError(
                    f"{path} is held by {holder}; wait for that run, or choose another --out"
                )
            if _is_file_at(file, path):  # else the process that held it has just removed it
                on_failure.pop_all()
                return file


def _try_lock(file: TextIO) -> bool:
    """Locks a file until it is closed or the process ends; False if another one holds it."""
    if sys.platform == "win32":
        import msvcrt

        # One byte far beyond the text: no other process can read what is locked there.
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(file: TextIO, path: Path) -> None:
    """Removes the lock file before another process can lock it."""
    if sys.platform == "win32":  # where no open file can be removed, by any process
        file.close()
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)


def _is_file_at(file: TextIO, path: Path) -> bool:
    """Whether ``path`` still is this file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, str | int]:
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": now}


def _describe_holder(file: TextIO) -> str:
    """The process, host and time in a lock file, as text; empty if there are none."""
    file.seek(0)
    try:
        holder = json.load(file)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return ""
