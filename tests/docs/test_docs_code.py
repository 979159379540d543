"""The code on all pages and in all public docstrings runs; every public name has an example."""

import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Packages that are too large to install everywhere; code that needs them is skipped without them.
OPTIONAL = (
    "accelerate",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "pytorch_lightning",
    "torch_geometric",
)
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = tuple(
    f"vicinal{name}"
    for name in ("", ".nn", ".detr", ".nets", ".distributed", ".interop", ".visualize")
)


def code_blocks(text: str) -> list[str]:
    """The fenced Python blocks of a page or docstring."""
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in blocks]


def public_names() -> dict[str, Any]:
    """What the modules export: each object once, by the last module that exports it."""
    by_object: dict[int, tuple[str, Any]] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                by_object[id(value)] = f"{module_name}.{name}", value
    return dict(by_object.values())


def documented() -> Iterator[tuple[str, str]]:
    """Name and docstring of public modules, classes, functions, methods and properties."""
    for module_name in MODULES:
        yield module_name, inspect.getdoc(sys.modules[module_name]) or ""
    for name, value in public_names().items():
        yield name, own_docstring(value)
        if inspect.isclass(value):
            for member_name, member in inspect.getmembers(value):
                if not member_name.startswith("_") and is_own(member):
                    yield f"{name}.{member_name}", own_docstring(member)


def is_own(member: Any) -> bool:
    function = member.fget if isinstance(member, property) else member
    return (getattr(function, "__module__", None) or "").startswith("vicinal")


def own_docstring(value: Any) -> str:
    return inspect.cleandoc(value.__doc__ or "")


NAMES = public_names()
CODE_OF_PAGES = {
    str(page.relative_to(ROOT)): blocks
    for page in PAGES
    if (blocks := code_blocks(page.read_text(encoding="utf-8")))
}
CODE_OF_DOCSTRINGS = {
    f"{name}-{index}": code
    for name, docstring in documented()
    for index, code in enumerate(code_blocks(docstring))
}


def run(code: str, name: str, namespace: dict[str, Any]) -> str | None:
    """Runs a block. Returns the name of the optional package that it needs and does not find."""
    try:
        exec(compile(code, name, "exec"), namespace)
    except ImportError as error:
        missing: str | None = getattr(error.__cause__ or error, "name", None)
        if missing not in OPTIONAL or importlib.util.find_spec(missing) is not None:
            raise
        return missing
    return None


@pytest.fixture(autouse=True)
def _fresh_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)


# Of Lightning and of the exporter of ONNX.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*many workers:UserWarning", "ignore:.*axis name:UserWarning")
@pytest.mark.filterwarnings("ignore:.*logging interval:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.10
@pytest.mark.parametrize("page", CODE_OF_PAGES)
def test_code_of_a_page_runs_block_after_block(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    blocks = enumerate(CODE_OF_PAGES[page])
    missing = [run(code, f"{page}, block {index}", namespace) for index, code in blocks]
    if any(missing):
        pytest.skip(f"all blocks ran but those that need {', '.join(filter(None, missing))}")


@pytest.mark.parametrize("example", CODE_OF_DOCSTRINGS)
def test_code_of_a_docstring_runs_by_itself(example: str) -> None:
    missing = run(CODE_OF_DOCSTRINGS[example], example, {"__name__": "example"})
    if missing:
        pytest.skip(f"needs {missing}")


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example(name: str) -> None:
    docstring = own_docstring(NAMES[name])
    _, heading, example = docstring.partition("\nExample:\n")
    assert heading, f"{name} has no section 'Example:'"
    assert code_blocks(example), f"the example of {name} holds no Python block"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/concepts.md",
        "docs/detection.md",
        "docs/labels.md",
        "docs/distributed.md",
        "docs/recipes/classify.md",
        "docs/recipes/containers-arrays.md",
        "docs/recipes/containers-networks.md",
        "docs/recipes/cross-attention.md",
        "docs/recipes/cuda-graphs.md",
        "docs/recipes/detection.md",
        "docs/recipes/encoder.md",
        "docs/recipes/frameworks.md",
        "docs/recipes/labels.md",
        "docs/recipes/sharded-data.md",
        "docs/recipes/streaming.md",
        "docs/switching.md",
        "docs/windows.md",
    ],
)
def test_pages_that_show_code_are_found(page: str) -> None:
    assert page in CODE_OF_PAGES
