"""Every data set that a profile names: its adapter on a small folder of the same columns, on broken ones, and on real files where LCNB_ASSETS has them."""
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lcnb.e2llm import data as e2
from lcnb.foundations.checks import InputError
from lcnb.laboratory.corpora import load_corpus
from lcnb.laboratory.fewshot import load_questions, option_letters
from lcnb.longembed.benchmark import load_task
from lcnb.memlong import icl

ROOT = Path(__file__).parents[1]
ODD = "a\u2028b\x85c"  # line breaks to str.splitlines, not to JSON


def put(path, rows):
    "Rows as a file of the kind that its name says; .jsonl keeps odd characters as they are."
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet": pq.write_table(pa.Table.from_pylist(rows), path)
    else: path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf8")
    return path


# ---- what the profiles name: data set -> (a row of its columns, how the library reads a file of such rows)
def text(row): return row, lambda f: [d.text for d in load_corpus(f"file:{f}")], "hub"
def asked(row): return row, lambda f: load_questions(f"file:{f}"), "questions"
def record(row): return row, lambda f: e2.load_records(f"folder:{f}"), "records"
def labelled(name, row): return row, lambda f: icl.load_icl(name, f.parent).train, name


MEETING = dict(topic_list=[dict(topic="t", relevant_text_span=[["0", "1"]])], general_query_list=[dict(query="Sum up.", answer="They greet.")],
               specific_query_list=[dict(query="Who?", answer="Mira", relevant_text_span=[["0", "0"]])], meeting_transcripts=[dict(speaker="Mira", content=ODD), dict(speaker="Otto", content="Hello.")])
EXAM = dict(instructions=["Who?\n\n (A) Mira\n (B) Otto", "When?"], outputs=["(B) Otto", "noon"], input=ODD, source="s", evaluation="exam")
SETS = {
    "emozilla/pg19": text(dict(short_book_title="t", publication_date=1900, url="u", text=ODD)),
    "monology/pile-uncopyrighted": text(dict(text=ODD, meta=dict(pile_set_name="Books"))),
    "cerebras/SlimPajama-627B": text(dict(text=ODD, meta=dict(redpajama_set_name="Books"))),
    "Salesforce/wikitext": text(dict(text=ODD)),
    "hoskinson-center/proof-pile": text(dict(text=ODD, meta="{}")),
    "tau/scrolls": asked(dict(id=ODD, pid="1_0", input=f"Who?\n\n{ODD}", output="Mira")),
    "L4NLP/LEval": asked(EXAM),
    "bigai-nlco/LooGLE": asked(dict(input=ODD, title="t", qa_pairs="[{'Q': 'Who?', 'A': 'Mira', 'S': ['x']}]", output="none")),
    "THUDM/LongBench-like": asked(dict(input=ODD, query="Who?", output="Mira")),
    "Yale-LILY/QMSum, questions": asked(MEETING),
    "stanfordnlp/sst2": labelled("sst2", dict(idx=0, sentence=ODD, label=1)),
    "cornell-movie-review-data/rotten_tomatoes": labelled("mr", dict(text=ODD, label=0)),
    "SetFit/subj": labelled("subj", dict(text=ODD, label=1, label_text="subjective")),
    "SetFit/sst5": labelled("sst5", dict(text=ODD, label=4, label_text="very positive")),
    "mpqa": labelled("mpqa", dict(text=ODD, label=1)),
    "qmsum": record(MEETING),
    "govreport": record(dict(report=ODD, summary="s")),
    "quality": record(dict(article=ODD, question="Who? ", options=["Mira", "Otto"], answer=1, hard=False)),
    "quality, from github": record(dict(article_id="1", article=ODD, questions=[dict(question="Who?", options=["Mira", "Otto"], gold_label=2)])),
    "narrativeqa": record(dict(document=dict(id="d", text=ODD), question=dict(text="Who?", tokens=["Who"]), answers=[dict(text="Mira", tokens=["Mira"])])),
    "triviaqa": record(dict(question="Who?", question_id="q", entity_pages=dict(wiki_context=[ODD], title=["t"]), search_results=dict(search_context=[]), answer=dict(value="Mira", aliases=["Mira", "M."]))),
    "leval, records": record(EXAM),
    "longalpaca-like records": record(dict(context=ODD, prompt="Who?", answer="Mira")),
}


