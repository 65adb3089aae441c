"""`lcnb verify`: planted differences are found and named, and nothing under figures/ is touched; the same run twice gives the same bytes; the kit for GPU machines on a machine that has little."""
import csv, json, os, subprocess, sys
from pathlib import Path

import pytest

from lcnb.reproduction import registry, runner
from lcnb.reproduction.claims import load_result
from lcnb.reproduction.cli import main
from lcnb.reproduction.run import git_state
from lcnb.reproduction.verify import METRICS, kinds_of

ROOT = Path(__file__).parents[1]
TOYS = ["same", "moved", "near", "fewer", "other"]


def state(folder):
    "Every file below a folder, with what is in it."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def toy_home(tmp_path_factory):
    "A checkout with five toy artifacts and the results that were committed of them; all but the first were changed afterwards."
    home = tmp_path_factory.mktemp("toy").resolve()
    (home/"nbs/experiments/toy").mkdir(parents=True)
    (home/"data/profiles").mkdir(parents=True)
    cells = ["model = 'a'  # model\nseed = 0  # seed\nout = None  # folder",
             "from lcnb.reproduction.run import start_run\nrun = start_run('toy/NAME', globals())",
             "import time\nrow = lambda metric, length, value: dict(method='m', model=model, length=length, metric=metric, value=value, n=20, seed=seed)\n"
             "rows = [row('nll', 8, 2.5), row('nll', 16, 3.5), row('accuracy', 8, .5), row('accuracy', 16, 1.), row('cells', 8, 7), row('seconds', 8, time.time())]\nrun.resolve(pretrained_len=8)",
             "run.save(rows)"]
    for name in TOYS + ["absent"]:
        code = [dict(cell_type="code", id=f"c{i}", metadata=dict(tags=["parameters"]*(i == 0)), source=s.replace("NAME", name), outputs=[], execution_count=None) for i, s in enumerate(cells)]
        nb = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[dict(cell_type="markdown", id="t", metadata={}, source="# Toy\n\n> Toy.")] + code)
        (home/f"nbs/experiments/toy/{name}.ipynb").write_text(json.dumps(nb))
    (home/"data/profiles/tiny.yaml").write_text("about: toy\nartifacts:\n" + "".join(f"  toy/{n}: {{cost: 1 s}}\n" for n in TOYS + ["absent"]))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("LCNB_HOME", str(home)); m.setenv("LCNB_STATE", str(home/".lcnb"))
        outcomes = [runner.run_artifact(f"toy/{n}", notebook=False) for n in TOYS]
    assert all(o.status == "done" for o in outcomes), outcomes
    edit = lambda n, *changes: [p.write_text(p.read_text().replace(*c)) for p in [home/"figures/tiny/toy"/n/"rows.csv"] for c in changes]
    edit("moved", ("m,a,16,nll,3.5", "m,a,16,nll,3.6"), ("m,a,16,accuracy,1.0", "m,a,16,accuracy,0.95"))
    edit("near", ("m,a,8,nll,2.5", "m,a,8,nll,2.5001"))
    edit("fewer", ("m,a,8,cells,7", "m,a,24,cells,7"))
    edit("other", (",a,", ",b,"))
    return home


@pytest.fixture
def toy(toy_home, monkeypatch):
    "It is the checkout for one test."
    monkeypatch.setenv("LCNB_HOME", str(toy_home))
    monkeypatch.setenv("LCNB_STATE", str(toy_home/".lcnb"))
    return toy_home


def test_differences_are_found_and_named(toy, capsys):
    before = state(toy)
    assert main(["verify", "--n", "9", "--no-notebook", "--seed", "1"]) == 1
    said = capsys.readouterr().out
    assert state(toy) == before, "verifying wrote into the checkout"
    head, *lines = said.splitlines()
    assert head == f"5 of 5 artifacts with results in {os.path.relpath(toy/'figures/tiny')}, seed 1: " + ", ".join(f"toy/{n}" for n in TOYS)
    at = {l.split()[0]: i for i, l in enumerate(lines) if l.startswith("toy/")}
    verdict = {n: " ".join(lines[at[f"toy/{n}"]].split()[1:]) for n in TOYS}
    assert verdict["same"] == "identical: 5 rows; seconds measured, not compared"
    assert verdict["near"].startswith("within tolerance: 1 of 5 rows moved, most at metric=nll length=8: 2.5001 committed, 2.5 now (4.0e-05 of it, allowed 1.0e-04)")
    assert verdict["moved"].startswith("differs: 1 of 5 rows") and lines[at["toy/moved"]+1].strip() == "metric=nll length=16: 3.6 committed, 3.5 now (2.8e-02 of it, allowed 1.0e-04)"
    assert [l.strip() for l in lines[at["toy/fewer"]+1:at["toy/fewer"]+3]] == ["metric=cells length=24: committed only", "metric=cells length=8: now only"]
    assert lines[at["toy/other"]+1].strip() == "column model: b committed, a now, so that no row has its partner"
    assert lines[-1] == "1 identical, 1 within tolerance, 3 differs"


