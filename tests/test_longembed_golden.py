"""Positions, tables, windows, Self-Extend and pooling of LongEmbed against the official code's own output, and against values derived from the paper."""
import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from lcnb.foundations.attention import attend, attend_dense, relative_positions
from lcnb.foundations.rope import inverse_frequencies, rope
from lcnb.longembed.encoders import NTK_FACTORS, extend_encoder, log_n, pool, random_encoder
from lcnb.longembed.positions import extended_table, frozen_rows, official_windows, padding_offset, position_ids, scale_factor, se_group, se_reach
from lcnb.methods.relatives import self_extend

FOLDER = GOLDEN / "longembed"
METHOD = dict(original="plain", group="gp", recurrent="rp", interpolate="pi")  # the official code's names -> ours


def read(name): return json.loads((FOLDER / f"{name}.json").read_text())


def arrays(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as z: return {k: torch.from_numpy(z[k]) for k in z.files}


IDS, SCALARS, TABLES, RELPOS = read("position_ids"), read("scalars"), arrays("position_tables"), arrays("selfextend_relpos")


def test_files_are_those_of_the_manifest():
    for name, entry in read("manifest")["files"].items():
        if name == "needle_facts.json": continue  # not copied: nothing reads it
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == entry["sha256"], name


@pytest.mark.parametrize("case", IDS["official"], ids=lambda c: f"{c['mode']}-{c['max_original_positions']}-{c['encode_max_length']}-{c['padded_len']}")
def test_official_ids(case):
    width, base, target = case["padded_len"], case["max_original_positions"], case["encode_max_length"]
    got = position_ids(METHOD[case["mode"]], torch.ones(2, width), base, target, rule="official_code")
    assert got.dtype == torch.long and torch.equal(got[0], got[1])
    got = got[0].tolist()
    if "ids" in case: assert got == case["ids"]
    else:
        assert (got[:len(case["head"])], got[-len(case["tail"]):], max(got), len(set(got)), sum(got)) == (case["head"], case["tail"], case["max"], case["n_unique"], case["sum"])
        assert hashlib.sha256(np.array(got, dtype=np.int64).tobytes()).hexdigest() == case["sha256_i64"]


@pytest.mark.parametrize("case", IDS["official_batch_dependence"], ids=lambda c: c["mode"])
def test_official_ids_depend_on_the_batch_and_ours_do_not(case):
    method, n = METHOD[case["mode"]], len(case["alone"])
    alone, padded = torch.ones(1, n), torch.zeros(2, 40)
    padded[0, :n], padded[1] = 1, 1
    official = lambda mask: position_ids(method, mask, 8, 64, rule="official_code")[0, :n].tolist()
    assert official(alone) == case["alone"] and official(padded) == case["in_batch_padded_to_40"]
    for rule in ("target", "length") if method == "gp" else ("target",):
        ours = [position_ids(method, mask, 8, 64, rule=rule)[0, :n].tolist() for mask in (alone, padded)]
        assert ours[0] == ours[1] == case["alone"], rule


@pytest.mark.parametrize("mode", ["group", "recurrent", "interpolate"])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 17, 40, 64])
def test_rule_per_sample(mode, n):
    "The rule that the golden file recommends: the official formula at the sample's own length."
    pid, base, target = torch.arange(n), 8, 64
    expected = {"group": pid // -(-n//base), "recurrent": pid % base, "interpolate": pid*(target//base) if n <= base else pid}[mode]
    mask = torch.zeros(2, 70)
    mask[0, :n], mask[1, 70-n:] = 1, 1
    got = position_ids(METHOD[mode], mask, base, target, rule="length" if mode == "group" else "target")
    assert torch.equal(got[0, :n], expected) and torch.equal(got[1, 70-n:], expected)


@pytest.mark.parametrize("case", read("padded_and_roberta_ids"), ids=lambda c: f"{c['pad_side']}-{c['n']}-{c['width']}")
def test_padded_ids(case):
    mask, base = torch.tensor([case["mask"]]), case["Lo"]
    offset = padding_offset(torch.nn.Embedding(4, 1, padding_idx=case["padding_idx"]))
    assert offset == case["padding_idx"]+1 and padding_offset(torch.nn.Embedding(4, 1)) == 0
    assert position_ids("plain", mask, base)[0].tolist() == case["bert_plain"]
    for key, method in (("plain", "plain"), ("group", "gp"), ("recurrent", "rp")):
        assert position_ids(method, mask, base, offset=offset, rule="length" if method == "gp" else "target")[0].tolist() == case[f"roberta_{key}"], key


@pytest.mark.parametrize("s", [2, 4, 8])
def test_tables(s):
    E, expected = TABLES["E_orig"], TABLES[f"pi_author_s{s}"]
    got = extended_table(E, "pi", s)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)   # float32 on both sides
    assert torch.equal(got[::s], E) and bool((got[-s:] == E[-1]).all())
    if s == 8: return
    for method in ("gp", "rp"): assert torch.equal(extended_table(E, method, s), TABLES[f"{method}_table_s{s}"])
    for other in ("align_corners", "half_pixel"):                  # torch's own interpolation puts the rows elsewhere
        assert (got - TABLES[f"interp_{other}_s{s}"]).abs().max() > .05


@pytest.mark.parametrize("s", [2, 4])
def test_roberta_table(s):
    got = extended_table(TABLES["roberta_orig_pad1"], "pi", s, offset=2)
    torch.testing.assert_close(got, TABLES[f"roberta_pi_s{s}"], rtol=0, atol=1e-6)
    assert torch.equal(got[:2], TABLES["roberta_orig_pad1"][:2])


