"""The plans against the authors' own code: logits of extended tiny models, prefill and decode."""
import functools

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN, golden_cases, golden_model
from lcnb.methods import dca_preset, extend, lm_infinite, self_extend

ATOL = 1e-4       # both sides are float32; the official side differs from float64 by up to 5e-5 (manifests)
ATOL_RAW = 6e-2   # "released_raw" cases: the released merge rounds its weights to bfloat16, which ours does not copy

model_of = functools.cache(golden_model)


def dca_plan(case):
    "The plan that a DCA case's `call` stands for, in our preset's words."
    c = case["chunk_size"]*4//3
    plan = dca_preset("official_code", c, case["local_window"], case["mscale_coef"] if case["mscale_active"] else 0., case["config_max_position_embeddings_at_run"])
    assert plan.params["chunk_size"] == case["chunk_len_s"] and plan.params["pretrained_len"] == case["c_paper"]
    return plan


def check(method, case, plan, atol):
    "Every stored row of every stored length, prefill and decode."
    data = load_file(GOLDEN / method / case["file"])
    model, n = model_of(case["model"]), 0
    with torch.no_grad():
        for key in sorted(k for k in data if k.startswith("ids_")):
            L = key.split("_")[1]
            with extend(model, plan, check=False): got = model(data[key].long().view(1, -1)).logits[0]
            torch.testing.assert_close(got[data[f"rows_{L}"].long()], data[f"logits_{L}"].float(), rtol=0, atol=atol)
            n += 1
        for key in sorted(k for k in data if k.startswith("dec_ids_")):
            P, L = map(int, key.split("_")[2:])
            ids, cache, out = data[key].long().view(1, -1), None, []
            with extend(model, plan, check=False):
                for a, z in [(0, P), *((i, i+1) for i in range(P, L))]:
                    r = model(ids[:, a:z], past_key_values=cache, use_cache=True); cache = r.past_key_values
                    out.append(r.logits[0, -1])
            torch.testing.assert_close(torch.stack(out), data[f"dec_logits_{P}_{L}"].float(), rtol=0, atol=atol)
            n += 1
    assert n >= 6
    return model


@pytest.mark.parametrize("name, case", golden_cases("dca"))
def test_dca(name, case):
    model = check("dca", case, dca_plan(case), ATOL_RAW if "released_raw" in name else ATOL)
    tokens = next((v for k, v in case.items() if k.startswith("greedy_generate_from_ids_96")), None)
    if tokens and "released_raw" not in name:
        ids = load_file(GOLDEN / "dca" / case["file"])["ids_96"].long().view(1, -1)
        with extend(model, dca_plan(case)): new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(tokens), min_new_tokens=len(tokens), eos_token_id=None)
        assert new[0, 96:].tolist() == tokens


@pytest.mark.parametrize("name, case", golden_cases("lm_infinite"))
def test_lm_infinite(name, case):
    assert case["limit_distance"] == case["local_branch"]
    top = {} if not case["top_k"] else dict(top_k=case["top_k"], top_k_from_layer=case["top_k_from_layer"], top_k_distance=case["top_k_insert_at"], top_k_rule="official_code")
    check("lm_infinite", case, lm_infinite(case["local_branch"], case["global_branch"], **top), ATOL)


@pytest.mark.parametrize("name, case", golden_cases("selfextend"))
def test_self_extend(name, case):
    base = None if case["scale_base"] < 0 else case["scale_base"]
    check("selfextend", case, self_extend(case["neighbor_window"], case["group_size"], base), 2e-4)   # the manifest's tolerance


def test_a_wrong_matrix_is_noticed():
    "The test can fail: one token more in the chunk, one more in the window."
    cases = dict(golden_cases("dca")), dict(golden_cases("lm_infinite"))
    with pytest.raises(AssertionError): check("dca", cases[0]["default_c64_mha"], dca_preset("official_code", 64, 9), 1.)
    with pytest.raises(AssertionError): check("lm_infinite", cases[1]["local32_global4_mha"], lm_infinite(33, 4), .1)
