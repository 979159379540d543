"""The site names all pages and public names, its drawing is current, its words are plain."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXTS = [
    path
    for folder in ("src", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".h", ".cpp", ".js", ".css", ".html", ".svg")
] + [ROOT / "README.md"]
# Words that readers stumbled over; a line may break, and comment signs may stand, between them.
_BETWEEN = r"[\s#/*]+"
WORDS = ("anew", "nobody", "whom", "takes no part", "for looking")


def stumbling_blocks(text: str) -> list[str]:
    pattern = "|".join(_BETWEEN.join(words.split()) for words in WORDS)
    return [match[0] for match in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_plain(path: Path) -> None:
    assert not stumbling_blocks(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", ["Found Anew.", "takes\n    # no part", "Nobody", "for\nlooking"])
def test_words_are_found(text: str) -> None:
    assert stumbling_blocks(text)


def test_words_within_words_are_fine() -> None:
    assert not stumbling_blocks("a new canewood, whomever")


def test_all_pages_are_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"^ +- .*?([\w./-]+\.md)$", settings, re.MULTILINE))
    assert pages == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_reference_covers_all_public_names() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    modules = "nn", "detr", "nets", "distributed", "interop", "visualize"
    whole = {f"vicinal.{name}" for name in modules}  # all that `__all__` lists
    assert whole <= entries
    vicinal, nn = map(importlib.import_module, ("vicinal", "vicinal.nn"))
    missing = {
        name
        for name in set(vicinal.__all__) - set(nn.__all__) - {"__version__"}
        if f"vicinal.{name}" not in entries
    }
    assert not missing


def test_the_design_names_files_that_exist() -> None:
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w/]+(?:\.(?:py|h|cpp)|/))`", text))
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*")]
    files += [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    files += [path.relative_to(ROOT).as_posix() for path in ROOT.glob("build_backend/*.py")]
    files.append("build_backend")
    missing = {
        name
        for name in names
        if not any(f"/{path}".endswith(f"/{name.rstrip('/')}") for path in files)
    }
    assert len(names) > 20
    assert not missing


@pytest.mark.parametrize("name", ["concepts.svg", "concepts-narrow.svg"])
def test_the_drawing_is_what_its_script_draws(name: str) -> None:
    script = runpy.run_path(str(DOCS / "draw_concepts.py"))
    assert set(script["DRAWINGS"]) == {"concepts.svg", "concepts-narrow.svg"}
    drawn = script["draw"](stacked=script["DRAWINGS"][name])
    assert drawn == (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["windows-lines.svg", "windows-lidar.svg", "windows-events.svg"])
def test_pictures_of_windows_are_what_their_script_draws(name: str) -> None:
    script = importlib.import_module("docs.draw_windows")
    assert set(script.DRAWINGS) == {path.name for path in DOCS.glob("windows-*.svg")}
    assert script.draw(name) == (DOCS / name).read_text(encoding="utf-8")


def test_the_picture_of_parts_is_what_its_script_draws() -> None:
    script = importlib.import_module("docs.draw_distributed")
    assert script.draw() == (DOCS / "distributed.svg").read_text(encoding="utf-8")


def test_the_page_on_windows_names_the_suggested_ones() -> None:
    text = (DOCS / "windows.md").read_text(encoding="utf-8")
    scenes = importlib.import_module("benchmarks.scenes")
    assert f"`{list(scenes.WINDOWS_LIDAR)}`" in text
    assert all(f"`{window.size}`" in text for window in scenes.windows_of_events())


def test_code_spans_of_public_names_become_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where MkDocs runs
    link_names = runpy.run_path(str(DOCS / "link_names.py"))["link_names"]
    target = '<autoref optional identifier="vicinal.FeaturePyramid'
    assert link_names("<code>FeaturePyramid</code>").startswith(f'{target}"><code>')
    assert link_names("<code>FeaturePyramid.levels</code>").startswith(f'{target}.levels"><code>')
    for html in (
        "<code>torch.unique</code>",
        "<pre><code>FeaturePyramid</code></pre>",
        '<a href="x"><code>FeaturePyramid</code></a>',
        "<h2><code>FeaturePyramid</code></h2>",
    ):
        assert link_names(html) == html
