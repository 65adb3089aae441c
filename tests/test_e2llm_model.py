"""E2LLM around other encoders and decoders, trained from a file of records, and what a user may get wrong."""
import json

import pytest
import torch
from torch.testing import assert_close

from lcnb.e2llm.data import load_records
from lcnb.e2llm.model import Adapter, E2LLM, TINY_PROMPTS, load_e2llm
from lcnb.e2llm.training import e2llm_loss, eval_quiz, quiz_records, train_e2llm
from lcnb.foundations.checks import InputError
from lcnb.laboratory.finetune import trained_parameters
from lcnb.foundations.files import data_dir
from lcnb.laboratory.models import load_model, random_llama
from lcnb.longembed.encoders import random_encoder

TEXTS = ["Mira met Otto near the well. Otto was glad. " * k for k in (1, 6, 3)]
ASKED, TOLD = ["What does Mira keep?", "Where does Otto live?", "What?"], ["goat", "Velmora", "nothing"]


def neox(folder, tokenizer):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    config = GPTNeoXConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
    GPTNeoXForCausalLM(config).save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def qwen(folder, tokenizer):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    Qwen3ForCausalLM(config).save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("make", [random_llama, neox, qwen])
def test_any_decoder_and_encoder_and_a_batch_is_its_rows(make, pooling, tmp_path):
    folder = make(tmp_path/"decoder", load_model("tiny").tokenizer, **({"pretrained_len": 256} if make is random_llama else {}))
    ml = E2LLM(random_encoder("bert"), str(folder), chunk_size=60, pooling=pooling, prompts=TINY_PROMPTS, encoder_rank=2, decoder_rank=2)
    with torch.no_grad():
        for p in trained_parameters(ml).values():
            p.add_(.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    many = ml(TEXTS, ASKED, TOLD)
    for i in range(3):
        one = ml(TEXTS[i:i+1], ASKED[i:i+1], TOLD[i:i+1])
        assert_close(many.nll[i][many.scored[i]], one.nll[0][one.scored[0]], rtol=1e-4, atol=2e-5)
    assert ml.generate(TEXTS, ASKED, 4) == [ml.generate([t], [q], 4)[0] for t, q in zip(TEXTS, ASKED)]
    ml.train()
    ml(TEXTS, ASKED, TOLD).loss.backward()
    assert all(p.grad is not None for p in trained_parameters(ml).values()) and not any(p.grad is not None for p in ml.parameters() if not p.requires_grad)


def test_bfloat16_decoder(tmp_path):
    folder = random_llama(tmp_path/"decoder", load_model("tiny").tokenizer, pretrained_len=256)
    full, half = (E2LLM(random_encoder("bert"), load_model(str(folder), dtype=d), chunk_size=60, prompts=TINY_PROMPTS) for d in ("float32", "bfloat16"))
    assert_close(half(TEXTS, ASKED, TOLD).loss, full(TEXTS, ASKED, TOLD).loss, rtol=2e-2, atol=2e-2)
    assert len(half.generate(TEXTS, ASKED, 2)) == 3


def test_rank_zero_is_frozen(tmp_path):
    ml = E2LLM("tiny-rope", "tiny", chunk_size=100, prompts=TINY_PROMPTS, encoder_rank=0, decoder_rank=0)
    assert {n.split(".")[0] for n in trained_parameters(ml)} == {"adapter"}
    ml.save_pretrained(tmp_path/"saved", "tiny-rope", "tiny")
    assert sorted(p.name for p in (tmp_path/"saved").iterdir()) == ["adapter.safetensors", "e2llm.json"]
    with torch.no_grad():
        assert torch.equal(load_e2llm(tmp_path/"saved")(TEXTS, ASKED, TOLD).logits, ml(TEXTS, ASKED, TOLD).logits)


def test_records_of_a_file_train_it_and_a_broken_line_is_named(tmp_path):
    file = tmp_path/"records.jsonl"
    rows = [{k: r[k] for k in ("context", "prompt", "answer")} for r in quiz_records(20, 6, "train")]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    records = load_records(f"jsonl:{file}")
    ml = E2LLM("tiny-rope", "tiny", chunk_size=100, reading="line_first", prompts=TINY_PROMPTS, eos=False)
    log = train_e2llm(ml, records, tmp_path/"run", 2, 4, warmup=1, every=1)
    assert [r["step"] for r in log] == [1, 2] and {"reasoning", "understanding"} <= set(log[0])
    file.write_text(file.read_text() + '{"context": "x"}\n')
    with pytest.raises(InputError, match="line 21"):
        load_records(f"jsonl:{file}")


def test_all_windows_restate_everything_once():
    ml = E2LLM("tiny-rope", "tiny", chunk_size=100, overlap=.3, reading="line_first", prompts=TINY_PROMPTS, eos=False)
    seen, record = [], quiz_records(1, 8)[0]
    whole, assemble = record["context"], ml.assemble
    ml.__dict__["assemble"] = lambda rows: seen.extend(r.answer for r in rows if r.task == "understanding") or assemble(rows)
    e2llm_loss(ml, [record], m=3, windows=None)
    assert "".join(s.replace(" ", "").replace("\n", "") for s in seen) == whole.replace(" ", "").replace("\n", "")


def test_stored_model_answers_far_above_chance():
    got = eval_quiz(load_e2llm("tiny"), quiz_records(24, 24))
    assert got["accuracy"] > .4 and got["n"] == 24


def test_stored_model_is_small_and_belongs_to_its_bases(tmp_path):
    folder = data_dir()/"models"/"tiny-e2llm"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 3e6
    import shutil
    shutil.copytree(folder, tmp_path/"copy")
    about = json.loads((tmp_path/"copy"/"e2llm.json").read_text())
    about["encoder"]["revision"] = "0"*12
    (tmp_path/"copy"/"e2llm.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="on which this was trained"):
        load_e2llm(tmp_path/"copy")


@pytest.mark.parametrize("bad,match", [(dict(adapter=Adapter(64, 128)), "64 -> 128"), (dict(overlap=1.), "overlap"), (dict(micro_batch=0), "micro_batch"), (dict(encoder_rank=-1), "r=")])
def test_bad_settings(bad, match):
    with pytest.raises(InputError, match=match):
        E2LLM("tiny-rope", "tiny", **dict(chunk_size=100, prompts=TINY_PROMPTS) | bad)


def test_a_chunk_above_the_encoders_limit_is_cut_and_none_is_lost():
    ml = E2LLM("tiny-rope", "tiny", chunk_size=4000, prompts=TINY_PROMPTS)
    context = ml.chunks("Mira met Otto near the well. " * 100)
    assert len(context) > 5 and "".join(context.text[s:e] for s, e in context.spans) == context.text
    assert max(len(ml.encoder.tokenizer(context.text[s:e]).input_ids) for s, e in context.spans) <= ml.encoder.limit
