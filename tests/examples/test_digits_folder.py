"""The output folder: nothing in it is lost to another run, a full disk or a damaged file."""

import contextlib
import errno
import io
import os
import resource
import signal
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_lines import call, refused
from started import light_spawn, run_light
from test_digits_demo import contents
from test_digits_training import CPU, Counter, interrupt, run

from examples import detect_digits
from examples.training.checkpoints import (
    STATE,
    WEIGHTS,
    CheckpointError,
    load_state,
    load_weights,
    read_metadata,
    save_state,
    save_weights,
)
from examples.training.command import FIGURES
from examples.training.folder import LockError, WriteError, lock_folder, lock_for_run, write_file
from examples.training.processes import PeerError, spawn_processes
from vicinal.visualize.files import replace_file

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def small_disk(n_bytes: int) -> Iterator[None]:
    """No file can be larger than this: the system refuses to write on, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------ a full disk


def test_a_full_disk_keeps_the_state_and_names_the_file_and_the_free_space(tmp_path: Path) -> None:
    interrupt(tmp_path, 2)
    before = contents(tmp_path)
    with (
        small_disk(len(before[STATE]) // 2),
        pytest.raises(WriteError, match=r"free") as error,
    ):
        run(tmp_path, resume=True)
    assert str(tmp_path / STATE) in str(error.value)
    assert contents(tmp_path) == before
    assert len(run(tmp_path, resume=True).losses) == 6


def test_a_full_disk_leaves_the_files_of_an_unfinished_run_in_place(tmp_path: Path) -> None:
    interrupt(tmp_path, 2)
    before = contents(tmp_path)
    with small_disk(len(before[STATE]) // 2), pytest.raises(WriteError):
        run(tmp_path)
    assert contents(tmp_path) == before


def test_weights_stay_where_a_state_cannot_be_written(tmp_path: Path) -> None:
    state = tmp_path / STATE
    run(tmp_path)
    before = contents(tmp_path)
    state.unlink()
    state.mkdir()  # no file can have this name, whatever the disk
    with pytest.raises(WriteError, match=STATE) as error:
        save_state(tmp_path, {"losses": []})
    assert "kept" not in str(error.value)
    state.rmdir()
    assert contents(tmp_path) == {WEIGHTS: before[WEIGHTS]}


def test_a_full_disk_while_weights_are_written_keeps_the_weights_before(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    with (
        small_disk(len(before[WEIGHTS]) // 2),
        pytest.raises(WriteError, match=r"free") as error,
    ):
        save_weights(tmp_path, Counter().state_dict(), {})
    assert str(tmp_path / WEIGHTS) in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("name", [FIGURES, detect_digits.PICTURE, detect_digits.PAGE])
def test_every_result_says_where_it_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    (tmp_path / name).mkdir()
    assert call(monkeypatch, detect_digits, "--steps", 1, "--batch", 2, "--out", tmp_path) == 1
    assert str(tmp_path / name) in capsys.readouterr().out
    assert len(load_state(tmp_path, CPU)["losses"]) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_file_of_any_name_and_folder_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in (b"first", b"second"):
        write_file(path, text)
        assert contents(path.parent) == {"file": text}


# ----------------------------------------------------------------------------------- damaged files


def flip(content: bytes) -> bytes:
    """Changes one bit of a weight."""
    model = torch.load(io.BytesIO(content), weights_only=True)["model"]
    at = content.index(model["layers.0.weight"].numpy().tobytes())
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def without(part: str) -> Callable[[bytes], bytes]:
    """Takes a part out of a state, which `torch.load` still reads."""

    def damage(content: bytes) -> bytes:
        state = torch.load(io.BytesIO(content), weights_only=True)
        del state[part]
        changed = io.BytesIO()
        torch.save(state, changed)
        return changed.getvalue()

    return damage


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a flipped bit": flip,
    "another file": lambda content: b"<html></html>",
    **{f"no {part}": without(part) for part in ("config", "losses", "model", "optimizer")},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_a_fresh_run_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    interrupt(tmp_path, 2)
    content = DAMAGES[damage]((tmp_path / STATE).read_bytes())
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged") as error:
        run(tmp_path, resume=True)
    assert str(tmp_path / STATE) in str(error.value)
    run(tmp_path)
    printed = capsys.readouterr().out
    kept = {name: data for name, data in contents(tmp_path).items() if name in printed}
    assert sorted(kept.values()) == sorted((content, weights))
    assert [name for name in kept if "damaged" in name and kept[name] == content]
    assert len(load_state(tmp_path, CPU)["losses"]) == 6


def test_a_state_of_another_model_is_named(tmp_path: Path) -> None:
    interrupt(tmp_path, 2)
    state = torch.load(tmp_path / STATE, weights_only=True)
    torch.save({**state, "model": torch.nn.Linear(1, 1).state_dict()}, tmp_path / STATE)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"model") as error:
        run(tmp_path, resume=True)
    assert str(tmp_path / STATE) in str(error.value)
    assert contents(tmp_path) == before


def test_damaged_states_of_two_runs_are_both_kept(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        (tmp_path / STATE).write_bytes(content)
        run(tmp_path)
    kept = [path.read_bytes() for path in tmp_path.glob("*damaged*")]
    assert sorted(kept) == [b"first", b"second"]


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-40])
    for read in (read_metadata, lambda folder: load_weights(folder, Counter())):
        with pytest.raises(ValueError, match=r"damaged") as error:
            read(tmp_path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("version", [None, 1, 3])
def test_a_state_of_another_version_is_refused_and_a_fresh_run_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    version: int | None,
) -> None:
    run(tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    present = state.pop("version")
    torch.save(state if version is None else {**state, "version": version}, tmp_path / STATE)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"without --resume") as error:
        run(tmp_path, resume=True)
    assert isinstance(error.value, ValueError)
    found = "without version" if version is None else f"version {version}"
    for part in (str(tmp_path / STATE), f"version {present}", found):
        assert part in str(error.value)
    message = refused(monkeypatch, capsys, detect_digits, "--out", tmp_path, "--resume")
    assert "argument --resume: " in message
    assert found in message
    assert contents(tmp_path) == before
    run(tmp_path)
    after = contents(tmp_path)
    assert len(after) == 4
    assert set(before.values()) <= set(after.values())


def test_a_run_resumes_without_its_file_of_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(tmp_path, metadata={"attention": "neighborhood"})
    (tmp_path / WEIGHTS).write_bytes(b"damaged")
    monkeypatch.setattr(detect_digits, "run", lambda arguments, device: None)
    assert call(monkeypatch, detect_digits, "--out", tmp_path, "--resume") == 0


# ----------------------------------------------------------------------------- two runs in a folder


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_a_folder_is_refused_while_another_run_holds_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    run(tmp_path, metadata={"attention": "neighborhood"})
    with lock_folder(tmp_path):
        before = contents(tmp_path)
        assert call(monkeypatch, detect_digits, "--out", tmp_path, *options) == 1
        assert contents(tmp_path) == before
        (lock,) = (name for name in before if name not in (STATE, WEIGHTS))
    printed = capsys.readouterr().out
    for part in (str(tmp_path / lock), f"process {os.getpid()}", socket.gethostname()):
        assert part in printed
    assert sorted(contents(tmp_path)) == sorted((STATE, WEIGHTS))
    with lock_folder(tmp_path):
        assert capsys.readouterr().out == ""


def _die_with_a_lock(folder: Path) -> None:
    (folder / "process").write_text(str(os.getpid()))
    with lock_folder(folder), replace_file(folder / WEIGHTS):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_process_that_was_killed_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_light(_die_with_a_lock, tmp_path) == -signal.SIGKILL
    killed = (tmp_path / "process").read_text()
    (tmp_path / "process").unlink()
    assert len(list(tmp_path.iterdir())) == 2  # the lock, and a file that is not complete
    with lock_folder(tmp_path):
        assert f"process {killed} on" in capsys.readouterr().out
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


class FakeMsvcrt(types.ModuleType):
    """Windows' locks of bytes: they end with the file that they were made through."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.locked: dict[tuple[int, int, int], int] = {}

    def locking(self, file: int, mode: int, n_bytes: int) -> None:
        assert (mode, n_bytes) == (self.LK_NBLCK, 1)
        at = os.lseek(file, 0, os.SEEK_CUR)
        assert at > os.fstat(file).st_size  # no other process can read what is locked
        key = (*self._identity(file), at)
        holder = self.locked.get(key, file)
        if holder != file and self._identity(holder) == key[:2]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self.locked[key] = file

    @staticmethod
    def _identity(file: int) -> tuple[int, int]:
        try:
            found = os.fstat(file)
        except OSError:  # closed
            return -1, -1
        return found.st_dev, found.st_ino


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules for locks that Windows has, and those that it does not have."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", FakeMsvcrt())
    monkeypatch.setattr("examples.training.folder.sys.platform", "win32")


