"""Real checkpoints and real texts, where LCNB_ASSETS names a folder with them: numbers that others measured, and the profile `assets` end to end."""
import math
import os
import subprocess
import sys

import pytest

from lcnb.foundations.checks import InputError
from lcnb.laboratory.corpora import Corpus, Document, load_corpus, token_windows
from lcnb.laboratory.models import load_model
from lcnb.laboratory.protocols import eval_last_ppl
from lcnb.longembed.benchmark import BM25, eval_retrieval, needle_task
from lcnb.methods import extend, make_plan
from lcnb.reproduction import registry
from lcnb.reproduction.claims import check_claim, claims, load_result
from lcnb.reproduction.report import write_report
from lcnb.reproduction.runner import reproduce, run_artifact

IDS = list(registry.profile("assets")["artifacts"])


def test_without_the_folder_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("LCNB_ASSETS", raising=False)
    for call in (lambda: registry.profile_params("assets", "dca/table1"), lambda: reproduce("assets")):
        with pytest.raises(InputError, match="profile assets: the variable LCNB_ASSETS is not set; it must name a folder with models/babyllama105") as e: call()
        assert "\n" not in str(e.value)
    monkeypatch.setenv("LCNB_ASSETS", str(tmp_path/"none"))
    with pytest.raises(InputError, match="LCNB_ASSETS=.*none': must be a folder with models"): registry.profile_params("assets", "dca/table1")
    monkeypatch.setenv("LCNB_ASSETS", str(tmp_path))                                     # a folder, but an empty one
    o = run_artifact("lm_infinite/fig5", "assets", out=tmp_path/"out", notebook=False)
    assert o.status == "refused" and "babyllama105" in o.message and not (tmp_path/"out").exists()


def test_the_profile_says_what_its_scores_are_worth():
    entries = registry.profile("assets")["artifacts"]
    assert all(e["words"].strip() and e["cost"] for e in entries.values())
    for id, e in entries.items():
        for metric, why in (e.get("cannot") or {}).items():
            assert len(why) > 20 and (id == "memlong/table2" or any(metric == c.check["metric"] for c in claims(id.split("/")[0]) if c.artifact == id) or metric in ("choice", "em")), (id, metric)


def test_a_change_below_the_folder_is_another_run(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNB_ASSETS", str(tmp_path))
    for id, where in (("e2llm/table1", "data/qmsum/a.jsonl"), ("memlong/table2", "data/icl_unclear/mr.train.jsonl"), ("lm_infinite/table1", "models/babyllama105/config.json"), ("longembed/table7", "data/haystack_essays/x.txt")):
        (tmp_path/where).parent.mkdir(parents=True, exist_ok=True)
        keys = set()
        for text in ("one", "three"):
            (tmp_path/where).write_text(text)
            keys.add(registry.run_key(id, registry.profile_params("assets", id)))
        assert len(keys) == 2, id


def grimm(assets): # the tales alone
    [tales] = [d.text for d in load_corpus(f"file:{assets}/data/gutenberg_books") if "Hansel" in d.text]
    return Corpus("grimm", lambda n: iter([Document("grimm", tales)]), lambda: "")


@pytest.mark.parametrize("name, theirs", [("babyllama105", {128: 5.41, 256: 5.42, 512: 51., 1024: 78.3}), ("stories260K", {128: 23.1, 256: 22.4, 512: 22.4, 1024: 22.4})])
def test_perplexity_by_length_is_what_others_measured(name, theirs, assets):
    "Perplexity of the last 64 tokens, on Grimm. Theirs are of other windows, and line breaks, which neither model knows, are left in ours: within a factor of two, and the same shape."
    lm = load_model(str(assets/"models"/name))
    docs = token_windows(grimm(assets), lm.tokenizer, 1024, 8)
    ours = {r["length"]: r["value"] for r in eval_last_ppl(lm.model, docs, list(theirs), 64, bos_id=lm.bos_id)}
    for n, v in theirs.items(): assert abs(math.log(ours[n]/v)) < math.log(2), (name, n, ours[n], v)
    assert (ours[512] > 4*ours[256]) == (theirs[512] > 4*theirs[256])
    with extend(lm.model, make_plan("lm_infinite", lm.pretrained_len, 1024, strict=False, n_start=4)):
        [kept] = eval_last_ppl(lm.model, docs, [1024], 64, bos_id=lm.bos_id)
    assert kept["value"] < 1.15*ours[256]


def test_needles_in_essays(assets):
    task = needle_task(1024, 30, 30, haystack=f"file:{assets}/data/haystack_essays")
    assert len({t[:200] for t in task.docs.values()}) <= 8 and eval_retrieval(BM25(), task)[0]["value"] > .6  # the same prose everywhere; a name in common finds most


def test_one_artifact_and_the_page(assets, tmp_path):
    "A small run of the profile, its claims, and the page on it alone."
    o = run_artifact("dca/fig4", "assets", dict(lengths=[512, 1024], n_docs=2, n_depths=2, methods=["rope", "dca_intra"]), out=tmp_path/"assets"/"dca"/"fig4", notebook=False)
    assert o.status == "done", o.message
    result, cannot = load_result(o.out), registry.profile("assets")["artifacts"]["dca/fig4"]["cannot"]
    assert result.run["params"]["model"] == str(assets/"models"/"stories260K") and {r["model"] for r in result.rows} == {"stories260K"}
    for c in (c for c in claims("dca") if c.artifact == "dca/fig4"):
        said = check_claim(c, result, cannot)
        assert said.status == "not comparable" and "too small" in said.detail if c.check["metric"] == "accuracy" else said.status in ("holds", "does not hold", "not run")
    page = write_report(tmp_path/"page.html", figures=tmp_path, only="assets").read_text()
    assert "far too small to retrieve a pass key" in page and page.count("<article") == len(IDS) == page.count("Not run yet") + 1


def test_the_command_line(tmp_path):
    run = lambda *args, **env: subprocess.run([sys.executable, "-c", "import sys; from lcnb.reproduction.cli import main; sys.exit(main())", *args], capture_output=True, text=True, timeout=120, env={k: v for k, v in os.environ.items() if k != "LCNB_ASSETS"} | env)
    bad = run("reproduce", "--profile", "assets")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "LCNB_ASSETS is not set" in bad.stderr and not bad.stdout
    assert run("list").returncode == 0
    assert "did you mean 'assets'" in run("report", "--profile", "asets").stderr
