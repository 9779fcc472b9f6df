"""The packages of the distribution; everything else about it is in setup.cfg.

`prd/teachers`, `prd/adapters` and `prd/configs` are symlinks. A checkout without symlinks (git on Windows) has
a text file in the place of each, so the packages are found in the folders that the links point to.
"""

from setuptools import find_packages, setup

LINKED = ("teachers", "adapters", "configs")

# Nothing else of the top level may reach site-packages.
packages = {*find_packages(include=["prd", "prd.*"])}
packages |= {f"prd.{found}" for name in LINKED for found in find_packages(include=[name, f"{name}.*"])}

setup(packages=sorted(packages), package_dir={f"prd.{name}": name for name in LINKED})
