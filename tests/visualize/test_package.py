"""What importing the package loads, and the files it ships."""

from pathlib import Path

from problems import run_python

PAGE = "src/vicinal/visualize/page"


def test_matplotlib_is_imported_for_figures_only_which_say_so_where_it_is_missing() -> None:
    code = (
        "import sys, vicinal\n"
        "assert 'vicinal.visualize' not in sys.modules\n"
        "import vicinal.visualize\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert not hasattr(vicinal.visualize, 'draw_nothing')\n"
        "sys.modules['matplotlib'] = None  # cannot be imported\n"
        "try:\n"
        "    from vicinal.visualize import draw_attention\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "del sys.modules['matplotlib']\n"
        "from vicinal.visualize import draw_attention, draw_overview\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    assert "draw_attention needs matplotlib: pip install 'vicinal[visualize]'" in run_python(code)


def test_scipy_is_imported_for_matching_only() -> None:
    assert run_python("import sys, vicinal.detr\nprint('scipy' in sys.modules)") == "False\n"


def test_a_built_package_holds_the_page() -> None:
    root = Path(__file__).parents[2]
    code = (
        f"import os; os.chdir({str(root)!r})\n"
        "from setuptools import Distribution\n"
        "distribution = Distribution()\n"
        "distribution.parse_config_files(['pyproject.toml'])\n"
        "build = distribution.get_command_obj('build_py')\n"
        "build.ensure_finalized()\n"
        "for _, folder, _, names in build.get_data_files_without_manifest():\n"
        "    print(*(os.path.join(folder, name) for name in names), sep='\\n')\n"
    )
    page = {str(path.relative_to(root)) for path in (root / PAGE).iterdir() if path.is_file()}
    assert len(page) >= 3
    assert page <= set(run_python(code).splitlines())
