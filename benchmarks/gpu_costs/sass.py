"""Compiled code for a GPU, read as instructions: its loops, and the way that programs take."""

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

_LABEL = re.compile(r"\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
_PREDICATE = re.compile(r"@!?U?P\w+\s+")
_TARGET = re.compile(r"`\((\.L\w+)\)")


class Loop(NamedTuple):
    start: int  # the first instruction
    stop: int  # one past the branch back to it
    counts: Counter[str]  # how often each kind of instruction is in it

    @property
    def length(self) -> int:
        return self.stop - self.start


class Code:
    """The instructions of a kernel.

    Attributes:
        instructions: in order, as nvdisasm prints them.
        targets: for each branch, by its number, the number of the instruction it jumps to.
    """

    def __init__(self, text: str) -> None:
        """``text`` is what ``nvdisasm -c`` prints."""
        labels: dict[str, int] = {}
        self.instructions: list[str] = []
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(self.instructions)
            elif found := _INSTRUCTION.match(line):
                self.instructions.append(found[1])
        self.targets: dict[int, int] = {}
        for number, instruction in enumerate(self.instructions):
            target = _TARGET.search(instruction)
            if target and _kind(instruction) == "BRA" and target[1] in labels:
                self.targets[number] = labels[target[1]]

    def innermost_loops(self) -> list[Loop]:
        """The loops that contain no other; branches to themselves end a program, and are none."""
        spans = sorted(
            (stop - start, start, stop + 1)
            for stop, start in self.targets.items()
            if start < stop
        )  # fmt: skip
        found: list[Loop] = []
        for _, start, stop in spans:
            if not any(start <= loop.start and loop.stop <= stop for loop in found):
                found.append(Loop(start, stop, Counter(map(_kind, self.instructions[start:stop]))))
        return sorted(found, key=lambda loop: loop.start)

    def block_loop(self) -> Loop | None:
        """The loop of a list's blocks: it multiplies matrices, and is the one that is pipelined.

        None if no loop multiplies matrices.
        """
        loops = [loop for loop in self.innermost_loops() if loop.counts["HMMA"]]
        return max(loops, key=lambda loop: (loop.counts["LDGSTS"] > 0, -loop.start), default=None)

    def path_outside(self, loop: Loop) -> int:
        """The fewest instructions that a program executes before and after ``loop``."""
        before, after = self._shortest(0, loop.start), self._shortest(loop.stop, None)
        return before + after

    def _shortest(self, start: int, stop: int | None) -> int:
        """Instructions from ``start`` to ``stop``, or to the end of the program."""
        reached, queue = set(), [(0, start)]
        while queue:
            length, number = heapq.heappop(queue)
            if number == stop or (stop is None and self._ends(number)):
                return length + (stop is None)
            if number in reached or number >= len(self.instructions):
                continue
            reached.add(number)
            for following in self._following(number):
                heapq.heappush(queue, (length + 1, following))
        raise ValueError("no path through the code")

    def _ends(self, number: int) -> bool:
        return self.instructions[number].startswith("EXIT")

    def _following(self, number: int) -> list[int]:
        if number not in self.targets:
            return [number + 1]
        always = self.instructions[number].startswith("BRA `")
        return [self.targets[number]] if always else [self.targets[number], number + 1]


def _kind(instruction: str) -> str:
    return _PREDICATE.sub("", instruction).split()[0].split(".")[0]


class Resources(NamedTuple):
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: those of the stack


def resources(cubin: bytes) -> Resources:
    """What cuobjdump reports."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "--dump-resource-usage", cubin))
    assert found is not None
    return Resources(int(found[1]), int(found[2]))


def disassemble(cubin: bytes) -> Code:
    return Code(_run("nvdisasm", "-c", cubin))


def _run(tool: str, option: str, cubin: bytes) -> str:
    """Runs one of the tools that Triton ships."""
    import triton

    knob: Any = getattr(triton.knobs.nvidia, tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knob.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
