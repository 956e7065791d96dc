"""The packages, and `configs/` as one of them: jaxcrystal.configs. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxcrystal", "jaxcrystal.*"]), "jaxcrystal.configs"],
    package_dir={"jaxcrystal.configs": "configs"},
)