def test_frozen_rows():
    for method in ("pi", "rp"): assert torch.equal(frozen_rows(method, 8, 32), TABLES[f"frozen_mask_{method}_s4"])


@pytest.mark.parametrize("case", read("pcw_windows")["cases"], ids=lambda c: f"{c['window']}-{c['max_token_num']}-{c['n_tokens']}")
def test_official_windows(case):
    got = official_windows(case["n_tokens"], case["window"], n_prefix=0, max_tokens=case["max_token_num"])
    assert [list(w) for w in got] == case["spans"] and len(got) == case["n_windows"]


@pytest.mark.parametrize("key", [k for k in RELPOS if not k.startswith("row")])
def test_self_extend_matrix(key):
    n, w, g = (int(x[1:]) for x in key.split("_")[-3:])
    M, seen = relative_positions(self_extend(w, g, bidirectional=not key.startswith("causal")), n)
    assert torch.equal(M.masked_fill(~seen, -999), RELPOS[key].double())


@pytest.mark.parametrize("n, w, g", [(1024, 256, 3), (2048, 128, 5), (4096, 64, 9)])
def test_self_extend_rows(n, w, g):
    "First and middle row of the paper's own settings, from the branches, as the matrix would be large."
    plan, j = self_extend(w, g, bidirectional=True), torch.arange(n)
    for key, i in (("row0", 0), ("rowmid", n//2)):
        row, seen, at = torch.full((n,), -999.), torch.zeros(n, dtype=torch.bool), torch.tensor([i])
        for b in plan.branches:
            lo, hi = b.ends(at, n)
            inside = (j >= lo) & (j < hi)
            assert not (inside & seen).any()
            row, seen = torch.where(inside, (b.q_pos(at)-b.k_pos(j)).float(), row), seen | inside
        assert seen.all() and torch.equal(row, RELPOS[f"{key}_n{n}_w{w}_g{g}"].float())
    assert se_reach(n, w, g, "official_code") == SCALARS["se_max_relative"][f"Lt{n}_w{w}_g{g}"] == 512  # one beyond the last trained distance
    assert se_reach(n, w, g) <= 511                                                                      # the closed form of the paper's example stays within


ATOL = 1e-7  # the official softmax is float32: the manifest finds 2.4e-8 between it and float64


@pytest.mark.parametrize("run", [attend_dense, attend], ids=lambda f: f.__name__)
def test_self_extend_layer(run):
    a = arrays("selfextend_attention")
    x, n = a["X"].double(), len(a["X"])
    q, k, v = ((x @ a[w].T).view(1, n, 2, 8).transpose(1, 2) for w in ("Wq", "Wk", "Wv"))
    real = (torch.arange(n) < 500)[None]
    padded = run(self_extend(64, 5, bidirectional=True), q, k, v, rope(8), mask=real).transpose(1, 2).reshape(n, 16)
    rows = a["out_rows"]
    inside = rows < 500                                                       # padded queries have no vector of ours
    torch.testing.assert_close(padded[rows[inside]], a["out"][inside], rtol=0, atol=ATOL)
    causal = run(self_extend(64, 5), q, k, v, rope(8), mask=real).transpose(1, 2).reshape(n, 16)
    assert (causal[rows[inside]] - a["out"][inside]).abs().max() > .05


def test_ntk_frequencies():
    for key, expected in SCALARS["ntk_inv_freq"].items():
        theta, dim = (int("".join(filter(str.isdigit, part))) for part in key.split("_"))
        got = inverse_frequencies(dim, float(theta))
        np.testing.assert_allclose([*got[:8], *got[-4:]], expected, rtol=1e-12)


def test_ntk_of_an_encoder():
    e = random_encoder("jina", base_len=64)
    for s, factor in ((int(k), v) for k, v in next(r for r in SCALARS["table6"] if r[0] == "NTK lambda")[1].items()):
        assert NTK_FACTORS[s] == factor
        longer = extend_encoder(e, to=64*s, method="ntk")
        dim = 2*len(rotary(longer).inv_freq)
        torch.testing.assert_close(rotary(longer).inv_freq.double(), inverse_frequencies(dim, theta(e)*factor), rtol=1e-6, atol=0)


def rotary(e): return next(m.rotary_emb for m in e.model.modules() if hasattr(m, "rotary_emb"))


def theta(e): return e.model.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("key, base", [("attention_scaling_bert", 512), ("attention_scaling_mistral", 4096)])
def test_attention_scaling(key, base):
    for n, expected in SCALARS[key].items(): assert log_n(torch.tensor([int(n)]), base).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling(side):
    hidden, mask, out = torch.tensor(SCALARS["pool"]["hidden"]), torch.tensor(SCALARS["pool"][f"{side}_mask"]), SCALARS["pool"]["out"]
    for how, key in (("mean", "avg"), ("last", "last"), ("cls", "cls")):
        got = pool(hidden, mask, how)
        if (how, side) == ("cls", "left"):                                    # the official code returns the padding's vector
            assert out["cls_left"][0] == [0, 0, 0] and got[0].tolist() == hidden[0, 1].tolist()
            got, expected = got[1:], out["cls_left"][1:]
        else: expected = out[f"{key}_{side}"]
        torch.testing.assert_close(got, torch.tensor(expected))


def test_table6():
    rows = {name: (base, said) for name, base, said in (r[:3] for r in SCALARS["table6"] if isinstance(r[1], int))}
    base, targets = rows.pop("APE")
    assert [scale_factor(base, t) for t in targets] == [2, 4, 8]
    for base, said in rows.values():
        for target, (g, w) in said.items():
            assert g == se_group(base, int(target), w) == (int(target)-w)/(base-w)
            assert se_reach(int(target), w, g) == base-1
