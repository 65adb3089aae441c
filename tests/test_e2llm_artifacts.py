"What E2LLM's artifacts measure: parts of an answer, scores by seed, runs that can be killed, rows that the claims read."
import functools, math

import pytest
import torch

from lcnb.e2llm.baselines import Retriever, TextReader, last_tokens
from lcnb.e2llm.model import E2LLM, TINY_PROMPTS
from lcnb.e2llm import studies
from lcnb.e2llm.studies import (ABLATIONS, PARTS, SETTINGS, SWEEPS, Clock, ablation_rows, add_rows, answer_rows, change_of, e2llm_answer, eval_answers, kind_of, length_texts, lines_of, main, make_runs, margin_rows,
                                mean_se, merged, read_runs, restated, run_name, score_table, shaped_encoder, size_rows, study_records, study_runs, sweep_rows, text_answer, train_run, written)
from lcnb.e2llm.training import LINE, TINY
from lcnb.foundations.checks import InputError
from lcnb.laboratory.corpora import encode, load_corpus
from lcnb.laboratory.models import load_model
from lcnb.reproduction import registry
from lcnb.reproduction.claims import Result, check_claim, claims

profile_params = functools.lru_cache(registry.profile_params) # YAML is read once for each


@pytest.fixture(scope="module")
def ml(): return E2LLM("tiny-rope", "tiny", prompts=TINY_PROMPTS, **TINY)


@pytest.fixture(scope="module")
def lm(): return load_model("tiny")


# --- what an answer costs
def test_parts_add_up_and_cached_vectors_change_nothing(ml, lm):
    texts = length_texts(load_corpus("grammar:stories"), lm.tokenizer, (64, 256), 2)
    kept = {}
    methods = dict(e2llm=e2llm_answer(ml, "What?", 2, kept=kept), e2llm_cached=e2llm_answer(ml, "What?", 2, cached=True, kept=kept), truncated=text_answer(TextReader(lm, last_tokens), "What?", 2))
    rows = eval_answers(methods, texts, columns=dict(seed=3))
    value = {(r["method"], r["length"], r["metric"]): r["value"] for r in rows}
    assert all(r["seed"] == 3 and r["n"] == 2 for r in rows) and set(kept) == {t for ts in texts.values() for t in ts}
    for m in methods:
        for n in texts:
            parts = [value[m, n, f"{p}_seconds"] for p in PARTS]
            assert value[m, n, "seconds"] == pytest.approx(sum(parts), rel=.3) and value[m, n, "prefill_seconds"] == pytest.approx(sum(parts[:3]), rel=.3)  # medians of two sums
    with torch.inference_mode(): assert methods["e2llm"](texts[256][0])(Clock()) == methods["e2llm_cached"](texts[256][0])(Clock())


def test_every_reader_reads_what_it_answers_from(lm):
    text = length_texts(load_corpus("grammar:stories"), lm.tokenizer, (1024,), 1)[1024][0]
    with torch.inference_mode():
        for kw in (dict(choose=last_tokens), dict(method="yarn"), dict(method="pi"), dict(choose=Retriever(top_k=2))):
            reader = TextReader(lm, **kw)
            assert lm.tokenizer.decode(text_answer(reader, "What?", 3)(text)(Clock())).strip() == reader.generate([text], ["What?"], 3, eos_token_id=None)[0]


def test_few_samples_where_few_were_asked_for(lm):
    texts = length_texts(load_corpus("grammar:stories"), lm.tokenizer, (64,), 3)
    reader = text_answer(TextReader(lm), "What?", 1)
    rows = eval_answers(dict(full=reader, truncated=reader), texts, base="truncated", few=dict(full=1))
    assert {(r["method"], r["n"]) for r in rows} == {("full", 1), ("truncated", 3)} and not [r for r in rows if r["method"] == "full" and "_q" in r["metric"]]


def test_merging_is_undone_after_an_error(ml):
    with pytest.raises(RuntimeError), merged(ml): raise RuntimeError
    assert not any(m.merged for m in ml.decoder.modules() if hasattr(m, "merged"))


def test_a_random_encoder_is_the_same_for_a_seed(lm):
    a, b, c = (shaped_encoder("paper-share", lm.tokenizer, device="cpu", seed=s).encode(["A boat."]) for s in (0, 0, 1))
    assert (a == b).all() and (a != c).any()


# --- scores
def test_records_of_a_seed_are_the_same_and_of_the_length(lm):
    for spec in ("quiz", "quiz:summary"):
        a = study_records(spec, lm.tokenizer, 3, 2560, 1)
        assert a == study_records(spec, lm.tokenizer, 3, 2560, 1) and a[0] != study_records(spec, lm.tokenizer, 3, 2560, 2)[0]
        assert all(.9 < len(encode(lm.tokenizer, r["context"]))/2560 < 1.1 for r in a)
    assert lines_of(lm.tokenizer, 1) == 5


def test_a_right_answer_scores_one_whoever_writes_on(lm):
    class Knows:
        def generate(self, contexts, prompts, n): return [f"{known[p]} {'And more.'*5}" for p in prompts]
    records = study_records("quiz", lm.tokenizer, 4, 100)
    known = {r["prompt"]: r["answer"] for r in records}
    assert {r["value"] for r in answer_rows(Knows(), records, until=".")} == {1.}
    assert {r["metric"]: r["value"] for r in answer_rows(Knows(), records)}["precision"] < 1


