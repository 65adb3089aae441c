"""The retrieval benchmark: fair scores, generators that repeat themselves, data that is read or refused in one sentence, and MTEB's opinion."""
import json, os, re, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lcnb.foundations.checks import InputError
from lcnb.foundations.files import data_dir
from lcnb.longembed.benchmark import (BM25, Dense, MaxSim, RetrievalTask, acc_at_1, average_rows, eval_retrieval, filler, gain_rows, load_task, load_tasks,
                                      n_filler, ndcg_at_10, needle_task, passkey_task, story_task, tie_groups)

ASSETS = Path(os.environ.get("LCNB_ASSETS", "/nowhere"))
with_mteb = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed")
with_tiny = pytest.mark.skipif(not (data_dir()/"models"/"tiny-encoder-ape").is_dir(), reason="no tiny encoder")


# ---- scores

def one_of(n): return RetrievalTask("toy", {f"d{i}": "x" for i in range(n)}, {"q": "?"}, {"q": {"d3": 1}}, metric="acc_at_1")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_tie_of_k_counts_one_kth(k):
    scores = np.zeros((1, 8))
    scores[0, 3:3+k] = 1
    assert acc_at_1(scores, one_of(8)).tolist() == [1/k]
    scores[0, 3:3+k] += np.arange(k)*1e-9  # rounding is not a preference
    assert acc_at_1(scores, one_of(8)).tolist() == [1/k]
    assert acc_at_1(scores - 2*(np.arange(8) == 3), one_of(8)).tolist() == [0]


@pytest.mark.parametrize("metric", [acc_at_1, ndcg_at_10])
def test_scores_do_not_depend_on_the_order_or_the_names_of_documents(metric):
    rng = np.random.default_rng(1)
    scores, task = rng.integers(0, 4, (6, 30)).astype(float), RetrievalTask("t", {f"d{i}": "x" for i in range(30)}, {f"q{i}": "?" for i in range(6)}, {f"q{i}": {f"d{i}": 2, f"d{i+9}": 1} for i in range(6)})
    order = rng.permutation(30)
    other = RetrievalTask("t", {f"n{29-j}": "x" for j in order}, task.queries, {q: {f"n{29-int(d[1:])}": g for d, g in r.items()} for q, r in task.qrels.items()})
    np.testing.assert_allclose(metric(scores, task), metric(scores[:, order], other), atol=1e-9)


def test_equal_texts_share_the_credit():
    class Blind:  # reads nothing, so all documents are one
        def encode(self, texts, prompt=None, batch_size=32): return np.ones((len(texts), 4), np.float32)
    row, = eval_retrieval(Dense(Blind()), passkey_task(256, 100, 50))
    assert row["value"] == pytest.approx(.01) and row["n"] == 50 and row["method"] == "none"
    row, = eval_retrieval(Dense(Blind()), story_task(100, 50, 60))
    assert row["value"] == pytest.approx(sum(1/np.log2(p + 2) for p in range(10))/100)


def test_ties_are_chains():
    assert [g.tolist() for g in tie_groups(np.array([.1, .5, .1 + 5e-7, .5 - 9e-7, .9]))] == [[4], [1, 3], [2, 0]]


@pytest.mark.parametrize("scores, says", [([[1, 2]], "must be of shape"), ([[np.nan]*8], "finite numbers"), ([[np.inf] + [0]*7], "finite numbers")])
def test_bad_scores(scores, says):
    with pytest.raises(InputError, match=says): acc_at_1(scores, one_of(8))


def test_one_document_and_one_query_are_enough():
    task = RetrievalTask("one", {"d": ""}, {"q": ""}, {"q": {"d": 1}})
    assert BM25().scores(task).tolist() == [[0]] and ndcg_at_10(BM25().scores(task), task).tolist() == [1]
    assert BM25().scores(RetrievalTask("two", {"d": "red hat", "e": "   "}, {"q": "", "p": "hat"}, {"q": {"d": 1}, "p": {"d": 1}}))[:, 0].tolist()[0] == 0


