"""The engine from outside: the command line, bad input, runs that are killed, and the order of the house."""
import ast, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from lcnb.laboratory.models import random_llama
from lcnb.reproduction import registry, runner
from lcnb.reproduction.claims import claims
from lcnb.reproduction.cli import main

ROOT = Path(__file__).parents[1]
LCNB = [sys.executable, "-c", "import sys; from lcnb.reproduction.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    "Records and logs of a test are its own."
    monkeypatch.setenv("LCNB_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def lcnb(*argv, cwd=None, timeout=240):
    "The command, as a process: exit code, stdout, stderr."
    p = subprocess.run(LCNB + [str(a) for a in argv], capture_output=True, text=True, cwd=cwd, timeout=timeout)
    return p.returncode, p.stdout, p.stderr


# ---- bad input: one sentence, exit code 2, nothing half written

@pytest.mark.parametrize("argv, words", [
    (["run", "dca/tabel1"], "artifact 'dca/tabel1' does not exist: did you mean 'dca/table1'"),
    (["run", "dca/table1", "--profile", "huge"], "profile 'huge' does not exist"),
    (["run", "dca/table1", "-p", "lenghts=[1]"], "parameter 'lenghts' does not exist: did you mean 'lengths'"),
    (["run", "dca/table1", "-p", "lengths=256"], "lengths=256: must be a list"),
    (["run", "dca/table1", "-p", "lengths=[]"], "lengths=[]: must be a list with at least one element"),
    (["run", "dca/table1", "-p", "seed=one"], "seed='one': must be an integer"),
    (["run", "dca/table1", "-p", "seed"], "-p='seed': must be key=value"),
    (["run", "dca/table1", "--out", str(ROOT)], "holds an earlier result and nothing else"),
    (["reproduce", "--profile", "huge"], "profile 'huge' does not exist"),
    (["reproduce", "--jobs", "0"], "jobs=0: must be an integer of at least 1"),
    (["reproduce", "--only", "longformer"], "only='longformer': no artifact"),
    (["reproduce", "-p", "seed=1"], "used with `lcnb run ID`"),
    (["list", "dca/table9"], "artifact 'dca/table9' does not exist"),
])
def test_refused_before_anything_starts(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lcnb: ") and words in err and err.count("\n") == 1


SMALL = dict(methods=["rope"], lengths=[256], n_docs=1)
FAULTS = {
    "chunk_size": (dict(methods=["dca"], chunk_size=256), "chunk_size=256: must be smaller than the trained length"),
    "local_window": (dict(methods=["dca"], local_window=0), "local_window=0"),
    "window": (dict(methods=["lm_infinite"], window=0), "window=0: must be an integer of at least 1"),
    "n_start": (dict(methods=["lm_infinite"], n_start=-1), "n_start=-1: must be an integer of at least 0"),
    "method": (dict(methods=["ropee"]), "method='ropee'"),
    "no file": (dict(corpus="file:{tmp}/no.txt"), "no such file"),
    "empty": (dict(corpus="file:{tmp}/empty.txt"), "empty"),
    "short": (dict(corpus="file:{tmp}/short.txt"), "256"),
    "corpus": (dict(corpus="nonsense"), "corpus='nonsense'"),
    "no rotary": (dict(model="{tmp}/gpt2"), "rotary"),
    "no weights": (dict(model="{tmp}/bare"), "weights"),
    "no folder": (dict(model="{tmp}/nowhere"), "nowhere"),
    "length": (dict(lengths=[0]), "0"),
    "n_docs": (dict(n_docs=0), "n_docs=0: must be an integer of at least 1"),
    "n_last": (dict(n_last=256), "n_last=256"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    "Corpora and models with something wrong."
    tmp = tmp_path_factory.mktemp("faulty")
    (tmp/"empty.txt").write_text("")
    (tmp/"short.txt").write_text("A short text.")
    from transformers import GPT2Config, GPT2LMHeadModel
    from lcnb.laboratory.grammar import build_tokenizer
    tok = build_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=8, n_layer=1, n_head=1, n_positions=64)).save_pretrained(tmp/"gpt2")
    tok.save_pretrained(tmp/"gpt2")
    random_llama(tmp/"bare", tok)
    for p in (tmp/"bare").glob("*.safetensors"): p.unlink()
    return tmp


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_by_the_experiment(fault, faulty, tmp_path):
    changes, words = FAULTS[fault]
    changes = {k: v.format(tmp=faulty) if isinstance(v, str) else v for k, v in changes.items()}
    params = registry.resolve("dca/table1", SMALL | changes) | dict(out=str(tmp_path/"out"))
    failed = runner._as_code(dict(id="dca/table1", params=params))
    assert failed and failed["kind"] == "input" and words in failed["message"] and "\n" not in failed["message"], failed
    assert not (tmp_path/"out").exists() and [p.name for p in tmp_path.iterdir()] in ([], ["state"])


@pytest.mark.parametrize("how", [[], ["--no-notebook"]])
def test_a_refusal_inside_an_experiment_is_one_line_and_exit_code_2(how, tmp_path):
    code, out, err = lcnb("run", "dca/table1", "-p", "chunk_size=256", "-p", "methods=[dca]", "--out", tmp_path/"out", *how, cwd=tmp_path)
    assert (code, out) == (2, "") and err.startswith("lcnb: chunk_size=256: must be") and err.count("\n") == 1
    assert not (tmp_path/"out").exists()


# ---- runs

QUICK = ["-p", "methods=[rope, dca]", "-p", "lengths=[256, 512]", "-p", "n_docs=1"]


def test_killed_runs_leave_nothing_and_are_run_again(tmp_path):
    out = tmp_path/"result"
    argv = ["run", "dca/table1", *QUICK, "-p", "n_docs=200", "--out", str(out), "--no-notebook"]
    p = subprocess.Popen(LCNB + argv, stdout=subprocess.DEVNULL)
    progress = runner.state_dir()/"logs"/registry._digest(out)/"dca_table1.progress"
    deadline = time.time() + 120
    while not progress.exists() and time.time() < deadline: time.sleep(.05)
    assert progress.exists() and p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    time.sleep(1)
    assert not out.exists() and not runner._record(out).exists() and [q.name for q in tmp_path.iterdir()] == ["state"]
    argv[argv.index("n_docs=200")] = "n_docs=1"
    code, said, _ = lcnb(*argv)
    assert code == 0 and "done in" in said and (out/"rows.csv").exists()
    assert "skipped" in lcnb(*argv)[1]
    assert "done in" in lcnb(*argv, "--force")[1]


def test_papermill_by_hand_from_any_folder(tmp_path):
    nb, out = ROOT/"nbs/experiments/dca/table1.ipynb", tmp_path/"result"
    run = [sys.executable, "-m", "papermill", str(nb), "executed.ipynb", "-k", "python3", "-p", "out", str(out), "-p", "n_docs", "1", "-p", "lengths", "[256, 512]"]
    p = subprocess.run(run + ["-p", "methods", "[rope, dca]"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-2000:]
    said = json.loads((out/"run.json").read_text())
    assert said["params"]["lengths"] == [256, 512] and said["profile"] is None
    assert said["command"] == "lcnb run dca/table1 --profile tiny -p 'methods=[\"rope\", \"dca\"]' -p 'lengths=[256, 512]' -p n_docs=1"
    shutil.rmtree(out)
    p = subprocess.run(run + ["-p", "mehtods", "[rope]"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert p.returncode != 0 and "parameter 'mehtods' does not exist: did you mean 'methods'" in p.stderr and not out.exists()


def test_a_real_book_and_a_real_checkpoint(assets, tmp_path):
    code, said, err = lcnb("run", "dca/table1", "-p", f"model={assets}/models/babyllama105", "-p", f"corpus=file:{assets}/data/gutenberg_books/train.parquet",
                           "-p", "lengths=[256,1024]", "-p", "pretrained_len=256", "-p", "methods=[rope, dca, lm_infinite]", "-p", "n_docs=6", "--out", tmp_path/"out", "--no-notebook")
    assert code == 0, err
    from lcnb.reproduction.claims import load_result, select
    ppl = lambda m, at: select(load_result(tmp_path/"out"), dict(metric="ppl", method=m, at=at))
    assert ppl("rope", 4) > 5*ppl("rope", 1) and ppl("dca", 4) < ppl("rope", 1)+1 and ppl("lm_infinite", 4) < ppl("rope", 1)+1


def test_the_report_is_one_file_that_needs_nothing(tmp_path):
    assert main(["report", "--out", str(tmp_path/"r.html")]) == 0
    page = (tmp_path/"r.html").read_text()
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "<script" not in page and "@import" not in page and "url(" not in page
    assert all(f'id="{id.replace("/", "-")}"' in page for id in registry.artifacts())


def test_list_and_doctor_say_what_there_is(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(id in out for id in registry.artifacts())
    for id in registry.artifacts():
        assert main(["list", id]) == 0
        out = capsys.readouterr().out
        assert all(f"  {k} " in out for k in registry.parameters(registry.artifact(id).notebook))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch", "attention", "free disk", "checkout"))


# ---- the house

FLOORS = ["foundations", "laboratory", "methods", "longembed", "memlong", "e2llm", "reproduction"]


def imported(path):
    "Absolute names of the modules that a file of lcnb imports, at any depth."
    package = ["lcnb", *path.relative_to(ROOT/"lcnb").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package)-node.level+1] if node.level else []
            yield ".".join(base + ([node.module] if node.module else []))
            if node.module is None: yield from (".".join(base+[a.name]) for a in node.names)


def test_floors_import_downwards_only():
    for path in sorted((ROOT/"lcnb").rglob("*.py")):
        parts = path.relative_to(ROOT/"lcnb").parts
        if len(parts) < 2: continue
        assert parts[0] in FLOORS, f"{path}: name its floor in FLOORS"
        for name in imported(path):
            at = name.split(".")
            if at[0] == "lcnb" and len(at) > 1 and at[1] in FLOORS:
                assert FLOORS.index(at[1]) <= FLOORS.index(parts[0]), f"{path.relative_to(ROOT)} imports {name}, from a floor above"


def loaded_by(code):
    "Top-level names in sys.modules after some code, in a fresh process."
    out = subprocess.run([sys.executable, "-c", f"{code}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_nothing_heavy_is_imported_early():
    assert not loaded_by("import lcnb") & {"torch", "numpy", "transformers", "yaml"}
    assert not loaded_by("from lcnb.reproduction.cli import main; main(['list'])") & {"torch", "numpy", "transformers", "matplotlib", "papermill", "IPython"}
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT/"lcnb").rglob("*.py")) if not p.name.startswith("_")]
    heavy = loaded_by("import " + ", ".join(modules)) & {"matplotlib", "seaborn", "datasets", "faiss", "peft", "sentence_transformers", "papermill", "IPython", "fastcore", "nbdev"}
    assert not heavy, heavy


def test_list_answers_at_once():
    began = time.time()
    assert lcnb("list")[0] == 0
    assert time.time() - began < 2  # 0.1 s on an idle machine


@pytest.mark.parametrize("id", registry.artifacts())
def test_an_experiment_notebook_is_thin_and_tagged(id):
    a = registry.artifact(id)
    params = registry.parameters(a.notebook)
    assert all(p.about for p in params.values()), "every parameter has a comment"
    assert {"seed", "out"} <= set(params) and params["out"].default is None
    code = registry.cells(a.notebook)
    assert code[0][1] == ["parameters"] and f'start_run("{id}", globals())' in code[1][0] and "run.save(" in code[-1][0]
    assert not any(s.lstrip().startswith(("%", "!", "#|")) for s, _ in code) and sum(s.count("\n") for s, _ in code) < 120
    assert a.title != a.notebook.stem and a.summary
    assert id in registry.profile("tiny")["artifacts"]


@pytest.mark.parametrize("profile", registry.profile_names())
def test_profiles_fit_their_notebooks(profile, monkeypatch, tmp_path):
    for name in registry.profile(profile).get("variables") or {}: monkeypatch.setenv(name, str(tmp_path))
    for id, entry in registry.profile(profile)["artifacts"].items():
        assert entry["cost"] and registry.profile_params(profile, id)


@pytest.mark.parametrize("paper", sorted({a.paper for a in registry.artifacts().values()}))
def test_claims_say_all_that_they_must(paper):
    ids = [c.id for c in claims(paper)]
    assert len(ids) == len(set(ids))
    for c in claims(paper):
        assert c.artifact.startswith(f"{paper}/"), c.id  # the artifact itself may come later
        assert c.says and c.where and c.because


def test_published_numbers_are_copied_cell_by_cell():
    source = ROOT.parent/"shared"/"published"
    if not source.is_dir(): pytest.skip("the digests are not here")
    for path in (ROOT/"data"/"published").rglob("*.csv"):
        assert path.read_bytes() == (source/path.relative_to(ROOT/"data"/"published")).read_bytes(), path
