"""What pyproject.toml cannot say: `configs/` stays at the top of the repository, and ships as `raydistill/configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["raydistill*"]), "raydistill.configs"],
    package_dir={"raydistill.configs": "configs"},
)