def test_averages_and_gains():
    row = lambda m, d, n, v: dict(method=m, model="x", positions="ape", factor=1 if m == "none" else 8, dataset=d, length=n, metric="acc_at_1", value=v, n=9, seed=0)
    rows = [row("none", "passkey", 256, 1), row("none", "passkey", 512, 0), row("none", "qmsum", 0, .3), row("pi", "passkey", 256, 1), row("pi", "passkey", 512, .8), row("pi", "qmsum", 0, .5)]
    averages = average_rows(rows, length=lambda r: 128*r["factor"])
    assert [(r["method"], r["length"], round(r["value"], 9), r["n"]) for r in averages] == [("none", 128, .4, 2), ("pi", 1024, .7, 2)]
    gain, = gain_rows(averages)
    assert (gain["method"], gain["metric"], round(gain["value"], 9)) == ("pi", "gain", .3)


# ---- what is made

def test_tasks_are_the_same_in_another_process():
    code = "from lcnb.longembed.benchmark import load_tasks; print([t.revision for t in load_tasks(['passkey', 'needle', 'grammar:stories', 'grammar:summaries'], [128, 512], n_docs=30, n_queries=10, n_words=120)])"
    here = [t.revision for t in load_tasks(["passkey", "needle", "grammar:stories", "grammar:summaries"], [128, 512], n_docs=30, n_queries=10, n_words=120)]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}).stdout
    assert there.strip() == str(here) and len(set(here)) == 6


@pytest.mark.parametrize("length", [64, 256, 1000, 32768])
def test_words_of_a_passkey_document(length):
    task = passkey_task(length, 12, 6)
    unit = filler(19)
    for q, text in task.queries.items():
        name = re.fullmatch(r"what is the passkey for (.+)\?", text)[1]
        document = task.docs[next(iter(task.qrels[q]))]
        said = re.search(rf"\n?{name}'s pass key is (\d+)\. Remember it\. \1 is the pass key for {name}\.\n?", document)
        rest = " ".join(document.replace(said[0], " ").split())
        assert rest == filler(int(.75*length) - 25) and rest.startswith(unit[:len(rest)])
        assert len(document.split()) <= .75*length and sum(name in d for d in task.docs.values()) == 1
    assert task.queries == passkey_task(64, 12, 6).queries


@pytest.mark.parametrize("length", [64, 512, 4096])
def test_needle_documents_are_alike_but_for_one_sentence(length):
    task = needle_task(length, 20, 10)
    words = [d.split() for d in task.docs.values()]
    assert all(len(w) <= .75*length for w in words) and len(set(task.queries.values())) == 10
    first = words[0]
    for w in words[1:]:
        same = next((i for i, (a, b) in enumerate(zip(first, w)) if a != b), len(w))
        assert len(set(map(tuple, (first[:same], w[:same])))) == 1
    assert len({" ".join(w) for w in words}) == 20


def test_depths_do_not_move_with_the_length():
    depth = lambda t: [d.index("pass key")/len(d) for d in t.docs.values()]
    assert max(abs(a - b) for a, b in zip(depth(passkey_task(2048)), depth(passkey_task(16384)))) < .03


@pytest.mark.parametrize("call, says", [
    (lambda: load_task("passkey"), "length=None: must be an integer"), (lambda: load_task("needle", 8), "length=8: must be long enough"), (lambda: load_task("passkey", 34), "length=34: must be at least 35"),
    (lambda: passkey_task(256, 10, 11), "n_queries=11: must be an integer from 1 to n_docs, 10"), (lambda: needle_task(256, 1), "n_docs=1"), (lambda: needle_task(256, True), "n_docs=True"),
    (lambda: load_task("grammar:poems"), "task='grammar:poems': must be passkey"), (lambda: load_task(""), "task=''"), (lambda: load_task("file:"), "task='file:'"),
    (lambda: load_task("file:/no/such/folder"), "file:/no/such/folder: no such folder"), (lambda: story_task(form="poems"), "form='poems': must be stories or summaries"),
    (lambda: load_tasks([], [256]), "corpus=\\[\\]: must be a list of tasks"), (lambda: needle_task(256, haystack="file:/no/such.txt"), "no such file")])
def test_what_cannot_be_made_is_refused(call, says):
    with pytest.raises(InputError, match=says): call()


