"""MemLong's training: what is frozen, what comes back, what a user may get wrong; the stored tiny models belong to the stored base model."""
import json

import pytest
import torch

from lcnb.foundations.checks import InputError
from lcnb.laboratory.models import load_model, random_llama
from lcnb.memlong.model import MemLong
from lcnb.memlong.recall import eval_recall, random_retriever, recall_batch
from lcnb.laboratory.finetune import trained_parameters
from lcnb.memlong.training import LAYER_CHOICES, RecallTexts, add_adapters, layer_choice, load_memlong, save_memlong, train_memlong


@pytest.fixture(scope="module")
def held_out():
    return recall_batch(load_model("tiny").tokenizer, range(12), split="held_out")[:2]


def small(tmp_path, heads_kv=True):
    lm = load_model(str(random_llama(tmp_path/"llama", load_model("tiny").tokenizer, pretrained_len=256)))
    return lm, MemLong(lm.model, random_retriever(), lm.tokenizer, 0, (0, 1), chunk_size=16, top_k=2, capacity=256, local_len=128)


@pytest.mark.parametrize("choice", LAYER_CHOICES)
def test_stored_models_recall_what_no_window_holds(choice, held_out):
    ml = load_memlong(f"tiny:{choice}")
    with_memory = eval_recall(ml, *held_out)[0]["value"]
    without = eval_recall(ml.model, *held_out, local_len=128)[0]["value"]
    ml.embed = random_retriever()
    assert with_memory + 2 < min(without, eval_recall(ml, *held_out)[0]["value"])


def test_gates_and_adapters_learn_with_grouped_queries(tmp_path):
    lm, ml = small(tmp_path)
    add_adapters(ml, (1,), r=2)
    before = {n: p.detach().clone() for n, p in ml.named_parameters()}
    train_memlong(ml, RecallTexts(lm.tokenizer, 16, n_chunks=8, n_facts=2, n_questions=2), tmp_path/"run", 4, 4, lr=1e-2, warmup=1, every=2)
    moved = {n for n, p in ml.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained_parameters(ml)) and "gates" in moved


@pytest.mark.parametrize("bits", [dict(bf16=True), dict(gradient_accumulation_steps=2)])
def test_trainer_options_reach_the_trainer(tmp_path, bits):
    lm, ml = small(tmp_path)
    add_adapters(ml, (1,), r=2)
    log = train_memlong(ml, RecallTexts(lm.tokenizer, 16, n_chunks=4, n_facts=2, n_questions=2), tmp_path/"run", 2, 2, every=1, **bits)
    assert len(log) == 2 and all(0 < r["loss"] < 20 for r in log)


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    lm, ml = small(tmp_path)
    add_adapters(ml, (1,), r=2)
    data = RecallTexts(lm.tokenizer, 16, n_chunks=4, n_facts=2, n_questions=2)
    train_memlong(ml, data, tmp_path/"run", 2, 2, every=1, save_every=1)
    lm2, other = small(tmp_path/"b")
    add_adapters(other, (0, 1), r=2)
    with pytest.raises(InputError, match="resume"):
        train_memlong(other, data, tmp_path/"run", 4, 2, every=1, resume=True)


def test_bad_input(tmp_path):
    lm, ml = small(tmp_path)
    with pytest.raises(InputError, match="adapters"):
        save_memlong(ml, tmp_path/"x")
    assert not (tmp_path/"x").exists()
    with pytest.raises(InputError, match="save_memlong"):
        load_memlong(tmp_path/"nothing")
    with pytest.raises(InputError, match="one of ra_ta"):
        layer_choice("best", 4)
    add_adapters(ml, (1,), r=2)
    with pytest.raises(InputError, match="steps"):
        train_memlong(ml, RecallTexts(lm.tokenizer, 4), tmp_path/"run", 0)
    with pytest.raises(InputError, match="can be trained"):
        train_memlong(load_memlong("tiny"), RecallTexts(lm.tokenizer, 4), tmp_path/"run", 1)


def test_a_folder_that_names_another_base_is_refused(tmp_path):
    from lcnb.foundations.files import data_dir
    import shutil
    shutil.copytree(data_dir()/"models"/"tiny-memlong"/"rlp_th", tmp_path/"copy")
    about = json.loads((tmp_path/"copy"/"memlong.json").read_text())
    (tmp_path/"copy"/"memlong.json").write_text(json.dumps(about | dict(revision="0"*12)))
    with pytest.raises(InputError, match="train again"):
        load_memlong(tmp_path/"copy")


def test_going_on_with_a_stored_model(tmp_path):
    ml = load_memlong("tiny", trainable=True)
    assert {n.split("layers.")[1][0] for n in trained_parameters(ml) if "layers." in n} == {"2", "3"} and "gates" in trained_parameters(ml)
    log = train_memlong(ml, RecallTexts(ml.tokenizer, 8), tmp_path/"run", 1, 4, every=1)
    assert log[0]["recall"] < 4
