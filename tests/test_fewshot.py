"Questions about documents, and costs: faults, data that is not ours, and what does not belong in a notebook."
import contextlib, io, json, math, os, random, subprocess, sys
from pathlib import Path

import pytest, torch

from lcnb.foundations.checks import InputError
from lcnb.laboratory import grammar
from lcnb.laboratory.cost import SHAPES, eval_cost, attention, peak_bytes, random_model
from lcnb.laboratory.fewshot import (CHOICES, METRICS, TEMPLATES, Examples, Question, answer_questions, build_prompt, cut_answer, eval_fewshot, fit_document, grammar_questions,
                                     load_questions, normalise, option_letters, own_questions, read_questions, score_answers, token_f1)
from lcnb.laboratory.models import load_model, random_llama

tok = grammar.build_tokenizer()
ROOT = Path(__file__).parents[1]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return f"file:{path}"


@pytest.mark.parametrize("rows,why", [
    ([dict(input="x")], "columns of one of these schemas"), ([dict(question="x", answer="y")], "it has question, answer"), ([], "empty"),
    ([dict(instructions=[], outputs=[], input="a text")], "empty"), ([dict(input=" \n\nA text.", output="y")], "question not blank"),
    ([dict(input="Who?\n\nA text.", output=3)], "column 'output' holds an integer, not text"), ([dict(input="Who?\n\nA text.", output=None)], "holds nothing, not text")])
def test_data_that_does_not_fit_is_refused_in_one_sentence(tmp_path, rows, why):
    with pytest.raises(InputError, match=why) as e: load_questions(write(tmp_path/"x.jsonl", rows))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1, 2]"])
def test_broken_files_are_refused(tmp_path, content):
    (tmp_path/"x.jsonl").write_bytes(content)
    with pytest.raises(InputError): load_questions(f"file:{tmp_path}/x.jsonl")
    (tmp_path/"x.parquet").write_bytes(content)
    with pytest.raises(InputError): load_questions(f"file:{tmp_path}/x.parquet")


def test_folders(tmp_path):
    with pytest.raises(InputError, match="a folder of files"): load_questions(f"file:{tmp_path}")
    write(tmp_path/"b.jsonl", [dict(input="d", query="second", output="a")]), write(tmp_path/"a.jsonl", [dict(input="d", query="first", output="a")])
    assert [q.question for q in load_questions(f"file:{tmp_path}")] == ["first", "second"]


def test_a_hub_data_set_without_network_is_one_sentence(tmp_path):
    code = ("from lcnb.laboratory.fewshot import load_questions\nfrom lcnb.foundations.checks import InputError\n"
            "try: load_questions('hub:nobody/nothing-here:a:test')\nexcept InputError as e: print('refused', len(str(e).splitlines()))")
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                         env=os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), PYTHONPATH=str(ROOT)))
    assert got.stdout.strip() == "refused 1", got.stderr[-600:]


def test_the_draw_is_by_seed_and_within_the_data(tmp_path):
    spec = write(tmp_path/"x.jsonl", [dict(input="d", query=f"q{i}", output="a") for i in range(50)])
    draw = lambda seed: [q.question for q in load_questions(spec, 10, seed)]
    assert draw(0) == draw(0) != draw(1) and len(set(draw(0))) == 10 and len(load_questions(spec, 500)) == 50
    counts = [sum(f"q{i}" in draw(s) for s in range(60)) for i in (0, 25, 49)]
    assert all(2 <= c <= 26 for c in counts)       # 12 expected; the first is no likelier than the last


def test_quality_in_l_eval_if_it_is_here():
    path = Path(os.environ.get("LCNB_TEST_DATA", "/nowhere"))/"leval"/"quality.parquet"
    if not path.is_file(): pytest.skip("no copy of L-Eval at LCNB_TEST_DATA")
    qs = load_questions(f"file:{path}")
    assert len(qs) == 131 and all(option_letters(q.references[0]) in tuple("ABCD") for q in qs) and all("(D)" in q.question for q in qs)