@with_mteb
def test_the_rules_fit_the_published_statistics():
    import mteb
    stats = lambda name: json.loads((Path(mteb.__file__).parent/"descriptive_stats"/"Retrieval"/f"LEMB{name}Retrieval.json").read_text())
    for split, s in stats("Passkey").items():
        chars, n = s["documents_text_statistics"], len(filler(n_filler(int(split.split("_")[1]))))
        assert 88.1 < chars["average_text_length"] - n < 88.3 and (chars["min_text_length"] - n, chars["max_text_length"] - n) == (79, 103)
        assert (s["num_documents"], s["num_queries"]) == (100, 50)
    for split, s in stats("Needle").items(): assert s["documents_text_statistics"]["max_text_length"] - s["documents_text_statistics"]["min_text_length"] <= 138
    assert [s["queries_text_statistics"]["unique_texts"] for s in stats("Needle").values()] == [49, 50, 50, 49, 49, 49, 50, 48]


# ---- what is read

GOOD = dict(corpus=[dict(doc_id="a", text="red hat"), dict(doc_id="b", text="blue hat")], queries=[dict(qid="1", text="which is blue?"), dict(qid="2", text="nobody's")], qrels=[dict(qid="1", doc_id="b")])


def write(folder, suffix=".jsonl", **tables):
    for name, rows in (GOOD | tables).items():
        path = folder/f"{name}{suffix}"
        if rows is None: continue
        if suffix == ".jsonl": path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
        elif suffix == ".parquet": pd.DataFrame(rows).to_parquet(path)
        else: pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    return f"file:{folder}"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".tsv"])
def test_a_folder(tmp_path, suffix):
    task = load_task(write(tmp_path, suffix))
    assert task.docs == dict(a="red hat", b="blue hat") and task.queries == {"1": "which is blue?"} and task.qrels == {"1": {"b": 1}}  # a query without a document is left out
    assert task.name == tmp_path.name and task.metric == "ndcg_at_10" and ndcg_at_10(BM25().scores(task), task).tolist() == [1]


@pytest.mark.parametrize("tables, says", [
    (dict(corpus=None), "there is no corpus.parquet"), (dict(qrels=None), "there is no qrels.parquet"), (dict(queries=""), "queries is empty"), (dict(corpus="\n\n"), "corpus is empty"),
    (dict(corpus=[dict(name="a", text="x")]), "corpus has no column doc_id or _id or id; it has name, text"), (dict(queries=[dict(qid="1", words="x")]), "queries has no column text; it has qid, words"),
    (dict(qrels=[dict(qid="1")]), "qrels has no column doc_id or corpus-id"), (dict(qrels=[dict(qid="1", doc_id="z")]), "name document 'z', which is not in the corpus"),
    (dict(qrels=[dict(qid="9", doc_id="a")]), "qrels name query '9', which is not among the queries"), (dict(qrels=[dict(qid="1", doc_id="a", score=0)]), "no query has a relevant document"),
    (dict(qrels=[dict(qid="1", doc_id="a", score="good")]), "row 1 of qrels has the score 'good', which is not a number"),
    (dict(corpus=[dict(doc_id="a", text="x"), dict(doc_id="a", text="y")]), "corpus has the id 'a' twice"), (dict(queries=[dict(qid="1", text="x")]*2), "queries has the id '1' twice"),
    (dict(corpus=[dict(doc_id="b", text=None)]), "row 1 of corpus has no text"), (dict(corpus=[dict(doc_id=None, text="x")]), "row 1 of corpus has no doc_id"),
    (dict(corpus="{\n"), "line 1 is not JSON"), (dict(corpus="[1]\n"), "line 1 is not a JSON object")])
def test_a_broken_folder_is_refused_in_one_sentence(tmp_path, tables, says):
    with pytest.raises(InputError, match=says) as e: load_task(write(tmp_path, **tables))
    assert "\n" not in str(e.value)


def test_broken_files(tmp_path):
    spec = write(tmp_path, ".parquet")
    (tmp_path/"corpus.parquet").write_bytes(b"PAR2")
    with pytest.raises(InputError, match="corpus.parquet: not a parquet file"): load_task(spec)
    (tmp_path/"corpus.parquet").unlink()
    (tmp_path/"corpus.csv").write_text("")
    with pytest.raises(InputError, match="corpus.csv: cannot be read as a table"): load_task(spec)
    (tmp_path/"corpus.csv").write_bytes(b"doc_id,text\na,\xff\xfe\n")
    with pytest.raises(InputError, match="corpus.csv: cannot be read as a table"): load_task(spec)


