"""rattler-build accepts the conda recipe, where it is installed (pip install py-rattler-build)."""

from pathlib import Path

import pytest

rattler_build = pytest.importorskip("rattler_build")

RECIPE = Path(__file__).parents[2] / "conda/recipe"


@pytest.mark.parametrize("platform", ["linux-64", "linux-aarch64", "osx-arm64", "osx-64"])
def test_the_recipe_renders(platform: str) -> None:
    settings = rattler_build.PlatformConfig(target_platform=platform)
    variants = rattler_build.VariantConfig.from_file_with_context(
        str(RECIPE / "variants.yaml"), rattler_build.JinjaConfig(platform=settings)
    )
    recipe = rattler_build.Stage0Recipe.from_file(str(RECIPE / "recipe.yaml"))
    (rendered,) = recipe.render(variants, rattler_build.RenderConfig(settings))
    requirements = rendered.recipe.requirements.to_dict()
    assert any(platform in requirement for requirement in requirements["build"])
    assert "pytorch >=2.10" in requirements["run"]
