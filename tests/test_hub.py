"""A pinned commit is what every loader takes: of two commits in a cache, and in what the data sets' library is asked."""
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

from lcnb.foundations.checks import InputError
from lcnb.laboratory.grammar import build_tokenizer
from lcnb.laboratory.models import load_model, random_llama

OLD, NEW = "a"*40, "c"*40


@pytest.fixture
def book(tmp_path, monkeypatch):
    "A checkout that pins what is loaded here."
    (tmp_path / "book/data").mkdir(parents=True)
    sets = "".join(f"  {n}: {{revision: {OLD}}}\n" for n in ("org/set", "stanfordnlp/sst2", "ccdv/govreport-summarization"))
    (tmp_path / "book/data/hub.yaml").write_text(f"models:\n  org/lm: {{revision: {OLD}}}\n  org/free: {{revision: null}}\ndatasets:\n{sets}")
    monkeypatch.setenv("LCNB_HOME", str(tmp_path / "book"))
    return tmp_path


def test_models_and_encoders(book):
    cache = book / "hub"
    for name in ("lm", "free"):
        for seed, at in enumerate((OLD, NEW)): random_llama(cache / f"models--org--{name}/snapshots/{at}", build_tokenizer(), seed=seed)
        (cache / f"models--org--{name}/refs").mkdir()
        (cache / f"models--org--{name}/refs/main").write_text(NEW)
    code = """
from lcnb.laboratory.models import load_model
from lcnb.longembed.encoders import load_encoder
from lcnb.e2llm.data import tokenizer_and_window
for name, revision in (("org/lm", None), ("org/lm", "main"), ("org/free", None)):
    lm, e = load_model(name, revision=revision), load_encoder(name, revision=revision)
    first = lambda m: float(next(m.parameters()).sum())
    print(lm.revision[0], e.revision[0], repr(first(lm.model)), repr(first(e.model)), tokenizer_and_window(name, revision)[1])
"""
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    weight = {at[0]: float(next(load_model(str(cache / f"models--org--lm/snapshots/{at}")).model.parameters()).sum()) for at in (OLD, NEW)}
    assert [l.split() for l in said.stdout.splitlines()] == [[at, at, repr(weight[at]), repr(weight[at]), "64"] for at in "acc"]


class Asked(ValueError): "What the library was asked for."


def test_data_sets(book, monkeypatch):
    import datasets
    from lcnb.e2llm.data import load_hub
    from lcnb.laboratory.corpora import load_corpus
    from lcnb.laboratory.fewshot import read_questions
    from lcnb.longembed.benchmark import load_task
    from lcnb.memlong.icl import load_icl
    seen = []
    def ask(*a, revision=None, **kw):
        seen.append(revision)
        raise Asked("enough")
    for f in ("load_dataset", "load_dataset_builder"): monkeypatch.setattr(datasets, f, ask)
    loads = [lambda **r: list(load_corpus("hub:org/set:default:test", **r)), lambda **r: load_task("hub:org/set:qmsum", **r), lambda **r: load_icl("sst2", **r)]
    for load in loads + [lambda: list(read_questions("hub:org/set:c:test")), lambda: load_hub("govreport", "test"), lambda: load_hub("org/set", "test")]:
        with pytest.raises((InputError, Asked), match="enough"): load()
    assert seen == [OLD]*6
    for load in loads:
        with pytest.raises((InputError, Asked), match="enough"): load(revision="main")
    with pytest.raises((InputError, Asked), match="enough"): list(read_questions("hub:org/set@v2:c:test"))
    assert seen[6:] == ["main"]*3 + ["v2"]
