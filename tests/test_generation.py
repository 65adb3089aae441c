"""Generation under plans, caches and families of models; the experiments that use it, and what they refuse."""
import pytest
import torch

from lcnb.foundations.checks import InputError
from lcnb.laboratory import grammar
from lcnb.laboratory.generation import (bleu, continue_greedy, continue_truncated, cost_full, cost_lm_infinite, cost_truncation, eval_generation,
                                        eval_milestone_ppl, rouge_l)
from lcnb.methods import extend, make_plan
from lcnb.reproduction import registry
from lcnb.reproduction.runner import run_artifact

TOK = grammar.build_tokenizer()
L, N, NEW = 32, 100, 12


def models():
    from transformers import (BloomConfig, BloomForCausalLM, GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MptConfig,
                              MptForCausalLM)
    V, torch_seed = len(TOK), torch.manual_seed
    small = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with torch.random.fork_rng(devices=[]):
        torch_seed(0)
        return {"llama": LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2)), "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**small)),
                "gptj": GPTJForCausalLM(GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=512)),
                "mpt": MptForCausalLM(MptConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=L)),
                "bloom": BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4))}


MODELS = {k: m.eval() for k, m in models().items()}
TEXTS = torch.randint(3, len(TOK), (3, N + NEW), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", ["rope", "lm_infinite", "window", "dca", "lm_infinite_topk"])
def test_written_as_without_a_cache(family, method):
    "Every family, under plans, with the model's cache and with one that forgets, writes what passes over the whole text write."
    model, prompts = MODELS[family], TEXTS[:, :N]
    plan = make_plan(method, L, N + NEW, strict=False, n_start=3, top_k=2)
    with extend(model, plan) as h, torch.inference_mode():
        slow = prompts
        for _ in range(NEW): slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        caches = [None] + ([h.new_cache] if method in ("lm_infinite", "window") else [])
        for new_cache in caches: assert torch.equal(continue_greedy(model, prompts, NEW, new_cache), slow[:, N:]), new_cache


@pytest.mark.parametrize("family", MODELS)
def test_truncation_stays_within_the_trained_length(family):
    assert continue_truncated(MODELS[family], TEXTS[:, :N], NEW, L, 5).shape == (3, NEW)  # MPT fails beyond its length, so it was never there


@pytest.mark.parametrize("family", MODELS)
def test_milestones_do_not_know_what_follows(family):
    "The loss before a milestone is the same with a longer text behind it."
    with extend(MODELS[family], make_plan("lm_infinite", L, N, n_start=3)):
        short, long = (eval_milestone_ppl(MODELS[family], list(TEXTS), [50, *more], 8)[0]["value"] for more in ([], [90]))
    assert short == pytest.approx(long, rel=1e-4)


def test_any_text_can_be_scored():
    texts = ["", " ", "\n", "ü 世界", "the red boat", "</s>", "a" * 5000]
    for f in (bleu, rouge_l):
        for a in texts:
            for b in texts: assert 0 <= f([a], [b]) <= 100 + 1e-9
    assert 0 <= bleu(texts, texts[::-1], "sentence") <= 100


def test_a_document_without_words_for_rouge():
    rows = eval_generation(MODELS["llama"], TOK, [torch.full((40,), TOK.eos_token_id)] * 2, [20], n_new=8)
    assert [r["value"] for r in rows] == [0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "mpt", "bloom"])
def test_costs_grow_as_they_should(name):
    c = MODELS[name].config
    assert cost_full(c, 10) < cost_full(c, 11) and cost_lm_infinite(c, 10**9, L, 4) == cost_full(c, L + 4)
    assert cost_truncation(c, L, 1) > cost_truncation(c, L, 4) > cost_truncation(c, L, L) > cost_full(c, 1)


@pytest.mark.parametrize("id, params, says", [
    ("table1", dict(width=128), "width=128: must be less than"), ("table1", dict(others=["tiny"]), "others_len="), ("table2", dict(questions="grammar:poems"), "poems"),
    ("table3", dict(n_new=0), "n_new=0"), ("table4", dict(lengths=[512, 1024]), "lengths="), ("table5", dict(ks=[-1]), "top_k=-1"), ("table7", dict(layers=[99]), "layers=99"),
    ("fig6", dict(intervals=[2.0]), "every=")])
def test_experiments_refuse_in_one_sentence(id, params, says, tmp_path, monkeypatch):
    monkeypatch.setenv("LCNB_STATE", str(tmp_path/"state"))
    o = run_artifact(f"lm_infinite/{id}", params=params, out=tmp_path/"out", notebook=False)
    assert o.status != "done" and says in o.message and "\n" not in o.message.strip() and not (tmp_path/"out").exists()


@pytest.mark.parametrize("profile", ["gpu", "paper"])
def test_profiles_name_parameters_that_exist(profile):
    for id in registry.artifacts():
        if id.startswith("lm_infinite/"): registry.resolve(id, registry.profile_params(profile, id))