def test_no_question_is_asked_of_a_training_story():
    numbers = lambda split: [int(q.id.split()[1]) for q, _ in zip(grammar_questions("facts", split, 60), range(30))]
    assert min(numbers("test")) >= 3_000_000_000 and min(numbers("train")) >= 4_000_000_000 and not set(numbers("test")) & set(numbers("train"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("truncate", ["left", "right"])
def test_prompts_keep_examples_and_question_whole_and_never_exceed_the_limit(template, truncate):
    rng, pool = random.Random(0), Examples(load_questions("grammar:people:train", 20))
    for _ in range(20):
        q = Question(grammar.document(rng.randrange(1000), rng.randrange(1, 500)), "Where does Mira live?", ())
        shots, limit = pool.choose(q.question, rng.randrange(3)), rng.randrange(900, 1500)
        ids = build_prompt(tok, q, shots, limit, template, truncate)
        text = tok.decode(ids, skip_special_tokens=True)
        assert len(ids) <= limit and ids[0] == tok.bos_token_id and text.endswith(TEMPLATES[template].ask.format(question=q.question))
        assert all(x in text for pair in shots for x in pair)
        kept = fit_document(tok, q.document, 10**6)
        assert len(ids) == limit or tok.decode(kept) in text


def test_an_empty_document_and_an_exact_fit():
    q = Question("", "Where does Mira live?", ())
    n = len(build_prompt(tok, q, max_tokens=1000, template="grammar"))
    assert len(build_prompt(tok, q, max_tokens=n, template="grammar")) == n
    with pytest.raises(InputError, match=f"at least {n}"): build_prompt(tok, q, max_tokens=n-1, template="grammar")


def test_braces_in_questions_are_text():
    q = Question("A {text}.", "What is {x}?", ("{y}",))
    assert "What is {x}?" in tok.decode(build_prompt(tok, q, [("{a}", "{b}")], 500, "paper")) and score_answers(["{y}"], [q.references], "em") == {"em": 100.}


def test_bm25_with_odd_questions():
    pool = Examples([Question("", q, ("a",)) for q in ("", "?!", "Where does Mira live?", "Où habite Mira ?", "Mira Mira Mira")])
    for how in CHOICES:
        for q in ("", "!!!", "unheard of", "Mira"): assert len(pool.choose(q, 5, how)) == 5
    assert pool.choose("Where does Mira live?", 1, "best")[0][0] == "Where does Mira live?"
    with pytest.raises(InputError, match="at most 5"): pool.choose("x", 6)
    with pytest.raises(InputError, match="best, random, worst"): pool.choose("x", 1, "nearest")


def test_scores_agree_with_independent_ones():
    "F1 by a definition of its own; ROUGE-L within the bounds that ROUGE-1 sets."
    rng = random.Random(1)
    for _ in range(200):
        a, b = (" ".join(rng.choice("red blue goat hen fox".split()) for _ in range(rng.randrange(1, 6))) for _ in range(2))
        left, hits = b.split(), 0
        for w in a.split():
            if w in left: left.remove(w); hits += 1
        p, r = hits/len(a.split()), hits/len(b.split())
        assert math.isclose(token_f1(a, b), 2*p*r/(p + r) if hits else 0.)
        s = score_answers([a], [(b,)], "rouge_g")
        assert s["rougeL"] <= s["rouge1"] + 1e-9 and math.isclose(s["rouge1"], 100*token_f1(a, b))
    for m in METRICS: assert max(score_answers(["(B) x true"], [("(B) x true",)], m).values()) == pytest.approx(100)
    assert normalise("Théâtre, the A-team") == "théâtre ateam"


def test_answers_do_not_depend_on_the_batch(tmp_path):
    lm = load_model(random_llama(tmp_path/"m", tok, pretrained_len=512), device="cpu")
    qs = load_questions("grammar:facts", 5, n_words=40) + load_questions("grammar:facts", 3, 1, n_words=150)
    how = dict(max_tokens=400, max_new_tokens=6, template="grammar")
    assert answer_questions(lm.model, tok, qs, batch_tokens=1, **how) == answer_questions(lm.model, tok, qs, batch_tokens=10**6, **how)
    with pytest.raises(InputError, match="examples to choose from"): eval_fewshot(lm.model, tok, qs, n_shots=1)
    with pytest.raises(InputError, match="at least one question"): eval_fewshot(lm.model, tok, [])


def test_memory_of_one_layer_grows_as_it_must():
    model = random_model("one-layer", 512, device="cpu")
    ways = {m: lambda m=m: attention(model, m) for m in ("eager", "flash")}
    rows = eval_cost(model, ways, [256, 512, 1024], repeats=1)
    peak = lambda m, n: next(r["value"] for r in rows if (r["method"], r["length"], r["metric"]) == (m, n, "peak_bytes"))
    assert 1.8 < peak("flash", 1024)/peak("flash", 512) < 2.2 and 3 < peak("eager", 1024)/peak("eager", 512) <= 4
    assert eval_cost(model, ways, [256], repeats=1)[1]["value"] == peak("eager", 256)      # the same every time
    with pytest.raises(InputError, match="eager, flash"):
        with attention(model, "triton"): pass
    for bad in (dict(shape="big"), dict(dtype="int8"), dict(pretrained_len=0)):
        with pytest.raises(InputError): random_model(**dict(shape="one-layer", pretrained_len=8) | bad)


def test_a_document_of_the_users_own(tmp_path):
    "Through the command line: an answer a question and method, and refusals in one line with exit code 2."
    (tmp_path/"own.txt").write_text(grammar.document(5, 300), encoding="utf8")
    run = lambda *p: subprocess.run([sys.executable, "-c", "import sys; from lcnb.reproduction.cli import main; sys.exit(main())", "run", "dca/table6_7", "--out", str(tmp_path/"out"), *(x for a in p for x in ("-p", a))],
                                    capture_output=True, text=True, timeout=300, env=os.environ | dict(LCNB_STATE=str(tmp_path/"state"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
    ok = run(f"document={tmp_path}/own.txt", 'questions=["Where does Mira live?"]', "lengths=[300]", "methods=[rope, dca]")
    assert ok.returncode == 0, ok.stdout + ok.stderr
    assert (tmp_path/"out"/"table.md").read_text().count("| Where does Mira live? |") == 1
    bad = run(f"document={tmp_path}/none.txt", "lengths=[300]")
    assert bad.returncode == 2 and "none.txt" in bad.stdout + bad.stderr
