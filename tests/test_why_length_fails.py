"""Attention rows and hidden states against the definition for every method, in half precision, and against mistakes."""
import math, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lcnb.foundations.attention import attend_dense, plain
from lcnb.foundations.checks import InputError
from lcnb.foundations.rope import rope
from lcnb.methods import METHODS, extend, make_plan
from lcnb.methods.why_length_fails import entropy, eval_attention, eval_pca, pca, probe_attention, row_logits, separability

ROOT = Path(__file__).parents[1]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=32, initializer_range=.3)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_the_definition(name):
    g = torch.Generator().manual_seed(1)
    for n, m, c in ((37, 37, 16), (5, 41, 16), (1, 30, 8)):
        q, (k, v) = torch.randn(2, 4, n, 16, generator=g, dtype=torch.float64), torch.randn(2, 2, 2, m, 16, generator=g, dtype=torch.float64)
        plan, f, rows = make_plan(name, c, m, strict=False, n_start=2), rope(16), torch.arange(m-n, m)[torch.randperm(n, generator=g)]
        p = row_logits(plan, q, k, f, rows).softmax(-1)
        torch.testing.assert_close(p @ v.repeat_interleave(2, 1), attend_dense(plan, q, k, v, f)[:, :, rows-(m-n)])


@pytest.mark.parametrize("name", ["rope", "lm_infinite", "dca", "dynamic_ntk"])
def test_rows_of_a_running_model_are_what_it_attends_with(name):
    "A listener of our own takes q, k, v and the output; the probed entropy is that of the definition."
    model, plan, ids, seen = net(), make_plan(name, 16, 40, strict=False, n_start=2), torch.arange(40)[None] * 7 % 97, {}
    with extend(model, plan) as h:
        attend = h.attend
        def listen(module, q, k, v, mask, scale):
            out = attend(module, q, k, v, mask, scale)
            p = row_logits(plan, q, k, h.rope, torch.arange(40), scale, module.layer_idx, not h.raw).softmax(-1)
            torch.testing.assert_close((p @ v.repeat_interleave(2, 1)).transpose(1, 2), out, rtol=1e-4, atol=1e-5)
            seen[module.layer_idx] = torch.special.entr(p).sum(-1)
            return out
        h.attend = listen
        with torch.no_grad(): model(ids, use_cache=False)
    got = probe_attention(model, plan, ids, torch.arange(40))["entropy"]
    torch.testing.assert_close(got, torch.stack([seen[0], seen[1]]), rtol=1e-4, atol=1e-5)


def test_half_precision():
    ids, rows = torch.arange(30)[None] * 5 % 97, torch.tensor([3, 29])
    a, b = (probe_attention(net(t), plain, ids, rows) for t in (torch.float32, torch.bfloat16))
    assert b["entropy"].dtype == torch.float32
    torch.testing.assert_close(a["entropy"], b["entropy"], rtol=.1, atol=.15)     # 8 bits of mantissa, two layers


def test_probing_leaves_the_model_alone_even_when_it_fails():
    model, ids = net(), torch.arange(20)[None]
    before = model(ids).logits
    with pytest.raises(IndexError): probe_attention(model, plain, ids + 90, [3])       # no such tokens
    with pytest.raises(InputError): probe_attention(model, plain, ids, [3], layers=[3])
    assert torch.equal(model(ids).logits, before)
    with extend(model, plain), pytest.raises(InputError, match="extended already"): probe_attention(model, plain, ids, [3])


def test_entropy_of_extremes():
    assert entropy(torch.full((4,), 1e30)).item() == pytest.approx(math.log(4))
    assert entropy(torch.tensor([0., -math.inf])).item() == 0


def test_few_points_and_constant_points():
    points, share = pca(torch.ones(3, 4, 5))
    assert (points == 0).all() and not share.nan_to_num(0).any()
    assert .3 < separability(torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)), 2) < .7   # more features than texts
    docs = [torch.arange(20), torch.arange(20) + 1]
    with pytest.raises(InputError, match="at least 2 texts"): eval_pca(net(), docs[:1], n_first=2)
    with pytest.raises(InputError, match="stride=0"): eval_pca(net(), docs, n_first=2, stride=0)
    with pytest.raises(InputError, match="n_first=0"): eval_pca(net(), docs, n_first=0)


def test_lengths_beyond_and_within():
    docs = [torch.arange(40) % 97]
    only_beyond = eval_attention(net(), plain, docs, [20, 40], 16, n_queries=2)
    assert not any(r["metric"] == "beyond_range" for r in only_beyond)                # nothing to compare with
    both = eval_attention(net(), plain, docs, [8, 16, 40], 16, n_queries=2)
    assert [r["length"] for r in both if r["metric"] == "beyond_range"] == [40]


@pytest.mark.parametrize("id, pair, word", [("fig1", "pca_layer=99", "layers"), ("fig1", "pca_skip=-1", "skip=-1"), ("fig7", "n_docs=1", "2 texts")])
def test_bad_parameters_are_one_sentence(id, pair, word, tmp_path):
    more = ["-p", "n_docs=1", "-p", "pca_docs=2"] if id == "fig1" else ["-p", "n_docs=2"] if not pair.startswith("n_docs") else []
    if id == "fig1" and "lengths" not in pair: more += ["-p", "lengths=[32]"]
    r = subprocess.run([sys.executable, "-c", "import sys; from lcnb.reproduction.cli import main; sys.exit(main())", "run", f"lm_infinite/{id}", "--no-notebook", "-p", pair, *more, "--out", str(tmp_path/"out")],
                       capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "LCNB_STATE": str(tmp_path)}, cwd=ROOT)
    assert r.returncode == 2 and word in r.stderr and "Traceback" not in r.stderr and not (tmp_path/"out").exists(), r.stderr
