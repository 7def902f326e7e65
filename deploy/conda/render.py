"""Render recipe.yaml by rattler-build for every platform: unknown keys and wrong expressions fail.

make check-deploy
"""

from pathlib import Path

import rattler_build

VARIANTS = {"c_stdlib": ["sysroot"], "c_stdlib_version": ["2.17"]}  # conda-forge pins them
PLATFORMS = ("linux-64", "linux-aarch64", "osx-64", "osx-arm64", "win-64")


def main() -> None:
    text = Path(__file__).with_name("recipe.yaml").read_text()
    recipe = rattler_build.Stage0Recipe.from_yaml(text)
    for platform in PLATFORMS:
        config = rattler_build.RenderConfig(rattler_build.PlatformConfig(target_platform=platform))
        [made] = recipe.render(rattler_build.VariantConfig(VARIANTS), config)
        print(platform, made.recipe.package.version, *made.recipe.requirements.build)


if __name__ == "__main__":
    main()
