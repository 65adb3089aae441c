"""Sweeps over encoders, methods and tasks: what is refused, and that a memory of vectors changes no score."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lcnb.foundations.checks import InputError
from lcnb.longembed.benchmark import Dense, RetrievalTask, passkey_task
from lcnb.longembed.encoders import random_encoder
from lcnb.longembed.pictures import plot_averages, plot_before_after, plot_gains, plot_passkey_map, printed_rows
from lcnb.longembed.sweep import Remembered, adopt, averages, best_rows, e5rope_model, extended, gains, load_encoders, load_e5rope, plan, positions_of, short_change, sweep, tuned_tables

APE, ROPE, WORDS = random_encoder("bert", 16), random_encoder("jina", 16), "the grass is green sky blue sun we go there and back again".split()
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=70).map(" ".join), min_size=2, max_size=5)

@settings(max_examples=15, deadline=None, derandomize=True)
@given(texts, st.sampled_from([(APE, "none"), (APE, "pcw"), (APE, "gp"), (APE, "rp"), (APE, "pi"), (ROPE, "gp"), (ROPE, "pi"), (ROPE, "ntk")]), st.booleans())
def test_a_memory_changes_no_score(docs, which, log_scale):
    encoder, method = which
    task = RetrievalTask("any", {str(i): t for i, t in enumerate(docs)}, {"q": "where do we go"}, {"q": {"0": 1}})
    store, e = {}, extended(encoder, method, 1 if method == "none" else 4, log_scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = Dense(e).scores(task)
    for m in ("none", "pcw", "rp", method): Remembered(extended(encoder, m, 1 if m == "none" else 4, log_scale), store, m).scores(task)
    full = len(store)
    np.testing.assert_allclose(Remembered(e, store, method).scores(task), want, atol=3e-6)
    assert len(store) == full # nothing was left to do

def test_prompts_are_part_of_what_is_read():
    e, store = random_encoder("bert", 64), {}
    e.prompts = dict(query="the ", document="")
    scorer = Remembered(e, store)
    a, b = (scorer.vectors(["sun is blue"], p) for p in ("query", "document"))
    assert len(store) == 2 and not np.allclose(a, b)

@pytest.mark.parametrize("call, said", [
    (lambda: plan([APE], [["none"], ["pi"]], [2]), "methods="),
    (lambda: sweep([APE], [["ntk"]], [passkey_task(64, 2, 1)], [4]), "method='ntk'"),
    (lambda: sweep([APE], [["pi"]], [passkey_task(64, 2, 1)], [1]), "to=16: must be larger than base_len"),
    (lambda: sweep([APE], [["tuned_pi"]], [passkey_task(64, 2, 1)], [4]), "method='tuned_pi': must be one that needs no tuning"),
    (lambda: adopt(ROPE, ROPE, "tuned_pi", 4), "tuned='random-jina'"),
    (lambda: adopt(extended(APE, "pi", 2), APE, "tuned_pi", 4), "extended from 16 to 64 tokens or more"),
    (lambda: tuned_tables(["a", "b"], ["tiny-ape"]), "tuned="),
    (lambda: load_encoders(["tiny-ape", "tiny-rope"], [128]), "pretrained_len="),
    (lambda: e5rope_model(dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8), {}), "model='e5rope'"),
    (lambda: plot_averages([]), "rows="), (lambda: plot_gains({}), "groups="), (lambda: plot_before_after([]), "rows="), (lambda: plot_passkey_map([]), "rows="),
    (lambda: printed_rows([dict(method="GP", length="512", value="1")], {"PI": "pi"}), "cells=")])
def test_refused_in_one_sentence(call, said):
    with pytest.raises(InputError) as e: call()
    assert said in str(e.value) and "\n" not in str(e.value)

def test_e5rope_from_torch_file(tmp_path):
    config = dict(model_type="e5rope", vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, type_vocab_size=2)
    names = ["encoder.layer.0." + n for n in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")]
    shapes = [(16, 16)]*4 + [(16,), (32, 16), (16, 32), (16,)]
    weights = {f"{n}.weight": torch.randn(s) for n, s in zip(names, shapes)} | {f"{n}.bias": torch.randn(s[0]) for n, s in zip(names, shapes)}
    weights |= {"embeddings.word_embeddings.weight": torch.randn(40, 16), "embeddings.token_type_embeddings.weight": torch.randn(2, 16), "embeddings.LayerNorm.weight": torch.ones(16), "embeddings.LayerNorm.bias": torch.zeros(16)}
    folder = tmp_path/"my-e5rope"
    ROPE.tokenizer.save_pretrained(folder)
    import json
    (folder/"config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model.safetensors or pytorch_model.bin"): load_e5rope(str(folder))
    torch.save(weights, folder/"pytorch_model.bin")
    e = load_e5rope(str(folder), base_len=32, device="cpu")
    assert positions_of(e) == "rope" and e.base_len == 32 and e.name == str(folder)
    torch.testing.assert_close(e.model.layers[0].self_attn.q_proj.weight, weights[names[0] + ".weight"])

def test_best_of_a_series_and_gap():
    row = lambda positions, method, factor, value: dict(model=positions, revision="", positions=positions, method=method, factor=factor, dataset="d", length=0, metric="acc_at_1", value=value, n=9, seed=0)
    rows = [row("ape", "none", 1, .3), row("rope", "none", 1, .2), row("ape", "gp", 8, .4), row("ape", "tuned_pi", 8, .6), row("rope", "se", 8, .9)]
    class Named:
        def __init__(self, name): self.name, self.base_len = name, 128
    means = averages(rows, [Named("ape"), Named("rope")])
    assert {r["length"] for r in means} == {128, 1024} and sorted(round(r["value"], 9) for r in gains(means)) == [.1, .3, .7]
    assert {(r["series"], r["factor"]): round(r["value"], 9) for r in best_rows(means) if r["metric"] == "gap"} == {("rope-ape", 1): -.1, ("rope-ape", 8): .5}

def test_short_texts_are_exactly_what_they_were():
    assert short_change(APE, extended(APE, "pi", 4), ["the sun", "we go there and back again"]) == 0
