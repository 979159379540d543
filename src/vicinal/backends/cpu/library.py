"""The compiled kernel's file: where it lies, and why it is missing or does not load."""

import importlib.metadata
import platform
import struct
from pathlib import Path

FOLDER = Path(__file__).parent
_REASON_FILE = "no_kernel.txt"  # written by the build where the kernel should be
_OF_ELF = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}
_OF_MACH_O = {0x01000007: "x86-64", 0x0100000C: "AArch64"}
_OF_MACHINE = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "AArch64", "aarch64": "AArch64"}


def find_library(folder: Path = FOLDER) -> Path | None:
    """The file of the kernel, or None."""
    return min(folder.glob("_cpu*.so"), default=None)


def missing_reason(folder: Path = FOLDER) -> str:
    """Why there is no file, as far as the installation tells."""
    if platform.system() == "Windows":
        return "there is no CPU kernel for Windows"
    record = folder / _REASON_FILE
    built = record.read_text(encoding="utf-8").strip() if record.is_file() else None
    if _installed_from_a_pure_wheel(folder.parents[2]):
        place = f"{platform.system()} on {platform.machine()}"
        return (
            f"the wheel that is installed on this machine ({place}) has no kernel"
            + (f", because {built}" if built else "")
            + "; install a C++ compiler, then the sources, as the page on installation says"
        )
    return f"its kernel was not built{f': {built}' if built else ''}"


def load_failure(library: Path, error: OSError) -> str:
    """Why the file does not load. The loader itself says little about another architecture."""
    loader = error.__context__ or error  # torch says no more than which file it is
    theirs = _architecture(library)
    ours = _OF_MACHINE.get(platform.machine().lower())
    if theirs is not None and ours is not None and theirs != ours:
        return f"its kernel is built for {theirs}, and this Python runs on {ours}: {loader}"
    return f"its kernel does not load: {loader}"


def _installed_from_a_pure_wheel(packages: Path) -> bool:
    """Whether the package in the folder ``packages`` comes from a wheel for any platform."""
    for installed in importlib.metadata.distributions(name="vicinal", path=[str(packages)]):
        return "Root-Is-Purelib: true" in (installed.read_text("WHEEL") or "")
    return False


def _architecture(library: Path) -> str | None:
    """What an ELF or Mach-O file was built for; None if neither, or an unknown one."""
    with library.open("rb") as file:
        head = file.read(20)
    if len(head) < 20:
        return None
    if head[:4] == b"\x7fELF":
        little = head[5] == 1
        return _OF_ELF.get(struct.unpack_from("<H" if little else ">H", head, 18)[0])
    if head[:4] == b"\xcf\xfa\xed\xfe":
        return _OF_MACH_O.get(struct.unpack_from("<I", head, 4)[0])
    return None
