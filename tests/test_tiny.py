"""The tiny model behaves as its card says (orders, with few samples), and its training survives mistakes and kills."""
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from lcnb.foundations.checks import InputError
from lcnb.laboratory import grammar, tiny_lm
from lcnb.laboratory.corpora import load_corpus, token_windows
from lcnb.foundations.files import data_dir
from lcnb.laboratory.models import load_model
from lcnb.laboratory.protocols import eval_last_ppl, eval_passkey
from lcnb.methods import extend, make_plan

FOLDER = data_dir()/"models"/"tiny-llama"
START = dict(n_start=4)


@pytest.fixture(scope="module")
def tiny(): return load_model("tiny")


@pytest.fixture(scope="module")
def stories(tiny): return token_windows(load_corpus("grammar:stories"), tiny.tokenizer, 8*tiny.pretrained_len, 8)


@pytest.fixture(scope="module")
def ppl(tiny, stories):
    "Perplexity of the same last tokens under a method, at so many times the trained length; each is measured once."
    known = {}
    def measure(name, times, **options):
        n = times*tiny.pretrained_len
        if (name, times) not in known:
            with extend(tiny.model, make_plan(name, tiny.pretrained_len, n, **options)):
                known[name, times] = eval_last_ppl(tiny.model, stories, [n], n_last=tiny.pretrained_len//2, bos_id=tiny.bos_id)[0]["value"]
        return known[name, times]
    return measure


def keys(tiny, name, times, filler, n_depths=8, n_samples=1, **options):
    "Passkey accuracy by depth."
    n = int(times*tiny.pretrained_len)
    with extend(tiny.model, make_plan(name, tiny.pretrained_len, n, **options)):
        rows = eval_passkey(tiny.model, tiny.tokenizer, [n], n_depths, n_samples, seed=5, filler=filler)
    return {r["depth"]: r["value"] for r in rows}


def mean(accuracy): return sum(accuracy.values())/len(accuracy)


# ---- the folder

def test_folder_is_stock_and_small(tiny):
    assert sum(p.numel() for p in tiny.model.parameters()) <= 4_000_000
    assert (FOLDER/"model.safetensors").stat().st_size < 5_000_000
    assert tiny.pretrained_len == tiny_lm.CONTEXT and type(tiny.model).__name__ == "LlamaForCausalLM"
    assert tiny.tokenizer.bos_token_id == tiny.model.config.bos_token_id == 1 and len(tiny.tokenizer) == tiny.model.config.vocab_size
    assert not [f.name for f in FOLDER.iterdir() if f.suffix in (".py", ".bin", ".pt", ".pkl")]
    ours, saved = grammar.build_tokenizer(), tiny.tokenizer
    for text in (grammar.document(9, 200), "any text: Ünïcode\n\t🙂 <s> 12345678"):
        assert ours(text).input_ids == saved(text).input_ids and saved.decode(saved(text).input_ids[1:]) == text


# ---- beyond the trained length

def test_plain_rope_explodes(ppl):
    assert ppl("rope", 2) > 1.2*ppl("rope", 1)
    assert ppl("rope", 8) > 5*ppl("rope", 1)

def test_lm_infinite_does_not(ppl):
    assert ppl("lm_infinite", 8, **START) < 1.15*ppl("lm_infinite", 1, **START)

def test_the_plain_window_fails_and_intra_chunk_attention_stays_flat(ppl):
    assert ppl("window", 8) > 1.08*ppl("lm_infinite", 8, **START)       # the start of the text is missed
    assert ppl("dca_intra", 8) < 1.15*ppl("dca_intra", 2)

def test_half_of_lm_infinite_is_worse_than_the_whole(ppl):
    for half in ("lambda_only", "ceiling_only"): assert ppl(half, 8, **START) > 1.08*ppl("lm_infinite", 8, **START)

def test_dca_keeps_perplexity(ppl):
    assert ppl("dca", 4) < 1.15*ppl("dca", 1)


# ---- keys

@pytest.mark.parametrize("filler", ["paper", "stories"])
def test_keys_inside_the_trained_length_at_any_depth(tiny, filler):
    for times in (.25, .5, .75, 1):
        assert mean(keys(tiny, "rope", times, filler, n_depths=20, n_samples=2)) >= .99, times

@pytest.mark.parametrize("filler", ["paper", "stories"])
def test_dca_finds_keys_at_four_times_the_length_and_a_chunk_alone_does_not(tiny, filler):
    assert mean(keys(tiny, "dca", 4, filler, n_depths=16)) >= .8
    assert mean(keys(tiny, "dca_intra", 4, filler)) <= .3

def test_lm_infinite_loses_keys_outside_its_window_and_top_k_finds_them(tiny):
    far = {d: hit for d, hit in keys(tiny, "lm_infinite", 4, "paper", n_depths=16, **START).items() if d < .7}
    assert len(far) >= 10 and mean(far) <= .1
    assert mean(keys(tiny, "lm_infinite_topk", 4, "paper", n_depths=10, **START)) >= .95


# ---- training

def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys):
    assert tiny_lm.main(["--seed", "-1", "--out", str(tmp_path/"m")]) == 2
    assert tiny_lm.main(["--tokens", "0", "--out", str(tmp_path/"m")]) == 2
    (tmp_path/"file").write_text("")
    assert tiny_lm.main(["--out", str(tmp_path/"file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3 and [f.name for f in tmp_path.iterdir()] == ["file"]

def test_a_killed_training_leaves_no_model(tmp_path):
    run = subprocess.Popen([sys.executable, "-m", "lcnb.laboratory.tiny_lm", "--tokens", "0.5", "--out", str(tmp_path/"m")],
                           stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    time.sleep(6)
    assert run.poll() is None
    run.send_signal(signal.SIGKILL), run.wait()
    assert not (tmp_path/"m").exists()

def test_saving_replaces_the_model_and_keeps_what_else_lies_there(tmp_path, tiny):
    (tmp_path/"m").mkdir(), (tmp_path/"m"/"README.md").write_text("card"), (tmp_path/"m"/"config.json").write_text("old")
    tiny_lm.save(tiny.model, [dict(tokens=1, loss=2.)], tmp_path/"m")
    assert (tmp_path/"m"/"README.md").read_text() == "card" and load_model(str(tmp_path/"m")).pretrained_len == tiny.pretrained_len
    assert [f.name for f in tmp_path.iterdir()] == ["m"]

def test_a_story_refuses_what_it_cannot_tell():
    for bad in (dict(seed=-1, n_words=10), dict(seed=0, n_words=0), dict(seed=0, n_words=10, n_cast=25), dict(seed=0, n_words=10, n_cast=1)):
        with pytest.raises(InputError): grammar.document(**bad)
