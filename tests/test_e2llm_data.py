"""Records for E2LLM: what is refused and in which words, splits that do not leak, layouts, and real sets where there are some."""
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from lcnb.e2llm.data import LOADERS, SPLITS, check_record, first_answer, layout, load_hub, load_records, read_jsonl, sample, split_95_5, statistics, statistics_table
from lcnb.foundations.checks import InputError
from lcnb.laboratory.grammar import build_tokenizer
from lcnb.reproduction.claims import published

GOOD = dict(context="Mira is a baker.", prompt="Who bakes?", answer="Mira")


def written(path, *rows):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return path


@pytest.mark.parametrize("bad, words", [
    (b'{"context": "x", ', "line 3 is not JSON"), (b"\xff\xfe{}", "line 3 is not JSON"), (b"[" * 100_000, "line 3 is not JSON"), (b"7", "line 3 is not a JSON object"),
    (dict(context="x", prompt="y"), "line 3: no field 'answer'; it has context, prompt, and needs context, prompt, answer"), ({}, "line 3: no field 'context'; it has none"),
    (GOOD | dict(context=""), "line 3: field 'context' is empty"), (GOOD | dict(context=None), "line 3: field 'context' is empty"), (GOOD | dict(prompt=["y"]), "line 3: column 'prompt' holds list, not text"),
    (GOOD | dict(answer=[]), "line 3: field 'answer' is an empty list"), (GOOD | dict(answer=["x", " "]), "line 3: field 'answer' is empty"), (GOOD | dict(answer=None), "line 3: field 'answer' is empty")])
def test_bad_lines_are_named(tmp_path, bad, words):
    with pytest.raises(InputError, match=words): read_jsonl(written(tmp_path / "x.jsonl", GOOD, b"", bad, GOOD))


def test_good_lines(tmp_path):
    got = load_records(f"jsonl:{written(tmp_path / 'x.jsonl', GOOD, GOOD | dict(answer=['Mira', 'she'], depth=.5))}")
    assert got[0] == GOOD and first_answer(got[1]) == "Mira" and got[1]["depth"] == .5 and got[0]["context"] is got[1]["context"]
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert read_jsonl(tmp_path / "bom.jsonl") == [GOOD]
    with pytest.raises(InputError, match="no such file"): load_records("jsonl:nowhere.jsonl")
    with pytest.raises(InputError, match="split='test': must be None, train"): load_records(f"jsonl:{tmp_path / 'x.jsonl'}", "test")
    with pytest.raises(InputError, match="at least two contexts"): load_records(f"jsonl:{tmp_path / 'x.jsonl'}", "train")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=40), st.integers(0, 99), st.sampled_from([.05, .2, .5]))
def test_split_does_not_leak(sizes, seed, share):
    records = [dict(context=f"c{i}", prompt=f"{j}", answer="x") for i, k in enumerate(sizes) for j in range(k)]
    train, validation = split_95_5(records, share, seed)
    assert sorted(map(str, train + validation)) == sorted(map(str, records)) and train and validation
    assert not {r["context"] for r in train} & {r["context"] for r in validation}
    assert len(validation) <= max(share*len(records), min(sizes)) and split_95_5(records, share, seed) == (train, validation)
    assert sample(records, len(records), seed) == records


def test_train_and_validation_are_the_training_set(tmp_path):
    spec = f"jsonl:{written(tmp_path / 'x.jsonl', *(GOOD | dict(context=f'{i//3}') for i in range(90)))}"
    parts = {s: load_records(spec, s, n=60, seed=3) for s in SPLITS[:3]}
    assert len(parts["train"]) == 57 and len(parts["validation"]) == 3 and len(parts["train+validation"]) == 60
    assert {r["context"] for r in parts["train"]} | {r["context"] for r in parts["validation"]} == {r["context"] for r in parts["train+validation"]}


ROWS = {
    "govreport": dict(report="long", summary="short"), "quality": dict(article="a", question="q?", options=["x", "y"], answer=1), "quality_github": dict(article="a", questions=[dict(question="q?", options=["x", "y"], gold_label=2)]),
    "narrativeqa": dict(document=dict(text="d"), question=dict(text="q?"), answers=[dict(text="y"), dict(text="z")]), "loogle": dict(input="d", qa_pairs="[{'Q': 'q?', 'A': 'y', 'S': ['s']}]"),
    "triviaqa": dict(question="q?", answer=dict(value="y", aliases=["y", "Y"]), entity_pages=dict(wiki_context=["p"]), search_results=dict(search_context=[])),
    "leval": dict(instructions=["q?\n\n(A) x\n(B) y", "free?"], outputs=["(B) y\n", "(sure) y"], input="d")}