def rows_of(row, n=30): # some rows, texts and contexts of their own
    def other(v, i): return {k: other(x, i) for k, x in v.items()} if isinstance(v, dict) else [other(x, i) for x in v] if isinstance(v, list) else v.replace(ODD, f"{ODD}{i}") if isinstance(v, str) else v
    return [other(row, i) for i in range(n)]


def said(x): # every text in a record, a question, a pair
    if isinstance(x, str): return x
    return " ".join(map(said, x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else vars(x).values()))


def file_name(kind): return f"{kind}.train" if kind in icl.TASKS else "train"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", SETS)
def test_a_small_folder_of_the_same_columns_is_read(name, suffix, tmp_path):
    row, read, kind = SETS[name]
    got = read(put(tmp_path/f"{file_name(kind)}{suffix}", rows_of(row)))
    assert len(got) >= 20 and ODD in said(got[0])


@pytest.mark.parametrize("name", SETS)
def test_a_broken_line_is_named_by_its_number(name, tmp_path):
    row, read, kind = SETS[name]
    path = put(tmp_path/f"{file_name(kind)}.jsonl", rows_of(row))
    lines = path.read_text(encoding="utf8").split("\n")
    path.write_text("\n".join([*lines[:4], "", lines[5][:-9], *lines[6:]]), encoding="utf8")
    with pytest.raises(InputError, match="line 6 is not JSON") as e: read(path)
    assert "\n" not in str(e.value) and path.name in str(e.value)


def wrong(row): # (what is done to the row, words that must be said)
    "Each column missing, and each holding a number, a mapping or nothing."
    for k in row:
        yield f"without {k}", {c: v for c, v in row.items() if c != k}
        for bad in (7, dict(x="y"), None, ["z"]):
            if type(bad) is not type(row[k]): yield f"{k}={bad!r}", row | {k: bad}


@pytest.mark.parametrize("name", SETS)
def test_a_missing_or_wrong_column_is_one_sentence_or_does_not_matter(name, tmp_path):
    "No traceback, and nothing else than what the row says."
    row, read, kind = SETS[name]
    good = read(put(tmp_path/"good"/f"{file_name(kind)}.jsonl", rows_of(row)))
    refused = 0
    for what, bad in wrong(row):
        path = put(tmp_path/what.replace("/", "")[:40]/f"{file_name(kind)}.jsonl", rows_of(row)[:20] + [bad] + rows_of(row)[21:])
        try: got = read(path)
        except InputError as e: assert "\n" not in str(e) and len(str(e)) < 700 and refused + 1, (what, e); refused += 1
        else: assert len(got) <= len(good) + 1, what
    assert refused >= 2, "no column of it matters?"


@pytest.mark.parametrize("name", SETS)
def test_an_empty_split_and_a_missing_one(name, tmp_path):
    row, read, kind = SETS[name]
    empty = tmp_path/"empty"/f"{file_name(kind)}.jsonl"
    put(empty, [])
    with pytest.raises(InputError) as e: read(empty)
    assert "\n" not in str(e.value) and any(w in str(e.value) for w in ("empty", "no records", "at least one training text", "no document"))
    with pytest.raises(InputError) as e: read(tmp_path/"nowhere"/f"{file_name(kind)}.jsonl")
    assert "\n" not in str(e.value)


# ---- the same through `datasets`, as the hub is read: a local folder takes the name's place
HUB = {"train.jsonl": 30, "validation.jsonl": 4}


@pytest.fixture
def hub(tmp_path):
    def make(row, broken=None, skip=()):
        for name, n in HUB.items():
            if name in skip: continue
            path = put(tmp_path/"hub"/name, rows_of(row, n))
            if broken == name: path.write_text(path.read_text(encoding="utf8")[:-9], encoding="utf8")
        return tmp_path/"hub"
    return make