def test_what_is_near_is_refused_if_exactness_is_asked(toy, capsys):
    assert main(["verify", "--only", "toy/near", "--no-notebook"]) == 0
    assert main(["verify", "--only", "toy/near", "--no-notebook", "--exact"]) == 1
    assert "metric=nll length=8: 2.5001 committed, 2.5 now (not identical)" in capsys.readouterr().out


def test_another_machine_and_other_parameters_are_said(toy, tmp_path, capsys):
    "The committed result of another place, in a folder of its own."
    there = tmp_path/"theirs"/"toy"/"same"
    there.mkdir(parents=True)
    for p in (toy/"figures/tiny/toy/same").iterdir(): (there/p.name).write_bytes(p.read_bytes())
    run = json.loads((there/"run.json").read_text())
    run["versions"]["torch"], run["hardware"]["cpu"], run["params"]["model"] = "1.0", "an abacus", "c"
    (there/"run.json").write_text(json.dumps(run))
    assert main(["verify", "--against", str(tmp_path/"theirs"), "--no-notebook", "--out", str(tmp_path/"new")]) == 0
    said = capsys.readouterr().out
    for text in ("torch 1.0 -> ", "cpu an abacus -> ", "model c -> a"): assert f"not as committed: {text}" in said
    assert (tmp_path/"new/toy/same/rows.csv").is_file()


