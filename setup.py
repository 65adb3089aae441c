"""Build script: every fact about the package is read from settings.ini, the file that nbdev uses too."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(Path(__file__).parent / "settings.ini")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    license="Apache-2.0", author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    packages=find_packages(include=["lcnb", "lcnb.*"]), python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "gpu", "cluster", "real")},
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
)
