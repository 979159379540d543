"""A hook of MkDocs: public names in code spans become links to the API reference.

So docstrings and pages write `FeaturePyramid` in backticks and need no link syntax.
"""

import ast
import re
from pathlib import Path
from typing import Any

SOURCES = {
    "vicinal": "src/vicinal/__init__.py",
    "vicinal.nn": "src/vicinal/nn/__init__.py",
    "vicinal.detr": "src/vicinal/detr/__init__.py",
    "vicinal.nets": "src/vicinal/nets/__init__.py",
    "vicinal.distributed": "src/vicinal/distributed/__init__.py",
    "vicinal.interop": "src/vicinal/interop/__init__.py",
    "vicinal.visualize": "src/vicinal/visualize/__init__.py",
}
_CODE = re.compile(
    r"(?P<skip><pre.*?</pre>|<a\b.*?</a>|<autoref\b.*?</autoref>|<h\d.*?</h\d>)"
    r"|<code>(?P<name>[A-Za-z_][\w.]*)(?P<call>\(\))?</code>",
    re.DOTALL,
)


def exported_names(source: Path) -> list[str]:
    """The strings of a module's ``__all__``, read without importing it."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def targets() -> dict[str, str]:
    """The identifier in the API reference for every public name, with and without its module."""
    found: dict[str, str] = {}
    for module, source in SOURCES.items():
        for name in exported_names(Path(source)):
            found[name] = found[f"{module}.{name}"] = f"{module}.{name}"
    return found


_TARGETS = targets()


def link_names(html: str) -> str:
    """Replaces code spans that hold a public name by references that autorefs resolves."""

    def replace(match: re.Match[str]) -> str:
        name, call = match["name"], match["call"] or ""
        head, _, member = (name or "").rpartition(".")
        if name in _TARGETS:
            target = _TARGETS[name]
        elif head in _TARGETS:
            target = f"{_TARGETS[head]}.{member}"
        else:
            return match[0]
        return f'<autoref optional identifier="{target}"><code>{name}{call}</code></autoref>'

    return _CODE.sub(replace, html)


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs for every page, before autorefs resolves references."""
    return link_names(html)
