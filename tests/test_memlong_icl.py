"In-context learning with demonstrations in memory: real sets, faults, scorings against a count by hand, and what memory does to logits."
import json, os, random, subprocess, sys
from collections import Counter
from pathlib import Path

import pytest, torch

from lcnb.foundations.checks import InputError
from lcnb.laboratory.models import load_model
from lcnb.memlong.icl import (GRAMMAR, METHODS, SCORINGS, TASKS, draws, eval_icl, fill, icl_averages, icl_prompt, icl_table, in_context, judge, load_icl, nearest, plot_icl,
                              word_ids, word_scores)
from lcnb.memlong.model import MemLong

ROOT = Path(__file__).parents[1]
lm = load_model("tiny")
tok = lm.tokenizer


def memlong(gate=0., **options):
    ml = MemLong(lm.model, "tiny-rope", tok, **dict(memory_layer=1, retrieval_layers=(1, 2, 3), chunk_size=32, top_k=2, capacity=1024, local_len=192, memory_dtype=torch.float32) | options)
    ml.gates.data.fill_(gate)
    return ml


def rows_of(n, **more): return [dict(text=f"text {i}", label=i % 2) | more for i in range(n)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return str(path.parent)


@pytest.mark.parametrize("name", TASKS)
def test_the_real_sets_load(name, assets):
    folder = assets/"data"/"icl_unclear"
    if not folder.is_dir(): pytest.skip("no data/icl_unclear")
    d = load_icl(name, folder)
    texts = {t for t, _ in d.train}, {t for t, _ in d.test}
    assert not texts[0] & texts[1] and {w for _, w in d.train} == {w for _, w in d.test} == set(d.task.words)
    sizes = dict(sst2=(6920, 872), sst5=(8544, 1101))
    if name in sizes: assert len(d.train) + d.shared == sizes[name][0] and len(d.test) == sizes[name][1]
    else: assert .17 < len(d.test)/(len(d.test) + len(d.train)) < .23 and d.shared == 0     # no split to score in the folder
    item = next(draws(d, 4, 18, seed=1))
    prompt = tok.decode(icl_prompt(tok, d.task, item[2], item[0], 100_000), skip_special_tokens=True)
    assert prompt.endswith({"subj": "Type:"}.get(name, "Sentiment:")) and prompt.count("Input: " if name == "subj" else "Review: ") == 5 and len(set(item[2] + item[3])) == 22


def test_words_agree_with_the_label_of_the_real_sets(assets):
    if not (assets/"data"/"icl_unclear").is_dir(): pytest.skip("no data/icl_unclear")
    from datasets import load_dataset
    for name, task in TASKS.items():
        rows = load_dataset("parquet", data_files=str(assets/"data"/"icl_unclear"/f"{name}.train.parquet"), split="train")
        assert all(task.words[r["label"]] == r["label_text"] for r in rows), name


def test_hub_columns_and_words_of_other_people(tmp_path):
    write(tmp_path/"sst2.train.jsonl", [dict(sentence=f"s{i} ", label=i % 2, idx=i) for i in range(4)])
    write(tmp_path/"sst2.validation.jsonl", [dict(sentence="v", label=1, idx=0)])
    d = load_icl("sst2", tmp_path)
    assert d.test == [("v", "positive")] and d.train[0] == ("s0", "negative")
    write(tmp_path/"sst5"/"train.jsonl", [dict(text=f"t{i}", label=i % 5, label_text="very negative") for i in range(40)])
    write(tmp_path/"sst5"/"test.jsonl", [dict(text="x", label=4, label_text="very positive")])
    assert load_icl("sst5", tmp_path).test == [("x", "great")]
    write(tmp_path/"subj.train.jsonl", [dict(text=f"t{i}", label=1, label_text="subjective") for i in range(40)])     # a word outranks a number
    write(tmp_path/"subj.test.jsonl", [dict(text="y", label=0, label_text="objective")])
    d = load_icl("subj", tmp_path)
    assert d.test == [("y", "objective")] and {w for _, w in d.train} == {"subjective"}


def test_test_texts_are_taken_out_of_the_training_rows(tmp_path):
    write(tmp_path/"mr.train.jsonl", rows_of(30)), write(tmp_path/"mr.test.jsonl", rows_of(10))
    d = load_icl("mr", tmp_path)
    assert d.shared == 10 and len(d.train) == 20 and len(d.test) == 10
    write(tmp_path/"mr.test.jsonl", rows_of(30))                     # the train file is the test file, as with Subj in the official code
    with pytest.raises(InputError, match="at least one training text"): load_icl("mr", tmp_path)


@pytest.mark.parametrize("rows,why", [([dict(review="x", label=1)], "must have a text"), ([dict(text="x", label=2)], "a label from 0 to 1"), ([dict(text="x", label=-1)], "a label from 0 to 1"),
                                      ([dict(text=3, label=1)], "must have a text"), ([dict(text="x", label=None)], "a label from"), ([dict(text="x", label=True)], "a label from"), ([dict(input="x", output="y")], "must have a text")])
def test_another_schema_is_refused_in_one_sentence(tmp_path, rows, why):
    with pytest.raises(InputError, match=why) as e: load_icl("mr", write(tmp_path/"mr.train.jsonl", rows))
    assert "\n" not in str(e.value) and f"corpus='mr', {tmp_path/'mr.train.jsonl'}: line 1: must" in str(e.value)


def test_faults(tmp_path):
    for name in ("imdb", "", None, "grammar:stories"):
        with pytest.raises(InputError, match="corpus="): load_icl(name)
    with pytest.raises(InputError, match="data_folder=.*mr.train.parquet"): load_icl("mr", tmp_path)
    with pytest.raises(InputError, match="data_folder="): load_icl("mr", tmp_path/"nothing")
    with pytest.raises(InputError, match="no name on the hub"): load_icl("mpqa")
    for content in (b"{", b"", b"\xff\xfe"):
        (tmp_path/"mr.train.jsonl").write_bytes(content)
        with pytest.raises(InputError): load_icl("mr", tmp_path)
    data, ml = load_icl("grammar:keys"), memlong()
    for bad, why in [(dict(n_context=-1), "n_context=-1"), (dict(n_memory=-2), "n_memory=-2"), (dict(n_context=30, n_memory=30), "n_context \\+ n_memory=60: must be at most 36"), (dict(n_items=0), "n_items=0"),
                     (dict(methods=["knn"]), "methods='knn'"), (dict(ask="me"), "ask='me'"), (dict(packing="none"), "packing='none'"), (dict(redraw="never"), "redraw='never'"), (dict(max_tokens=3), "max_tokens=3"), (dict(max_tokens=-1), "max_tokens=-1")]:
        with pytest.raises(InputError, match=why): eval_icl(data, lm.model, ml, **dict(n_items=1, seeds=(0,)) | bad)
    assert not ml.carry and ml.query == "causal" and ml.segment == 32 and not ml.banks                                    # as it was, also after a fault


def test_a_hub_set_without_network_is_one_sentence(tmp_path):
    code = ("from lcnb.memlong.icl import load_icl\nfrom lcnb.foundations.checks import InputError\n"
            "try: load_icl('subj')\nexcept InputError as e: print('refused', len(str(e).splitlines()))")
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                         env=os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), PYTHONPATH=str(ROOT)))
    assert got.stdout.strip() == "refused 1", got.stderr[-600:]


