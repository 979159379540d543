"""Files of the repository agree with the package, and with one another."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vicinal

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in load(workflow)["jobs"].values() for step in job.get("steps", [])]


def test_the_version_is_the_same_everywhere() -> None:
    recipe = load(ROOT / "conda/recipe/recipe.yaml")
    assert load(ROOT / "CITATION.cff")["version"] == vicinal.__version__
    assert recipe["context"]["version"] == vicinal.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(vicinal.__version__)}, ", changes, re.MULTILINE)


def test_the_recipe_asks_for_what_the_project_asks_for() -> None:
    requirements = load(ROOT / "conda/recipe/recipe.yaml")["requirements"]
    project = PROJECT["project"]
    assert project["dependencies"] == ["torch>=2.10"]
    assert "pytorch >=2.10" in requirements["run"]
    assert f"python {project['requires-python']}" in requirements["run"]
    assert PROJECT["build-system"]["requires"] == ["setuptools>=77"]
    assert "setuptools >=77" in requirements["host"]


def test_classifiers_name_the_versions_that_are_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [x.removeprefix(prefix) for x in PROJECT["project"]["classifiers"] if prefix in x]
    matrix = load(ROOT / ".github/workflows/tests.yml")["jobs"]["matrix"]["strategy"]["matrix"]
    assert [f"3.{minor}" for minor in named] == matrix["python"]
    assert f">={matrix['python'][0]}" == PROJECT["project"]["requires-python"]
    assert PROJECT["project"]["dependencies"] == [f"torch>={matrix['torch'][0][:-2]}"]


def test_wheels_are_built_for_the_oldest_python() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    assert settings["build"] == "cp310-*"
    assert settings["environment"]["VICINAL_REQUIRE_KERNEL"] == "1"
    assert settings["macos"]["environment"]["VICINAL_REQUIRE_KERNEL"] == "1"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: str(path.name))
def test_workflows_are_bounded_and_have_few_permissions(workflow: Path) -> None:
    content = load(workflow)
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 60
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(content["jobs"])
    for step in steps_of(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: str(path.name))
def test_workflows_run_what_exists(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps_of(workflow):
        for line in step.get("run", "").splitlines():
            command, *arguments = shlex.split(line) or [""]
            if command == "make":
                assert arguments[0] in targets
            elif command.startswith("."):
                assert (ROOT / command).is_file()
            elif command == "python" and arguments[:1] == ["-m"]:
                file = ROOT / Path(*arguments[1].split(".")).with_suffix(".py")
                assert arguments[1] in ("pip", "pytest", "build") or file.is_file()
            elif command == "python" and arguments[:1] == ["-c"]:
                ast.parse(arguments[1])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_builds_the_kernel_again_after_any_change_of_its_sources(tmp_path: Path) -> None:
    sources = (ROOT / "src/vicinal/backends/cpu/csrc").rglob("*.*")
    paths = [path.relative_to(ROOT) for path in (ROOT / "Makefile", *sources)]
    for path in (*paths, Path("pyproject.toml"), Path("setup.py"), Path("constraints.txt")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    ready = tmp_path / ".venv" / "ready"
    ready.parent.mkdir()
    ready.touch()
    query = ["make", "--question", "--directory", str(tmp_path), ".venv/ready"]
    assert subprocess.run(query, check=False).returncode == 0
    for path in paths[1:]:
        assert subprocess.run([*query, f"--what-if={path}"], check=False).returncode == 1, path


def test_published_files_come_from_the_checked_workflow_by_trusted_publishing() -> None:
    jobs = load(ROOT / ".github/workflows/release.yml")["jobs"]
    assert jobs["wheels"]["uses"] == "./.github/workflows/wheels.yml"
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert "secrets." not in text
    assert "password" not in text


def test_paths_that_start_workflows_exist() -> None:
    for workflow in WORKFLOWS:
        events = load(workflow)[True]  # YAML 1.1 reads `on` as true
        patterns = [
            pattern
            for event in events.values()
            if isinstance(event, dict)
            for pattern in event.get("paths", [])
        ]
        assert all(list(ROOT.glob(pattern)) for pattern in patterns)


@pytest.mark.parametrize("form", FORMS, ids=lambda path: str(path.name))
def test_forms_ask_for_the_configuration(form: Path) -> None:
    content = load(form)
    if "body" not in content:
        return
    names = [field["id"] for field in content["body"]]
    assert len(names) == len(set(names))
    if form.stem != "feature":
        assert "show_config" in form.read_text(encoding="utf-8")


def test_urls_are_of_one_repository() -> None:
    home = PROJECT["project"]["urls"]["Homepage"]
    assert load(ROOT / "CITATION.cff")["repository-code"] == home
    assert load(ROOT / "conda/recipe/recipe.yaml")["about"]["repository"] == home
    (contact,) = load(ROOT / ".github/ISSUE_TEMPLATE/config.yml")["contact_links"]
    assert contact["url"].startswith(home)


def test_the_script_that_checks_wheels_runs_the_example() -> None:
    source = (ROOT / ".github/check_wheel.py").read_text(encoding="utf-8")
    exec(
        compile(source, str(ROOT / ".github/check_wheel.py"), "exec"),
        {"__file__": str(ROOT / ".github/check_wheel.py")},
    )
    assert "vicinal" in sys.modules
