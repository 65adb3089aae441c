"""Tuned position rows of tiny-ape: they belong to the encoder in the repository, and stale ones are noticed."""
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lcnb.foundations.checks import InputError
from lcnb.longembed import tuning
from lcnb.longembed.encoders import extend_encoder, load_encoder


@pytest.mark.parametrize("method", tuning.STORED)
def test_stored_rows_belong_to_the_encoder(method):
    with safe_open(tuning.stored_file(method), "pt") as f:
        assert f.metadata()["revision"] == load_encoder("tiny-ape").revision, "tiny-ape has been trained anew: python -m lcnb.longembed.tuning"
        assert sorted(f.keys()) == sorted(f"factor{s}" for s in tuning.STORED[method])


@pytest.mark.parametrize("method", tuning.STORED)
def test_short_texts_are_bitwise_the_originals(method):
    base, tuned = load_encoder("tiny-ape"), tuning.tiny_tuned(method)
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 77, base.base_len-1, base.base_len):
        ids = torch.randint(5, 400, (3, n), generator=g).tolist()
        assert torch.equal(tuned.embed_ids(ids), base.embed_ids(ids))
    longer = torch.randint(5, 400, (1, base.base_len+1), generator=g).tolist()
    assert not torch.equal(tuned.embed_ids(longer), extend_encoder(base, tuned.max_len, method).embed_ids(longer))


def test_stale_rows_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "RECIPE", tuning.RECIPE | dict(steps=1, batch=4))
    monkeypatch.setattr(tuning, "stored_file", lambda method: tmp_path/f"{method}.safetensors")
    now = tuning.tiny_tuned("pi", 2)                                          # no file: tuned on the spot
    save_file({"factor2": torch.zeros(1)}, tmp_path/"pi.safetensors", dict(revision="another"))
    with pytest.warns(UserWarning, match="belongs to revision another of tiny-ape"): again = tuning.tiny_tuned("pi", 2)
    said = []
    tuning.store("pi", (2,), tmp_path/"pi.safetensors", said.append)
    assert len(said) == 1 and [p.name for p in tmp_path.iterdir()] == ["pi.safetensors"]
    for e in (again, tuning.tiny_tuned("pi", 2)): assert torch.equal(tuning.added_rows(e), tuning.added_rows(now))


def test_refusals(capsys):
    with pytest.raises(InputError, match="must be tiny-ape"): tuning.tuned_encoder("tiny-rope")
    assert tuning.main(["--method", "gp"]) == 2 and "method='gp'" in capsys.readouterr().err
