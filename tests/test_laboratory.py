"""The laboratory against tokenizers, files and checkpoints that are not ours, and against mistakes."""
import json, math, os, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from lcnb.foundations.checks import InputError
from lcnb.laboratory import grammar
from lcnb.laboratory.corpora import encode, load_corpus, token_windows
from lcnb.laboratory.models import load_model, random_llama
from lcnb.laboratory.protocols import eval_last_ppl, eval_nll_curve, eval_passkey, eval_ppl, forced_hits
from lcnb.laboratory.tasks import FILLERS, generate_answers, passkey

ASSETS = os.environ.get("LCNB_ASSETS")
real = pytest.mark.skipif(not ASSETS, reason="LCNB_ASSETS is not set")


def trained_tokenizer(kind):
    "A tokenizer of each kind in use, trained on a few stories."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    texts = [grammar.document(s, 2000) for s in range(4)] + [grammar.PASSKEY_INTRO, grammar.PASSKEY_FILLER, grammar.PASSKEY_STATEMENT] * 20
    special, more = ["<unk>", "<s>", "</s>"], {}
    if kind == "gpt2":        # byte-level BPE, leading spaces, no begin token
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special)
    elif kind == "llama2":    # SentencePiece BPE: a prefix space is invented, byte fallback, no pre-tokenizer
        t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        t.pre_tokenizer = pre_tokenizers.Metaspace()  # while it is trained: no token spans words
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], max_token_length=8)
        more = dict(bos_token="<s>")
    elif kind == "unigram":   # T5-like
        t = Tokenizer(models.Unigram())
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>")
    else:                     # one token a character
        t = Tokenizer(models.WordLevel({c: i for i, c in enumerate(special + sorted(set("".join(texts)) | set("0123456789")))}, unk_token="<unk>"))
        t.pre_tokenizer, t.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
        trainer, more = None, dict(bos_token="<s>")
    if trainer: t.train_from_iterator(texts, trainer)
    if kind == "llama2": t.pre_tokenizer, t.normalizer = pre_tokenizers.Split("\0", "isolated"), normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", eos_token="</s>", **more)


@pytest.fixture(scope="module", params=["gpt2", "llama2", "unigram", "characters", "ours"])
def tokenizer(request): return grammar.build_tokenizer() if request.param == "ours" else trained_tokenizer(request.param)