@pytest.mark.parametrize("name", ROWS)
def test_layouts_through_folder_and_hub(tmp_path, name):
    for f in ("train", "validation"): pq.write_table(pa.Table.from_pylist([ROWS[name]]*2), tmp_path / f"{f}-00000.parquet")
    got = load_records(f"folder:{tmp_path}", "test")
    assert got == load_hub(str(tmp_path), "test") and first_answer(got[0]) in ("y", "short") and "(" not in got[0]["prompt"]
    if name == "leval": assert got[1]["answer"] == "(sure) y"
    if name in ("govreport", "quality", "triviaqa"): assert load_hub(str(tmp_path), "train+validation", n=1) == got[:1]


def test_rows_without_a_context_are_passed_over(tmp_path):
    none = ROWS["triviaqa"] | dict(entity_pages=dict(wiki_context=[" "]))
    pq.write_table(pa.Table.from_pylist([none, ROWS["triviaqa"], none]), tmp_path / "train.parquet")
    assert len(load_hub(str(tmp_path), "train+validation", n=1)) == 1
    with pytest.raises(InputError, match="n=2: must be at most 1"): load_hub(str(tmp_path), "train+validation", n=2)


def test_refused_places(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded as a data set"): load_hub("no/such-set-anywhere", "train")
    with pytest.raises(InputError, match="no known layout has the columns text"): layout(["text"], "x")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="must be .jsonl, .json, .parquet"): load_records(f"folder:{tmp_path}")
    (tmp_path / "train.parquet").write_bytes(b"no"); (tmp_path / "notes.txt").unlink()
    with pytest.raises(InputError, match="not a parquet file"): load_records(f"folder:{tmp_path}")
    with pytest.raises(InputError, match="split='test': must be one that"): load_records(f"folder:{tmp_path}", "test")
    for spec in ("hub:", "grammar:none", "", None):
        with pytest.raises(InputError, match="must be jsonl:PATH, folder:PATH, hub:NAME"): load_records(spec)


def test_a_new_source_is_one_entry(monkeypatch):
    monkeypatch.setitem(LOADERS, "grammar:two", lambda name, split, n, seed: [GOOD]*n)
    assert load_records("grammar:two", "test", 3) == [GOOD]*3
    monkeypatch.setitem(LOADERS, "grammar:bad", lambda name, split, n, seed: [dict(GOOD, context="")])
    with pytest.raises(InputError, match="grammar:bad: record 0: field 'context' is empty"): load_records("grammar:bad")


def test_statistics():
    records = [GOOD, GOOD | dict(context="Otto is a clerk. " * 100, answer=["he", "him"])]
    got = statistics(records, build_tokenizer())
    assert got["n_records"] == 2 == got["n_contexts"] and got["max_tokens"] > got["mean_tokens"] > 0 and got["mean_chunks"] == 2.5
    table = statistics_table([dict(dataset="hub:govreport", split="test", metric=m, value=v) for m, v in got.items()], published("e2llm", "table1"))
    assert "11204.00" in table and "10000 and 500" in table


def test_import_is_light():
    code = "import lcnb.e2llm.data, lcnb.e2llm.metrics, sys; bad = {'transformers', 'datasets', 'matplotlib', 'rouge_score', 'pyarrow', 'nltk'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_sets(assets):
    data = assets / "data"
    printed = {(r["dataset"], r["metric"]): r["printed"].value for r in published("e2llm", "table1")}
    train, test = (load_records(f"folder:{data / 'qmsum'}", s) for s in ("train+validation", "test"))
    assert (len(train), len(test)) == (printed["QMSum", "training samples"], printed["QMSum", "evaluation samples"])
    assert len({r["context"] for r in train}) == 162 and {r["context"] for r in train}.isdisjoint(r["context"] for r in test)
    assert len(load_records(f"folder:{data / 'lemb_qmsum'}")) == 1527 and load_records(f"folder:{data / 'loogle_wiki'}")
    quality = load_records(f"folder:{data / 'leval' / 'quality.parquet'}")
    assert len(quality) == 131 and not any("(A)" in r["prompt"] or r["answer"].startswith("(") for r in quality)
    assert len(load_records(f"folder:{data / 'leval'}", "train", n=100)) >= 95