def test_a_margin_without_spread_is_finite_and_two_seeds_give_none():
    row = lambda m, s, v: dict(method=m, dataset="quiz", length=8, metric="f1", seed=s, value=v, n=4)
    same = [row(m, s, v) for m, v in (("e2llm", .5), ("rag", .25)) for s in range(3)]
    assert [r["value"] for r in margin_rows(same)] == [250.] and margin_rows(same[:2] + same[3:5]) == []
    with pytest.raises(InputError, match="at least two"): mean_se([1.])


def test_restated_counts_each_token_once(ml):
    lines = study_records("quiz", ml.tokenizer, 1, 100)[0]["context"].splitlines(True)
    got = restated(ml, lines)
    n = sum(len(encode(ml.tokenizer, " " + l.strip())) for l in lines)
    assert got["e2llm"][1] == got["no_chunk"][1] and abs(got["e2llm"][1] - n) <= 2*len(lines)


# --- runs
def test_a_killed_study_goes_on_and_a_file_is_whole(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(studies, "train_run", lambda run, seed, **kw: made.append((run, seed)))
    monkeypatch.setattr(studies, "run_rows", lambda ml, run, seed, held, columns: [dict(run=run, dataset="quiz", kind="qa", length=8, seed=seed, metric="f1", value=.5, n=2) | columns])
    assert make_runs(["default", "layers=1"], [0], out=tmp_path) == 2
    assert make_runs(["default", "layers=1"], [0, 1], out=tmp_path) == 2 and made == [("default", 0), ("layers=1", 0), ("default", 1), ("layers=1", 1)]
    assert {p.name for p in tmp_path.iterdir()} == {"default.csv", "layers=1.csv"} and len(read_runs(tmp_path)) == 4
    before = (tmp_path/"default.csv").read_bytes()
    def dies(file, rows): open(file, "w").write("half"); raise OSError("full disk")
    monkeypatch.setattr(studies, "write_csv", dies)
    with pytest.raises(OSError): add_rows(tmp_path/"default.csv", [dict(run="default")])
    assert (tmp_path/"default.csv").read_bytes() == before and len(read_runs(tmp_path)) == 4
    with pytest.raises(InputError, match="batch=4: must be 32"): make_runs(["default"], [0], batch=4, out=tmp_path)


@pytest.mark.parametrize("args", (["--runs", "ranks=1"], ["--steps", "0"], ["--runs", "layers=one"]))
def test_bad_input_is_one_line(args, capsys, tmp_path):
    assert main([*args, "--out", str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("run", ["encoder_rank=0", "decoder_rank=0", "overlap=0.3", "encoder=tiny-ape"])
def test_every_kind_of_run_can_be_trained(run):
    ml = train_run(run, 0, 1, 1, 2, sizes=dict(n_filler=12, n_facts=4))
    assert ml.ranks == ((0 if run == "encoder_rank=0" else SETTINGS["encoder_rank"]), (0 if run == "decoder_rank=0" else SETTINGS["decoder_rank"])) and ml.overlap == (.3 if run == "overlap=0.3" else 0)


# --- what the claims read
def result(rows): return Result(None, rows, dict(params={}, resolved=dict(pretrained_len=256)))


def test_claims_on_sizes_hold_but_for_the_rank_of_longlora():
    found = {c.id: check_claim(c, result(size_rows())).status for c in claims("e2llm") if ".size." in c.id}
    assert found.pop("e2.t2.size.longlora") == "does not hold" and set(found.values()) == {"holds"}


def test_every_claim_of_table_3_and_figure_4_finds_its_rows():
    point = lambda run, d, s: dict(run=run, dataset=d, kind="qa", length=8, metric="f1", value=.5 + .01*s, n=4, seed=s, steps=1, second=1, batch=1)
    rows = [point(run, d, s) for run in study_runs() for d in ("a", "b") for s in range(3)]
    for artifact, some in (("e2llm/table3", ablation_rows(rows)), ("e2llm/fig4", sweep_rows(rows))):
        for c in claims("e2llm"):
            if c.artifact == artifact and c.scope == "any": assert check_claim(c, result(some)).status in ("holds", "does not hold"), c.id
        keys = [tuple(v for k, v in r.items() if k not in ("value", "n")) for r in some]
        assert len(keys) == len(set(keys)) and all(math.isfinite(r["value"]) for r in some)


def test_the_table_and_the_sweep_share_the_default_run():
    assert study_runs().count("default") == 1 and set(ABLATIONS.values()) <= set(study_runs())
    for name, values in SWEEPS.values(): assert SETTINGS[name] in values and run_name(name, SETTINGS[name]) == "default"
    assert change_of(f"chunk_size={2*LINE}") == dict(chunk_size=2*LINE)


@pytest.mark.parametrize("profile", ["gpu", "paper"])
@pytest.mark.parametrize("artifact", ["fig3", "table2", "table3", "fig4", "windows"])
def test_profiles_name_parameters_that_there_are(profile, artifact):
    known = registry.parameters(registry.artifact(f"e2llm/{artifact}").notebook)
    params = profile_params(profile, f"e2llm/{artifact}")
    assert set(params) <= set(known) and (params["model"] != "tiny" or params["shape"])
    if artifact == "table2": assert len(params["n_docs"]) == len(params["corpus"]) == len(params["max_new_tokens"])
    if artifact in ("table3", "fig4"): assert params["train"] is True and len(params["n_train"]) == len(params["n_docs"]) == len(params["corpus"]) == len(params["max_new_tokens"])