def through_hub(name, folder, split, monkeypatch):
    row, read, kind = SETS[name]
    if kind == "hub": return list(load_corpus(f"hub:{folder}::{split}"))
    if kind == "questions": return load_questions(f"hub:{folder}:default:{split}")
    if kind == "records":
        monkeypatch.setitem(e2.HUB, name, dict(path=str(folder)))
        return e2.load_records(f"hub:{name}", "train+validation" if split == "train" else "test")
    monkeypatch.setitem(icl.TASKS, kind, replace(icl.TASKS[kind], hub=str(folder), split=split))
    return icl.load_icl(kind).test


FROM_HUB = [n for n in SETS if n not in ("quality, from github", "leval, records", "longalpaca-like records", "mpqa", "tau/scrolls", "Yale-LILY/QMSum, questions")]


@pytest.mark.parametrize("name", FROM_HUB)
def test_hub_sets_are_read_and_their_faults_are_one_sentence(name, hub, monkeypatch, tmp_path):
    row, _, kind = SETS[name]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path/"cache"))
    folder = hub(row)
    if kind not in icl.TASKS: assert len(through_hub(name, folder, "validation", monkeypatch)) >= 4
    for broken in (dict(broken="validation.jsonl"), dict(skip=["validation.jsonl"])):
        for f in folder.glob("*"): f.unlink()
        hub(row, **broken)
        with pytest.raises(InputError) as e: through_hub(name, folder, "validation", monkeypatch)
        assert "\n" not in str(e.value) and len(str(e.value)) < 500


# ---- retrieval: three tables
TABLES = dict(corpus=[dict(doc_id=f"d{i}", text=f"{ODD} {i}") for i in range(3)], queries=[dict(qid=f"q{i}", text=f"who {i}", question="Who?") for i in range(3)], qrels=[dict(qid=f"q{i}", doc_id=f"d{i}") for i in range(3)])
MTEB = dict(corpus=[dict(_id="d0", title="T", text="x"), dict(_id="d1", title="", text="y")], queries=[dict(_id="q0", text="x")], qrels=[{"query-id": "q0", "corpus-id": "d0", "score": 1}])


def tables(folder, **more):
    for k, rows in (TABLES | more).items(): put(folder/f"{k}.jsonl", rows)
    return folder


def test_retrieval_sets(tmp_path):
    assert load_task(f"file:{tables(tmp_path/'a')}").docs["d0"] == f"{ODD} 0"
    assert load_task(f"file:{tables(tmp_path/'b', **MTEB)}").docs == {"d0": "T x", "d1": "y"}
    assert [r["prompt"] for r in e2.load_records(f"folder:{tmp_path/'a'}")] == ["Who?"]*3


@pytest.mark.parametrize("change, words", [
    (dict(corpus=[dict(doc_id="d0")]), "corpus has no column text; it has doc_id"), (dict(corpus=[]), "corpus is empty"), (dict(qrels=[]), "qrels is empty"),
    (dict(corpus=[dict(doc_id="d0", text=3)]), "row 1 of corpus: column 'text' holds an integer, not text"), (dict(corpus=[dict(doc_id=["d0"], text="x")]), "column 'doc_id' holds list, not text"),
    (dict(corpus=[dict(doc_id="d0", text="x", title=["T"])]), "column 'title' holds list"), (dict(queries=[dict(qid="q0", text=None)]), "row 1 of queries has no text"),
    (dict(qrels=[dict(qid="q9", doc_id="d0")]), "query 'q9'"), (dict(qrels=[dict(qid="q0", doc_id="d9")]), "document 'd9'"), (dict(qrels=[dict(qid="q0", doc_id="d0", score="high")]), "score 'high'"),
    (dict(qrels=[dict(qid="q0", doc_id="d0", score=float("inf"))]), "not a number"), (dict(queries=[dict(qid="q0", text="x", context_length="long")]), "context_length")])