def test_draws_are_by_seed_disjoint_and_the_same_items_for_all():
    data = load_icl("grammar:keys")
    a, b = list(draws(data, 3, 5, 1)), list(draws(data, 3, 5, 2))
    assert [d[:2] for d in a] == [d[:2] for d in b] == data.test and a == list(draws(data, 3, 5, 1)) and a[0][2] != b[0][2]
    for d in a: assert len({t for t, _ in d[2] + d[3]}) == 8 and d[0] not in {t for t, _ in d[2] + d[3]} and d[2] == a[0][2]
    assert [d[2] for d in draws(data, 3, 9, 1)] == [d[2] for d in a] and len(list(draws(data, 0, 0, 1, n_items=5))) == 5
    assert len({tuple(d[3]) for d in draws(data, 1, 5, redraw="seed")}) == 1 < len({tuple(d[3]) for d in draws(data, 1, 5)})


@pytest.mark.parametrize("name", ["mr", "sst5", "grammar:keys"])
def test_scores_are_what_token_by_token_counting_gives(name):
    "Whole words, label by label, against a loop that adds one token's log-probability at a time; the labels of mr and sst5 are many tokens of different number here."
    task = TASKS.get(name) or GRAMMAR[name]
    prompt = icl_prompt(tok, task, [("Mira was glad.", task.words[1])], "Otto was sad.", 200)
    words = word_ids(tok, task)
    for text, ids in zip(task.words, words): assert tok.decode(ids) == f" {text}"
    scores, top = word_scores(lambda x: lm.model(x).logits, prompt, words)
    by_hand = []
    for ids in words:
        x, total = prompt.tolist(), 0.
        for t in ids:
            with torch.no_grad(): total += lm.model(torch.tensor([x])).logits[0, -1].double().softmax(-1)[t].log().item()
            x.append(t)
        by_hand.append(total)
    torch.testing.assert_close(scores, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    with torch.no_grad(): assert top == lm.model(prompt[None]).logits[0, -1].argmax()
    per = [s/len(i) for s, i in zip(by_hand, words)]
    said = tok.decode([top]).strip()
    for word in task.words:
        want = dict(label=task.words[by_hand.index(max(by_hand))] == word, label_per_token=task.words[per.index(max(per))] == word, first_token=said != "" and word.startswith(said))
        assert judge(tok, task, words, word, scores, top) == want


def test_the_first_token_rule_credits_prefixes_and_not_blanks():
    id = lambda t: tok(t, add_special_tokens=False).input_ids[0]
    rule = lambda token, word: judge(tok, TASKS["sst5"], [[1]]*5, word, torch.zeros(5), token)["first_token"]
    assert rule(id("t"), "terrible") == 1 and rule(id("t"), "great") == 0 and rule(id(" "), "terrible") == 0 and rule(tok.eos_token_id, "terrible") == 0


def logits_of(ml, texts, prompt, ask, packing="each"):
    with in_context(ml) as kept, torch.no_grad():
        fill(ml, texts, packing)
        kept.said = ask
        return ml(prompt[None]).logits[0, -1]


@pytest.mark.parametrize("packing", ["each", "joined"])
def test_demonstrations_in_memory_change_logits_only_through_an_open_gate(packing):
    data = load_icl("grammar:keys")
    text, _, context, memory = next(draws(data, 2, 6))
    prompt, shown = icl_prompt(tok, data.task, context, text, 192), [data.task.show(*d) for d in memory]
    with torch.no_grad(): plain = lm.model(prompt[None]).logits[0, -1]
    assert torch.equal(logits_of(memlong(0.), shown, prompt, text, packing), plain)
    opened = logits_of(memlong(.5), shown, prompt, text, packing)
    assert (opened - plain).abs().max() > 1e-2
    assert torch.equal(logits_of(memlong(.5), [], prompt, text, packing), plain)
    assert not torch.equal(logits_of(memlong(.5), shown[:1], prompt, text, packing), opened)


def test_only_what_is_fetched_matters_and_the_item_asks():
    "The two nearest demonstrations alone give the same logits as all six; a prompt that asks may fetch others."
    data, ml = load_icl("grammar:keys"), memlong(.5)
    for text, _, context, memory in draws(data, 2, 6, seed=3):
        prompt, shown = icl_prompt(tok, data.task, context, text, 192), [data.task.show(*d) for d in memory]
        near = sorted(nearest(ml.embed, text, shown, 2))
        torch.testing.assert_close(logits_of(ml, shown, prompt, text), logits_of(ml, [shown[i] for i in near], prompt, text), rtol=0, atol=1e-4)
        other = [s for i, s in enumerate(shown) if i not in near]
        assert (logits_of(ml, shown, prompt, text) - logits_of(ml, other, prompt, text)).abs().max() > 1e-4


def test_memory_holds_nothing_of_the_item_before():
    "Each item alone scores as it does among others."
    data, ml = load_icl("grammar:keys"), memlong(.5)
    whole = eval_icl(data, lm.model, ml, ["memlong"], 1, 4, seeds=(0,))
    hits = []
    for text, word, context, memory in draws(data, 1, 4, 0):
        prompt, words = icl_prompt(tok, data.task, context, text, 192), word_ids(tok, data.task)
        scores = logits_of(memlong(.5), [data.task.show(*d) for d in memory], prompt, text)[[w[0] for w in words]]
        hits.append(data.task.words[int(scores.argmax())] == word)
    assert [r["value"] for r in whole if r["scoring"] == "label"] == [sum(hits)/len(hits)]


def test_closed_gates_give_the_plain_model_s_rows_and_rag_of_all_is_full_context():
    data = load_icl("grammar:moods")
    rows = eval_icl(data, lm.model, memlong(0., top_k=1), n_context=1, n_memory=1, seeds=(0, 1), n_items=6)
    value = {(r["method"], r["seed"], r["scoring"]): r["value"] for r in rows}
    assert len(rows) == len(value) == 2*(5*len(SCORINGS) + 1) and {r["n"] for r in rows} == {6} and {m for m, *_ in value} == set(METHODS)
    for s in (0, 1):
        for k in SCORINGS: assert value["memlong", s, k] == value["no_memory", s, k] == value["plain", s, k] and value["rag", s, k] == value["full_context", s, k]


def test_the_memory_is_smaller_than_the_demonstrations():
    "A full memory forgets; nothing breaks, and the item is scored."
    data = load_icl("grammar:keys")
    for packing in ("each", "joined"):
        for chunk in (8, 32):
            rows = eval_icl(data, lm.model, memlong(.5, chunk_size=chunk, capacity=64, segment=8), ["memlong"], 1, 8, seeds=(0,), n_items=2, packing=packing)
            assert len(rows) == 3 and all(0 <= r["value"] <= 1 for r in rows)


def test_averages_need_every_set_and_tables_show_every_method():
    rows = [r for n in GRAMMAR for r in eval_icl(load_icl(n), lm.model, memlong(), ["majority", "plain"], 1, 0, seeds=(0, 1), n_items=3)]
    means = icl_averages(rows)
    for m in means:
        same = [r["value"] for r in rows if all(r[k] == m[k] for k in ("method", "seed", "scoring", "n_context", "n_memory"))]
        assert len(same) == 2 and m["value"] == sum(same)/2 and m["dataset"] == "average"
    assert len(icl_averages(rows[1:])) == len(means) - 1
    table = icl_table(rows + means)
    assert len(plot_icl(rows + means, "average").get_xticks()) == 0 and "grammar:keys" == plot_icl(rows, "grammar:keys").get_title()
    assert table.count("\n") == 3 and "| majority | 0 |" in table and "±" in table and "average" in table.splitlines()[0]
