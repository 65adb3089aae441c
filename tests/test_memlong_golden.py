"""MemLong's attention and whole model against float64 results computed from the equations and from a reading of the official code."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from lcnb.foundations.rope import rope
from lcnb.memlong.retrieval_attention import retrieval_attention

FOLDER = GOLDEN / "memlong"
A, W = load_file(FOLDER / "attention.safetensors"), load_file(FOLDER / "whole_model.safetensors")
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]


def attended(gate=None, seen=slice(None), dtype=torch.float32, **kw):
    "One attention layer of 4 heads of 8 on 6 tokens, local positions from 1."
    q, k, v = ((A["x"].to(dtype) @ A[w].to(dtype).T).unflatten(-1, (4, 8)).transpose(1, 2) for w in ("wq", "wk", "wv"))
    mem_k, mem_v = (A[m].to(dtype)[:, :, seen] for m in ("mem_keys", "mem_values"))
    if seen == slice(0, 0): kw["reading"] = "paper_one_softmax"
    out = retrieval_attention(q, k, v, mem_k, mem_v, rope(8), gate, start=1, **kw)
    return (out.transpose(1, 2).flatten(2) @ A["wo"].to(dtype).T)[0].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["attn_local_only", "attn_mem_nogate_zero", "attn_mem_gate_init_zero", "attn_mem_masked_zero", "attn_mem_nogate_continual", "attn_mem_gate_closed_zero"])
def test_official_attention(name, dtype):
    kw = dict(reading="official_code", dtype=dtype)
    if name == "attn_local_only": kw["seen"] = slice(0, 0)
    if f"{name}.gate" in A: kw["gate"] = A[f"{name}.gate"]
    if f"{name}.seen" in A: kw["seen"] = A[f"{name}.seen"].nonzero()[:, 0]
    if name.endswith("continual"): kw["position"] = "continual"
    torch.testing.assert_close(attended(**kw), A[f"{name}.dense64"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reading", ["paper_one_softmax", "paper_per_chunk"])
@pytest.mark.parametrize("gate", ["g0", "gmixed", "g1"])
def test_equations_2_to_5(reading, gate):
    g = {"g0": torch.zeros(4), "gmixed": A["eq2_5.gate_mixed"], "g1": torch.ones(4)}[gate]
    got = attended(g, reading=reading, lengths=[4, 4], dtype=torch.float64)
    torch.testing.assert_close(got, A[f"eq2_5.{reading}_{gate}"], rtol=0, atol=1e-5)
    if gate == "g0": torch.testing.assert_close(got, A["eq2_5.local_only"], rtol=0, atol=1e-5)


class Ids:
    "Texts are ids joined by spaces."
    def decode(self, ids, **kw): return " ".join(map(str, ids))


PROJ = np.random.RandomState(5).randn(64, 16).astype(np.float32)


def bag(texts):
    "The retriever of the golden runs: normalised sums of random vectors."
    return np.stack([sum(PROJ[int(w)] for w in t.split()) for t in texts])


def official(config):
    "The golden model with its memory, as the official code runs it."
    from transformers import LlamaConfig, LlamaForCausalLM
    from lcnb.memlong.model import MemLong, official_code
    c = SimpleNamespace(**config)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.ffn, num_hidden_layers=c.layers, num_attention_heads=c.heads,
                                        rms_norm_eps=c.rms_eps, rope_parameters=dict(rope_type="default", rope_theta=float(c.rope_base)), max_position_embeddings=64, tie_word_embeddings=False)).eval()
    missing, unexpected = base.load_state_dict({k: v for k, v in W.items() if k.startswith(("model.", "lm_head."))}, strict=False)
    assert not missing and not unexpected
    return MemLong(base, bag, Ids(), c.mem_layer, tuple(c.ret_attn_layers), c.chunk_tokens, c.top_k, c.memory_size_tokens, memory_dtype=torch.float32, **official_code(carry=True))


@pytest.mark.parametrize("name", sorted(CASES))
def test_whole_model(name):
    case = CASES[name]
    ml = official(case["config"])
    tau, last = case["config"]["chunk_tokens"], case["config"]["last_context_length"]
    calls = sorted(k for k in W if k.startswith(f"{name}.input_ids"))
    for i, key in enumerate(calls):
        ids = W[key]
        pieces = [*ids[:-last].split(tau), ids[-last:]]                      # the official code returns the logits of each piece of the prefix too
        with torch.no_grad(): got = torch.cat([ml(p[None]).logits[0] for p in pieces])
        torch.testing.assert_close(got.double(), W[f"{name}.own_logits64_{i}"], rtol=0, atol=1e-4)
    assert ml.banks[0].texts == case["texts"]


def test_prefix_in_one_call_is_piece_by_piece():
    "Nothing above the memory layer matters for what is stored: one call with a prefix gives the last piece's logits."
    case = CASES["e2e_nooverflow"]
    ml = official(case["config"])
    ml.local_len = case["config"]["last_context_length"]
    with torch.no_grad(): got = ml(W["e2e_nooverflow.input_ids_0"][None]).logits[0]
    torch.testing.assert_close(got.double(), W["e2e_nooverflow.own_logits64_0"][-ml.local_len:], rtol=0, atol=1e-4)
    assert ml.banks[0].texts == case["texts"]