@pytest.mark.parametrize("argv, words", [
    (["--only", "toy/tabel1"], "only='toy/tabel1': no artifact of profile 'tiny' fits"),
    (["--only", "toy/absent"], "has no result of toy/absent"),
    (["--n", "0"], "n=0: must be an integer of at least 1"),
    (["--jobs", "0"], "jobs=0: must be an integer of at least 1"),
    (["--profile", "huge", "--against", "."], "profile 'huge' does not exist"),
    (["--profile", "huge"], "huge"),
    (["--against", "no/such"], "must be a folder with results in <paper>/<artifact>"),
    (["--out", "."], "must be a folder that is new or empty"),
])
def test_refused_in_one_sentence(toy, argv, words, capsys):
    assert main(["verify", "--no-notebook", *argv]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith("lcnb: ") and err.count("\n") == 1 and not out


@pytest.mark.parametrize("name, text, words", [("rows.csv", "metric\n", "must be a result"), ("rows.csv", "", "must be a result"), ("rows.csv", "metric,value\nnll,1,2\n", "is broken"),
                                               ("run.json", "{", "is broken"), ("run.json", "[]", "must be a result")])
def test_a_broken_committed_result_is_refused(toy, name, text, words, tmp_path, capsys):
    there = tmp_path/"toy"/"same"
    there.mkdir(parents=True)
    for p in (toy/"figures/tiny/toy/same").iterdir(): (there/p.name).write_bytes(p.read_bytes())
    (there/name).write_text(text)
    assert main(["verify", "--no-notebook", "--against", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_every_metric_has_one_kind():
    "One that is missing here would be compared exactly: declare it in METRICS of nbs/7_reproduction/verify.ipynb, with the kind of quantity that it is."
    found = {(row["metric"], str(p.parent.relative_to(ROOT/"figures"))) for profile in ("tiny", "gpu") for p in (ROOT/"figures"/profile).glob("*/*/rows.csv") for row in csv.DictReader(p.open(newline=""))}
    assert len(found) > 100
    wrong = {(m, where, tuple(kinds_of(m))) for m, where in found if len(kinds_of(m)) != 1}
    assert not wrong, wrong
    assert set(METRICS) == {"measured", "counted", "computed", "scored", "derived"}


@pytest.mark.parametrize("id, params", [("longembed/fig4", {}), ("lm_infinite/table1", dict(n_docs=2, lengths=[128, 512]))])
def test_the_same_command_twice_gives_the_same_bytes(id, params, tmp_path, monkeypatch):
    "Rows with their run_id, and pictures and tables with their commit: a drawing with its figures, a model's losses with their table."
    monkeypatch.setenv("LCNB_STATE", str(tmp_path/"state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = registry.code_hash(id), git_state()
    outcomes = [runner.run_artifact(id, params=params, out=tmp_path/name, notebook=False) for name in ("one", "two")]
    assert all(o.status == "done" for o in outcomes), outcomes
    if before != (registry.code_hash(id), git_state()): pytest.skip("somebody changed the code while this ran")
    one, two = (state(tmp_path/name) for name in ("one", "two"))
    assert set(one) == set(two) and {"rows.csv", "run.json"} < set(one)
    said = load_result(tmp_path/"one").run
    for name in set(one) - {"run.json"}: assert one[name] == two[name], name
    for name in set(one) - {"run.json", "rows.csv"}: assert f"lcnb run {id} --profile tiny".encode() in one[name] and f"commit {said['git']['sha'] or 'unknown'}".encode() in one[name], name


BLOCKED = "papermill ipykernel IPython nbformat nbclient jupyter_client datasets faiss flash_attn rouge_score bm25s ir_measures zstandard mteb nbdev fastcore"
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None): return None if name.partition(".")[0] in {BLOCKED.split()} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Without if f is PathFinder else f for f in sys.meta_path]
"""


@pytest.fixture(scope="module")
def poor(tmp_path_factory):
    "The environment of a machine with torch and transformers, and without Jupyter, datasets, faiss, flash-attn and the rest, in children too."
    site = tmp_path_factory.mktemp("site")
    (site/"sitecustomize.py").write_text(WITHOUT)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]), HF_HUB_OFFLINE="1", HF_HOME=str(site/"hf"), LCNB_STATE=str(site/"state"), OMP_NUM_THREADS="1", MPLBACKEND="agg")
    assert subprocess.run([sys.executable, "-c", "import papermill"], env=env, capture_output=True).returncode == 1
    return env


def test_the_gpu_kit_runs_what_it_can_and_says_what_it_left_out(poor, tmp_path):
    only = "lm_infinite/fig2,dca/table1,e2llm/table2"
    done = subprocess.run([sys.executable, "-m", "lcnb.reproduction.gpu", "--cpu", "--only", only, "--no-bench", "--out", str(tmp_path/"kit")], env=poor, capture_output=True, text=True, timeout=240)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "without Jupyter, the hub is out of reach" in done.stdout.splitlines()[0]
    lines = {l.split()[0]: l for l in done.stdout.splitlines()[1:]}
    assert "TinyLlama" in lines["dca/table1"] and "left out" in lines["dca/table1"] and "left out" in lines["e2llm/table2"]
    assert "done in" in lines["lm_infinite/fig2"] and (tmp_path/"kit"/"lm_infinite/fig2"/"rows.csv").is_file()
    assert done.stdout.splitlines()[-1] == "left out: dca/table1, e2llm/table2"


SMALL = {"dca/fig3": dict(shape="one-layer", lengths=[64, 128], repeats=1, pretrained_len=64, chunk_size=48, local_window=16),
         "lm_infinite/appendixG": dict(shape="one-layer", lengths=[256, 512], repeats=1, pretrained_len=64, window=32),
         "e2llm/fig3": dict(shape="one-layer", encoder_shape="paper-share", lengths=[64, 300], n_docs=1, n_full=1, n_words=2, pretrained_len=256)}


def test_the_efficiency_artifacts_need_neither_the_hub_nor_jupyter(poor, tmp_path):
    "The cells of the GPU profile as they are, bfloat16 too, at a shape that a CPU can hold."
    code = ("import json, sys\nfrom lcnb.reproduction import runner\nfor id, params in json.loads(sys.argv[1]).items():\n"
            "    failed = runner._as_code(dict(id=id, params=runner.profile_params('gpu', id, params)))\n    assert failed is None, (id, failed)")
    small = {id: p | dict(out=str(tmp_path/id)) for id, p in SMALL.items()}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(small)], env=poor, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for id in SMALL: assert load_result(tmp_path/id).run["params"]["dtype"] == "bfloat16" and len(load_result(tmp_path/id).rows) > 5


@pytest.mark.parametrize("argv, words", [([], "no GPU is visible to torch"), (["--cpu"], "--cpu needs --out"), (["--cpu", "--out", "x", "--only", "dca/tabel1"], "only='dca/tabel1': no artifact of profile 'gpu'")])
def test_the_kit_refuses_in_one_sentence(argv, words, capsys, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["gpu", *argv]) == 2
    assert words in capsys.readouterr().err
