"""The code in the README and in the page on detection runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/detection.md")
BLOCKS = [
    (page, code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_code_block(page: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, page, "exec"), {})
    assert "torch.Size" in capsys.readouterr().out


def test_there_are_blocks() -> None:
    assert {page for page, _ in BLOCKS} == set(PAGES)