def test_faults_of_retrieval_sets(change, words, tmp_path):
    folder = tables(tmp_path, **change)
    with pytest.raises(InputError, match=words) as e: load_task(f"file:{folder}")
    assert "\n" not in str(e.value) and folder.name in str(e.value)
    with pytest.raises(InputError) as e: e2.load_records(f"folder:{folder}")
    assert "\n" not in str(e.value)


def test_records_of_a_retrieval_set_need_the_questions(tmp_path):
    folder = tables(tmp_path, queries=[dict(qid=f"q{i}", text="x") for i in range(3)])
    with pytest.raises(InputError, match="row 1 of queries: no column 'question'; it has qid, text"): e2.load_records(f"folder:{folder}")
    (folder/"qrels.jsonl").write_text('{"qid": "q0", "doc_id": "d0"}\n{"qid": \n')
    with pytest.raises(InputError, match="line 2 is not JSON"): load_task(f"file:{folder}")


# ---- the profiles name nothing that has no row above
def names(value):
    if isinstance(value, dict): value = list(value.values())
    return [n for v in value for n in names(v)] if isinstance(value, list) else [value] if isinstance(value, str) and value.startswith("hub:") else []


@pytest.mark.parametrize("profile", ["gpu", "paper"])
def test_every_hub_set_of_the_profiles_is_here(profile):
    known = {*SETS, "dwzhu/LongEmbed", *(f"mteb/{n}" for n in ("scifact", "nfcorpus", "arguana", "scidocs", "fiqa"))} # the last ones: tables, above
    found = {n.removeprefix("hub:").partition(":")[0].partition("@")[0] for n in names(yaml.safe_load((ROOT/"data"/"profiles"/f"{profile}.yaml").read_text(encoding="utf8"))["artifacts"])}
    assert found and found <= known, found - known
    assert {t.hub for t in icl.TASKS.values() if t.hub} <= known and set(e2.HUB) <= known


# ---- real files
def test_real_questions(assets):
    closed = load_questions(f"file:{assets}/data/leval/quality.parquet")
    assert len(closed) == 131 and all(option_letters(q.references[0]) in tuple("ABCD") for q in closed)
    assert len(load_questions(f"file:{assets}/data/leval/gsm100.parquet")) == 67 and len(load_questions(f"file:{assets}/data/leval/topic_retrieval_longchat.parquet")) == 102
    assert len(load_questions(f"file:{assets}/data/qmsum/validation.parquet")) == 271  # of 272; one is asked twice in a row and has two answers
    assert all(q.references for f in ("longdep_qa", "shortdep_qa") for q in load_questions(f"file:{assets}/data/loogle_wiki/{f}.parquet"))


def test_real_records(assets):
    assert len(e2.load_records(f"folder:{assets}/data/qmsum", "test")) == 272 and len(e2.load_records(f"folder:{assets}/data/qmsum", "train+validation")) == 1257
    assert len(e2.load_records(f"folder:{assets}/data/leval/quality.parquet")) == 131
    assert e2.load_records(f"folder:{assets}/data/lemb_qmsum", n=3)[0]["prompt"].startswith(("What", "Summarize", "Why", "How", "Who"))


def test_real_labelled_sets(assets):
    sizes = {n: load for n in icl.TASKS for load in [icl.load_icl(n, assets/"data"/"icl_unclear")]}
    assert len(sizes["sst2"].test) == 872 and len(sizes["sst5"].task.words) == 5 and 1500 < len(sizes["subj"].test) < 2500
    assert all(not {t for t, _ in d.train} & {t for t, _ in d.test} for d in sizes.values())


def test_real_texts(assets):
    for name in ("pg19/validation.parquet", "gutenberg_books", "haystack_essays", "proofpile_like", "wikitext2", "tinyshakespeare", "tinystories_sample"):
        corpus = load_corpus(f"file:{assets}/data/{name}")
        assert len(next(iter(corpus)).text) > 5 and len(corpus.revision) == 12, name
    assert sum(1 for _ in load_corpus(f"file:{assets}/data/pg19/validation.parquet")) == 17
