"""The project as a project: one set of requirements, one set of pins, a licence, light imports, floors."""
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
INI = configparser.ConfigParser(delimiters=["="], interpolation=None)
INI.read(ROOT / "settings.ini")
CFG = INI["DEFAULT"]
SAME = {"pytorch-gpu": "torch", "matplotlib-base": "matplotlib", "faiss-gpu": "faiss-gpu-cu12"}    # conda's name -> pip's
NOT_ON_GPU = {"faiss-cpu"}                                                                       # twins that the GPU environment replaces


def split(spec):
    "(name, version part) of a requirement."
    name, version = re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", spec.strip()).groups()
    return name.lower().replace("_", "-"), version.strip()


def settings():
    "name -> version part, from settings.ini."
    return dict(split(s) for key in ("requirements", "dev_requirements", "gpu_requirements") for s in CFG[key].split())


def test_environment_is_settings():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    deps = [d for d in env["dependencies"] if isinstance(d, str)] + next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    conda = {SAME.get(n, n): v for n, v in map(split, deps)}
    assert conda.pop("pip") == "" and conda.pop("python") == f">={CFG['min_python']},<3.13"
    assert conda == {k: v for k, v in settings().items() if k not in NOT_ON_GPU}


def test_constraints_satisfy_settings():
    from packaging.requirements import Requirement
    pins = dict(split(l) for l in (ROOT / "constraints.txt").read_text().splitlines() if l and not l.startswith("#"))
    assert all(v.startswith("==") for v in pins.values()) and pins["torch"] == "==2.13.0"
    for key in ("requirements", "dev_requirements"):
        for r in map(Requirement, CFG[key].split()):
            assert r.specifier.contains(pins[r.name.lower()][2:], prereleases=True), r


def test_installed_is_what_was_pinned():
    from importlib import metadata
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, version = split(line) if line and not line.startswith("#") else (None, None)
        if name in ("torch", "transformers", "nbdev", "fastcore", "papermill"): assert metadata.version(name).split("+")[0] == version[2:], name


def test_import_is_cheap():
    "`import lcnb` loads nothing heavy, and no room of the library loads what only some uses need."
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'faiss', 'matplotlib', 'seaborn', 'pandas', 'papermill', 'fastcore'}"
    subprocess.run([sys.executable, "-c", f"import lcnb, sys; bad = {heavy} & set(sys.modules); assert not bad, bad"], check=True)
    heavy = "{'transformers', 'datasets', 'peft', 'faiss', 'matplotlib', 'seaborn', 'papermill', 'fastcore', 'IPython'}"
    subprocess.run([sys.executable, "-c", f"import lcnb.methods, sys; bad = {heavy} & set(sys.modules); assert not bad, bad"], check=True)


def test_licence():
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "apache2" == CFG["license"]


@pytest.mark.parametrize("path", sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts), ids=lambda p: str(p.relative_to(ROOT)))
def test_notebook_is_small_and_plain(path):
    text = path.read_text(encoding="utf8")
    assert len(text) < 100_000 and '"image/png"' not in text
    assert "trust_remote_code=True" not in text and "weights_only=False" not in text and "import pickle" not in text
