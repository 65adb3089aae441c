"""The pair of tiny encoders is stock, small and as good as its cards say; its training is deterministic and survives mistakes."""
import json, warnings

import pytest, torch

from lcnb.foundations.checks import InputError
from lcnb.laboratory import grammar
from lcnb.foundations.files import data_dir
from lcnb.longembed import facts, tiny_encoder as te

KINDS = te.KINDS
FOLDERS = {kind: data_dir()/"models"/f"tiny-encoder-{kind}" for kind in KINDS}
TEXTS = ["", " ", "Mira", "Mira lives in Pellan.", "any text: Ünïcode\n\t🙂 12345678", "The grass is green. "*100]


@pytest.fixture(scope="module")
def pair():
    from transformers import AutoModel
    return {kind: AutoModel.from_pretrained(folder, local_files_only=True) for kind, folder in FOLDERS.items()}


# ---- the folders

@pytest.mark.parametrize("kind", KINDS)
def test_folder_is_stock_and_small(kind, pair):
    files = [f for f in FOLDERS[kind].rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 3_000_000 and not [f for f in files if f.suffix in (".py", ".bin", ".pt", ".pkl")]
    model = pair[kind]
    assert type(model).__name__ == dict(ape="BertModel", rope="JinaEmbeddingsV3Model")[kind] and model.dtype == torch.float32
    assert model.config.max_position_embeddings == te.WINDOW and all(p.isfinite().all() for p in model.parameters())
    assert "auto_map" not in json.loads((FOLDERS[kind]/"config.json").read_text())

@pytest.mark.parametrize("kind", KINDS)
def test_both_stock_loaders_give_our_vectors_without_a_warning(kind, pair):
    from sentence_transformers import SentenceTransformer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = SentenceTransformer(str(FOLDERS[kind]), device="cpu", local_files_only=True)
        vectors = torch.tensor(model.encode(TEXTS))
    assert model.max_seq_length == te.WINDOW and vectors.shape == (len(TEXTS), 128)
    torch.testing.assert_close(vectors, te.encode(pair[kind], TEXTS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))

@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_ours(kind):
    from transformers import AutoTokenizer
    saved, ours, llama = AutoTokenizer.from_pretrained(FOLDERS[kind]), te.encoder_tokenizer(), grammar.build_tokenizer()
    for text in TEXTS:
        ids = saved(text).input_ids
        assert ids == ours(text).input_ids and ids[0] == 1 and ids[-1] == 2 and saved.decode(ids[1:-1]) == text
    assert saved.padding_side == "right" and all(ours.get_vocab()[t] == i for t, i in llama.get_vocab().items())


# ---- what the card says

@pytest.mark.parametrize("kind", KINDS)
def test_held_out_figures_are_those_of_the_card(kind, pair):
    logged, now = te.read_csv(FOLDERS[kind]/"training_log.csv")[-1], te.figures(pair[kind], te.WINDOW)
    assert now["passkey"] >= .9 and now["needle"] >= .7 and now["story"] >= .4
    if kind == "rope": assert now["binding"] >= .9
    assert all(abs(now[task] - float(logged[task])) <= .03 for task in te.TASKS), (now, logged)

@pytest.mark.parametrize("kind", KINDS)
def test_the_card_is_what_its_files_give(kind, tmp_path):
    text = (FOLDERS[kind]/"README.md").read_text()
    for f in FOLDERS[kind].iterdir():
        if f.suffix in (".csv", ".json"): (tmp_path/f.name).write_bytes(f.read_bytes())
    assert te.write_card(tmp_path).read_text() == text

def test_the_pair_is_alike_within_the_window():
    last = {kind: te.read_csv(FOLDERS[kind]/"training_log.csv")[-1] for kind in KINDS}
    assert all(abs(float(last["ape"][t]) - float(last["rope"][t])) <= .2 for t in ("passkey", "needle", "story"))


# ---- held out means held out

def test_no_training_text_names_a_held_out_person_or_thing():
    t, kept = te.Texts(11), facts.people()
    for done in (.1, .9):
        for _ in range(8):
            texts = " ".join(sum(te.batch(t, done, 2048), []))
            assert not [p for p in kept if p in texts]
    drawn = [te.hunts(t, 0, 30)[1] for _ in range(3)]
    assert not [f"the {a} {o} " for a, o in facts.things() for docs in drawn if f"the {a} {o} " in " ".join(docs)]


# ---- training

def test_the_first_steps_are_deterministic():
    run = lambda seed: te.train("ape", seed, tokens=15_000)[0].state_dict()  # the other twin: in the notebook
    first, again = run(5), run(5)
    assert all(torch.equal(first[k], again[k]) for k in first)

def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys):
    (tmp_path/"file").write_text("")
    for args in (["--seed", "-1"], ["--tokens", "0"], ["--kind", "alibi"], ["--threads", "0"]):
        assert te.main([*args, "--out", str(tmp_path/"m")]) == 2
    assert te.main(["--out", str(tmp_path/"file")]) == 2 and te.main(["--card", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 6 and [f.name for f in tmp_path.iterdir()] == ["file"]

def test_saving_replaces_the_model_and_keeps_what_else_lies_there(tmp_path, pair):
    (tmp_path/"m").mkdir(), (tmp_path/"m"/"README.md").write_text("card"), (tmp_path/"m"/"config.json").write_text("old")
    te.save(pair["ape"], {"training_log.csv": [dict(tokens=1)]}, tmp_path/"m")
    assert (tmp_path/"m"/"README.md").read_text() == "card" and te.kind_of(tmp_path/"m") == "ape"
    assert [f.name for f in tmp_path.iterdir()] == ["m"]

def test_facts_refuse_what_they_cannot_tell():
    for call in (lambda: facts.people("test"), lambda: facts.needles(n=1), lambda: facts.needles(n=121), lambda: facts.needles("test"),
                 lambda: facts.swaps(n=0), lambda: facts.stories(0, 90), lambda: facts.stories(2, 90, form="poem"), lambda: facts.stories(3, 3)):
        with pytest.raises(InputError): call()