def test_beir_folders_and_titles(tmp_path):
    (tmp_path/"qrels").mkdir()
    (tmp_path/"qrels"/"test.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n")
    task = load_task(write(tmp_path, corpus=[{"_id": "a", "title": "Hats", "text": "red"}, {"_id": "b", "title": "", "text": "blue"}], queries=[{"_id": "1", "text": "?"}], qrels=None))
    assert task.docs == dict(a="Hats red", b="blue") and task.qrels == {"1": {"a": 2}}


def hub_copy(folder, configs):
    "A folder that `datasets` reads as it reads the hub: {configuration: {split: rows}}, as JSON lines."
    said = ""
    for config, splits in configs.items():
        (folder/config).mkdir(parents=True)
        for split, rows in splits.items(): (folder/config/f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        said += f"- config_name: {config}\n  data_files:\n" + "".join(f"  - split: {s}\n    path: {config}/{s}.jsonl\n" for s in splits)
    (folder/"README.md").write_text(f"---\nconfigs:\n{said}---\n")
    return f"hub:{folder}"


def test_the_official_layout(tmp_path):
    "Three splits of one configuration whose columns differ; several lengths in one table."
    sized = lambda rows: [r | dict(context_length=n) | {k: f"{r[k]}_{n}" for k in ("doc_id", "qid") if k in r} for n in (256, 512) for r in rows]
    spec = hub_copy(tmp_path/"LongEmbed", dict(passkey={n: sized(rows) for n, rows in GOOD.items()}, qmsum=GOOD))
    task = load_task(f"{spec}:passkey", 512)
    assert (task.name, task.length, task.metric, set(task.docs), task.qrels) == ("passkey", 512, "acc_at_1", {"a_512", "b_512"}, {"1_512": {"b_512": 1}})
    assert [(t.name, t.length, t.metric) for t in load_tasks([f"{spec}:passkey", f"{spec}:qmsum"], [256, 512])] == [("passkey", 256, "acc_at_1"), ("passkey", 512, "acc_at_1"), ("qmsum", None, "ndcg_at_10")]
    with pytest.raises(InputError, match="length=1024: must be one of 256, 512, the lengths of hub:"): load_task(f"{spec}:passkey", 1024)
    with pytest.raises(InputError, match="cannot be loaded as a retrieval data set"): load_task(f"{spec}:needle")
    with pytest.raises(InputError, match="cannot be loaded as a retrieval data set"): load_task(spec)


def test_the_layout_of_beir_at_mteb(tmp_path):
    spec = hub_copy(tmp_path/"scifact", dict(corpus=dict(corpus=[{"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "title": "", "text": "y"}]), queries=dict(queries=[{"_id": "1", "text": "?"}, {"_id": "2", "text": "!"}]),
                                             default=dict(train=[{"query-id": "2", "corpus-id": "a", "score": 1}], test=[{"query-id": "1", "corpus-id": "b", "score": 1.0}])))
    task = load_task(spec)
    assert (task.name, task.docs, task.queries, task.qrels) == ("scifact", dict(a="T x", b="y"), {"1": "?"}, {"1": {"b": 1}})


def test_without_a_network():
    code = "from lcnb.longembed.benchmark import load_task\ntry: load_task('hub:nobody/nothing:qmsum')\nexcept ValueError as e: print(type(e).__name__, e)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout
    assert said.startswith("InputError hub:nobody/nothing:qmsum: cannot be loaded as a retrieval data set") and said.count("\n") == 1


def test_the_command_line_says_it_in_one_line(tmp_path):
    spec = write(tmp_path, qrels=[dict(qid="1", doc_id="z")])
    done = subprocess.run([sys.executable, "-c", "import sys; from lcnb.reproduction.cli import main; sys.exit(main(sys.argv[1:]))", "run", "longembed/table1", "-p", f"corpus=['{spec}']", "--out", str(tmp_path/"out")], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"LCNB_STATE": str(tmp_path/"state")})
    assert done.returncode != 0 and not (tmp_path/"out").exists()
    assert "which is not in the corpus" in done.stderr + done.stdout and "Traceback" not in done.stderr


@pytest.mark.skipif(not (ASSETS/"data"/"lemb_qmsum").is_dir(), reason="LCNB_ASSETS names no folder with data/lemb_qmsum")
def test_qmsum_as_in_the_paper():
    "197 meetings of 10,058 words: BM25 needs all of them."
    task = load_task(f"file:{ASSETS/'data'/'lemb_qmsum'}", n_queries=None)
    assert len(task.queries) == 1527 and len(task.docs) == 197 and round(np.mean([len(d.split()) for d in task.docs.values()])) == 10058
    of = lambda t, **k: ndcg_at_10(BM25(**k).scores(t), t).mean()
    assert of(task) == pytest.approx(.852, abs=.01) and of(task.first_words(512)) == pytest.approx(.305, abs=.01)
    assert of(task, k1=.9, b=.4) == pytest.approx(.827, abs=.01)
    few = load_task(f"file:{ASSETS/'data'/'lemb_qmsum'}", n_queries=20)
    assert len(few.queries) == 20 and len(few.docs) == 197 and few.queries.items() <= task.queries.items()


# ---- MTEB

@with_mteb
@with_tiny
@pytest.mark.parametrize("windows", [False, True])
def test_mteb_agrees(windows):
    from mteb.models import EncoderProtocol, SearchProtocol
    from lcnb.longembed.encoders import load_encoder
    from lcnb.longembed.mteb_adapter import MtebEncoder, MtebSearch, run_mteb
    encoder = load_encoder("tiny-ape")
    model, scorer = (MtebSearch(encoder), MaxSim(encoder)) if windows else (MtebEncoder(encoder), Dense(encoder))
    assert isinstance(model, SearchProtocol if windows else EncoderProtocol)
    tasks = [passkey_task(n, 24, 12) for n in (64, 96)]  # within the window, so that nothing ties
    theirs = run_mteb(model, tasks)
    for task in tasks:
        scores = scorer.scores(task)
        assert theirs[f"test_{task.length}"]["ndcg_at_1"] == pytest.approx(acc_at_1(scores, task, tol=0).mean(), abs=1e-4)
        assert theirs[f"test_{task.length}"]["ndcg_at_10"] == pytest.approx(ndcg_at_10(scores, task, tol=0).mean(), abs=1e-4)
        assert theirs[f"test_{task.length}"]["main_score"] == theirs[f"test_{task.length}"]["ndcg_at_1"]


@with_mteb
def test_mteb_task_has_our_texts():
    from lcnb.longembed.mteb_adapter import mteb_task
    task = story_task(8, 4, 80)
    theirs = mteb_task(task).dataset["default"]["test"]
    assert dict(zip(theirs["corpus"]["id"], theirs["corpus"]["text"])) == task.docs and theirs["relevant_docs"] == task.qrels


# ---- what the paper prints

def test_printed_values_are_checked_by_the_profile_paper():
    "A value of the paper can be compared only if the profile names its models and data, and the cell exists once."
    from lcnb.reproduction import registry
    from lcnb.reproduction.claims import claims, published
    for c in claims("longembed"):
        if c.scope != "paper" or c.artifact not in registry.artifacts(): continue
        want, given = c.check["printed"], registry.profile_params("paper", c.artifact)
        assert given.get("model") == want["model"] and given.get("corpus") == want["corpus"], (c.id, given.get("model"), given.get("corpus"))
        assert len([r for r in published("longembed", want["table"]) if all(r[k] == v for k, v in want["cell"].items())]) == 1, c.id
        methods = given.get("methods")
        if methods and "method" in c.check: assert c.check["method"] in {m for ms in methods for m in (ms if isinstance(ms, list) else [ms])}, c.id


def test_every_artifact_of_the_claims_is_known():
    from lcnb.reproduction.claims import claims, paper_notes
    artifacts = {c.artifact for c in claims("longembed")}
    assert artifacts == {f"longembed/{a}" for a in "table1 table2 table3 table5 table6 table7 fig1b fig1c fig4 fig5a fig5b fig6".split()} == set(paper_notes("longembed")["beside"])


def test_a_claim_may_compare_series_without_a_method():
    from lcnb.reproduction.claims import Claim, Result, check_claim
    rows = [dict(method=m, length=1024, metric="best_average", value=v, series=s, factor=8) for m, s, v in (("se", "rope", .6), ("gp", "ape", .5))]
    result = Result(None, rows, dict(params={}, resolved=dict(pretrained_len=128)))
    check = dict(metric="best_average", where=dict(series="rope", factor=8), op=">", than=dict(where=dict(series="ape", factor=8)))
    assert check_claim(Claim("x", "", "", "any", "longembed/fig6", check, ""), result) == ("holds", "0.6 > 0.5 (series ape) (factor 8)")