@pytest.mark.usefixtures("windows")
def test_a_folder_is_locked_on_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with lock_folder(tmp_path):
            with pytest.raises(LockError, match=f"process {os.getpid()} on"):
                lock_folder(tmp_path).__enter__()
            assert len(list(tmp_path.iterdir())) == 1
        assert not list(tmp_path.iterdir())
    (tmp_path / "run.lock").write_text('{"process": 3, "host": "pc", "since": "noon"}')
    with lock_folder(tmp_path):  # left by a process that was killed
        assert "process 3 on pc" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("windows")
def test_a_lock_that_another_process_has_opened_stays_on_windows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patches, lock_folder(tmp_path):
        patches.setattr(Path, "unlink", unlink)
    assert len(list(tmp_path.iterdir())) == 1
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_all_processes_stop_where_the_folder_is_held(tmp_path: Path) -> None:
    with light_spawn(), lock_folder(tmp_path / "."):
        spawn_processes(2, _lock_for_run, tmp_path)
    errors = [(tmp_path / f"{rank}.error").read_text() for rank in (0, 1)]
    assert errors[0].startswith("LockError: ")
    assert errors[1].startswith("PeerError: ")


def _lock_for_run(device: torch.device, folder: Path) -> None:
    try:
        with lock_for_run(folder, device):
            raise AssertionError("locked twice")
    except (LockError, PeerError) as error:
        text = f"{type(error).__name__}: {error}"
        (folder / f"{dist.get_rank()}.error").write_text(text)