def test_passkey_has_the_length_asked_for_with_every_tokenizer(tokenizer):
    least = int(str(pytest.raises(InputError, passkey, tokenizer, 5).value).split("at least ")[1].split()[0])
    for length in (least, least + 1, least + 37, 2 * least + 3):
        for depth in (0, .37, 1):
            for filler in FILLERS:
                s = passkey(tokenizer, length, depth, seed=length, filler=filler)
                assert s.input_ids.shape == (length,)
                text = tokenizer.decode(s.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                assert text.count(s.answer) == 2 and text.rstrip().endswith(grammar.PASSKEY_QUESTION)
                statement = tokenizer.decode(s.input_ids[slice(*s.statement_span)], clean_up_tokenization_spaces=False).strip()
                assert statement == grammar.PASSKEY_STATEMENT.format(key=s.answer)
                whole = tokenizer.decode(torch.cat([s.input_ids, s.answer_ids]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
                assert whole.endswith(f"The pass key is {s.answer}")


def test_beginning_of_a_text_is_tokenised_as_the_whole(tokenizer):
    text = grammar.document(3, 3000)
    whole = encode(tokenizer, text)
    for n in (1, 7, 100, 500): assert encode(tokenizer, text, n) == whole[:n]


def test_windows_of_any_tokenizer(tokenizer):
    for w in token_windows(load_corpus("grammar:stories"), tokenizer, 700, 2): assert w.shape == (700,)


def test_tokenising_a_long_book_takes_seconds():
    text = "".join(grammar.document(s, 20_000) + "\n" for s in range(12))
    assert len(text) > 1_000_000
    for tok in (grammar.build_tokenizer(), trained_tokenizer("llama2")):  # the second has no pre-tokenizer: the book is one word to it
        start = time.perf_counter()
        assert len(encode(tok, text)) > 100_000
        assert time.perf_counter() - start < 20


@pytest.fixture(scope="module")
def lm(tmp_path_factory): return load_model(random_llama(tmp_path_factory.mktemp("m") / "m", grammar.build_tokenizer(), pretrained_len=128), device="cpu")


def test_forced_hits_are_what_generate_writes(lm):
    prompts = [passkey(lm.tokenizer, 150, None, s).input_ids for s in range(6)]
    for p in prompts: p[10:90] = torch.randint(3, 400, (80,), generator=torch.Generator().manual_seed(int(p.sum())))
    written = generate_answers(lm.model, lm.tokenizer, prompts, 5)
    assert forced_hits(lm.model, prompts, written) == [True] * 6
    other = [torch.cat([w[:-1], (w[-1:] + 1) % 300]) for w in written]
    assert forced_hits(lm.model, prompts, other) == [False] * 6


def test_rows_are_tidy_and_repeatable(lm):
    docs = token_windows(load_corpus("grammar:stories"), lm.tokenizer, 200, 2)
    more = dict(method="rope", model=lm.name, revision=lm.revision, dataset="grammar:stories", seed=3)
    rows = [r for f, a in [(eval_ppl, dict(lengths=[64], stride=32)), (eval_last_ppl, dict(lengths=[64, 128], n_last=16)), (eval_nll_curve, dict(bin_size=64))]
            for r in f(lm.model, docs, columns=more, **a)] + eval_passkey(lm.model, lm.tokenizer, [128], 2, 2, seed=3, columns=more)
    for r in rows:
        assert {"method", "model", "revision", "dataset", "seed", "length", "metric", "value", "n"} <= set(r)
        assert isinstance(r["value"], float) and isinstance(r["n"], int) and r["seed"] == 3
    json.dumps(rows)
    assert rows[:1] == eval_ppl(lm.model, docs, [64], stride=32, columns=more)


def test_protocols_leave_the_model_as_it_was(lm):
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    docs = token_windows(load_corpus("grammar:stories"), lm.tokenizer, 100, 2)
    eval_ppl(lm.model, docs, [64], stride=32)
    with pytest.raises(InputError, match="is this its tokenizer"): eval_ppl(lm.model, [torch.full((100,), 10**6)], [64], stride=32)
    assert not lm.model.model._forward_hooks and all(torch.equal(before[k], v) for k, v in lm.model.state_dict().items())


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", b'{"text": "a"', "line 1 is not JSON"), ("b.jsonl", b"[1]\n", "line 1 is not a JSON object"), ("c.jsonl", b"", "is empty"),
    ("d.jsonl", b'{"text": 5}', "holds int, not text"), ("e.parquet", b"no parquet", "not a parquet file"), ("f.jsonl.zst", b"no zst", "not a zstandard file"),
    ("g.txt", b"\xff\xfe\x00", "not UTF-8"), ("h.txt", b"  \n", "is empty"), ("i.csv", b"text\n", "unknown suffix"), ("j.jsonl", b'\xff{"text": 1}', "line 1 is not JSON"),
    ("k.jsonl", b'{"body": "x"}', "no text column .* it has body")])
def test_a_broken_file_is_one_sentence(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as e: load_corpus(f"file:{tmp_path / name}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("spec", ["", "file:", "hub:", "file:/no/such", "grammar:", "stories", "hub:a:b:c:d", None, 3])
def test_a_wrong_spec_is_one_sentence(spec):
    with pytest.raises(InputError) as e: load_corpus(spec)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("spec", ["", "tiny2/", "/no/such", "./no", "~/no", "no/such/model", None, 3])
def test_a_wrong_model_is_one_sentence(spec, monkeypatch):
    with pytest.raises(InputError) as e: load_model(spec)
    assert "\n" not in str(e.value)


def test_offline_names_are_refused_without_waiting(tmp_path):
    code = ("import time; t = time.time()\nfrom lcnb.laboratory.corpora import load_corpus\nfrom lcnb.laboratory.models import load_model\n"
            "for f, x in ((load_model, 'nobody/nothing'), (load_corpus, 'hub:nobody/nothing')):\n    try: f(x)\n    except ValueError as e: print(type(e).__name__, e)")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert out.stdout.count("InputError") == 2 and out.stdout.count("\n") == 2, out.stdout + out.stderr


def test_importing_the_laboratory_loads_nothing_heavy():
    code = "import sys, lcnb.laboratory.protocols, lcnb.laboratory.plots, lcnb.laboratory.models, lcnb.laboratory.corpora; print([m for m in ('transformers', 'datasets', 'matplotlib', 'pyarrow', 'zstandard', 'seaborn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@real
def test_a_real_book_and_a_real_checkpoint():
    "The table of the assets: flat to the trained length, then an explosion."
    lm = load_model(f"{ASSETS}/models/babyllama105", device="cpu")
    assert lm.pretrained_len == 256
    corpus = load_corpus(f"file:{ASSETS}/data/gutenberg_books/train.parquet")
    start = time.perf_counter()
    docs = token_windows(corpus, lm.tokenizer, 1024, 12)
    ppl = {r["length"]: r["value"] for r in eval_last_ppl(lm.model, docs, [128, 256, 512, 1024], bos_id=lm.bos_id)}
    assert time.perf_counter() - start < 40
    assert 4 < ppl[256] < 12 and abs(ppl[256]/ppl[128] - 1) < .1 and ppl[512] > 4*ppl[256] and ppl[1024] > 6*ppl[256], ppl


@real
def test_a_folder_reads_its_data_and_not_its_licences():
    ids = [d.id for d in load_corpus(f"file:{ASSETS}/data/pg19")]
    assert len(ids) == 18 and ids[0] == "train.parquet:0" and ids[-1] == "validation.parquet:16"
    assert len(list(load_corpus(f"file:{ASSETS}/data/pg19", "validation"))) == 17


@real
def test_a_data_set_of_the_hub_by_its_schema():
    corpus = load_corpus(f"hub:{ASSETS}/data/pg19::validation")
    assert next(iter(corpus)).text == next(iter(load_corpus(f"file:{ASSETS}/data/pg19", "validation"))).text and len(corpus.revision) == 12
