"""Every method on every family of models: prefill equals decoding, a padded text is what it is alone, undo restores. Prints the table."""
import pytest
import torch
import transformers

from lcnb.foundations.checks import InputError
from lcnb.methods import METHODS, extend, make_plan

FAMILIES = {  # what a family has beyond the common sizes
    "Llama": dict(num_key_value_heads=2), "Mistral": dict(num_key_value_heads=2, sliding_window=None), "Qwen2": dict(num_key_value_heads=2), "Qwen3": dict(num_key_value_heads=2, head_dim=32),
    "Gemma": dict(head_dim=16, num_key_value_heads=1), "Cohere": dict(num_key_value_heads=2), "GPTNeoX": {}, "Phi": {}, "GPTJ": dict(rotary_dim=8, max_position_embeddings=256), "Mpt": dict(max_seq_len=256), "Bloom": {}}
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATOL = 1e-4           # float32 logits of order 1 through two layers, in another order of summation
N, SHORT = 90, 60


def build(family):
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])).eval()


def serve(model, plan, ids):
    "What happened: ok, refused, or the assertion."
    with torch.no_grad():
        try: handle = extend(model, plan)
        except InputError: return "refused"
        with handle:
            whole = model(ids).logits
            cache, steps = None, []
            for a, z in ((0, N-3), (N-3, N-2), (N-2, N-1), (N-1, N)):
                r = model(ids[:, a:z], past_key_values=cache, use_cache=True); cache = r.past_key_values; steps.append(r.logits)
            if not (plan.scaling and plan.scaling.follows_length) and not plan.temperature and not any(b.only_last for b in plan.branches):
                torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=ATOL)
            x, mask = ids.clone(), torch.ones_like(ids)
            x[1, :N-SHORT], mask[1, :N-SHORT] = 0, 0
            x[1, N-SHORT:] = ids[1, :SHORT]
            torch.testing.assert_close(model(x, attention_mask=mask).logits[1, N-SHORT:], model(ids[1:, :SHORT]).logits[0], rtol=0, atol=ATOL)
        assert whole.isfinite().all()
    return "ok"


@pytest.fixture(scope="module")
def table(): return {}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, table):
    model, ids = build(family), torch.randint(3, 97, (2, N), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): before = model(ids).logits
    for name in METHODS: table[family, name] = serve(model, make_plan(name, 32, N, strict=False, n_start=4), ids)
    with torch.no_grad(): assert torch.equal(model(ids).logits, before)
    frequency = {m for m in METHODS if make_plan(m, 32, N, strict=False).scaling}
    refused = {m for m in METHODS if table[family, m] == "refused"}
    assert refused == (frequency if family in ("Mpt", "Bloom") else set())          # ALiBi has no rotary frequencies to change


def test_table(table, capsys):
    if not table: pytest.skip("no family has been tested")
    families = list(dict.fromkeys(f for f, _ in table))
    with capsys.disabled():
        print("\n" + " "*18 + "  ".join(families))
        for m in METHODS: print(f"{m:18}" + "  ".join(f"{table[f, m]:{len(f)}}" for f in families))
