"""Snakemake over the registry: what is listed, run, skipped and run again; kills, failures, GPUs, odd paths."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from lcnb.foundations.checks import InputError
from lcnb.reproduction import cluster, plan, registry, runner

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
needs_snakemake = pytest.mark.skipif(not SNAKEMAKE.exists(), reason="snakemake is not installed: pip install 'lcnb[cluster]'")


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    "Records, stamps and logs of a test are its own, and so is the folder that Snakemake is called from."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LCNB_STATE", str(tmp_path/"the state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path/"the state"


def words(*more, **config):
    "A command line: the local profile, two cores, `--config` from the keywords."
    argv = [SNAKEMAKE, "-s", ROOT/"data"/"cluster"/"Snakefile", "--workflow-profile", ROOT/"data"/"cluster"/"profiles"/"local", "-c", "2"]
    return [str(a) for a in [*argv, *more, "--config", "notebook=false", *(f"{k}={v}" for k, v in config.items())]]


def snakemake(*more, cwd=None, timeout=200, **config):
    "Snakemake to its end: exit code, and all that it said."
    p = subprocess.run(words(*more, **config), capture_output=True, text=True, cwd=cwd, timeout=timeout)
    return p.returncode, p.stdout + p.stderr


def listed(said):
    "The artifacts that a dry run would run, in order."
    return [l.partition("id=")[2] for l in said.splitlines() if l.strip().startswith("wildcards: id=")]


# ---- the profiles of this checkout

TRAINED = {"memlong/table1", "memlong/table2", "memlong/table3", "memlong/fig5", "memlong/policies", "memlong/protocol"}
ON_CPU = {"dca/fig1_fig2_fig8", "lm_infinite/fig2", "longembed/table1", "longembed/fig4", "longembed/table6", "memlong/table4", "e2llm/table1"}


@pytest.mark.parametrize("profile", ["tiny", "gpu", "paper"])
def test_jobs_of_a_profile(profile):
    found = {j.id: j for j in cluster.jobs(profile)}
    assert list(found) == list(registry.profile(profile)["artifacts"])
    assert {id for id, j in found.items() if j.after} == (set() if profile == "tiny" else TRAINED)
    assert all(j.after in ([], ["memlong/fig4"]) for j in found.values())
    without = {id for id, j in found.items() if not j.resources["gpu"]}
    assert without == set(found) if profile == "tiny" else ON_CPU <= without and len(without) < len(found)/3
    for planned in plan.make_plan(profile)["artifacts"]:
        asked = found[planned["id"]].resources
        assert asked["gpu"] == planned["on_gpu"] and asked["runtime"] >= 60*planned["hours"]
        assert asked["mem_mb"]*1e6 > 4e9/3 + 1.2*planned["memory"]["weights" if asked["gpu"] else "total"], "weights pass through the memory of the host"
    assert all(("--gpus 1 --" in j.command) == bool(j.resources["gpu"]) for j in found.values())


@needs_snakemake
def test_a_dry_run_lists_the_profile(tmp_path):
    code, said = snakemake("-n", profile="paper")
    assert code == 0, said
    ran = listed(said)
    assert sorted(ran) == sorted(registry.profile("paper")["artifacts"]) and "rule report:" in said
    assert ran.index("memlong/fig4") < min(ran.index(id) for id in TRAINED)
    block = {b.partition("wildcards: id=")[2].split()[0]: b for b in said.split("rule artifact:")[1:]}
    assert "gpu=1" in block["dca/table1"] and "gpu=0" in block["memlong/table4"] and "input: done/memlong/fig4" in block["memlong/table1"]
    assert not list(tmp_path.glob("the state/cluster/*/done/*/*")), "a dry run makes no stamp"


def test_every_artifact_is_a_target():
    last = cluster.workflow(dict(only="dca/fig1_fig2_fig8,lm_infinite/fig2"), main=False).last
    assert last[:2] == ["done/dca/fig1_fig2_fig8", "done/lm_infinite/fig2"] and last[2].endswith("report.html")


BAD = [
    (dict(profile="gpuu"), "profile 'gpuu' does not exist: did you mean 'gpu'?"),
    (dict(only="dca/tabel1"), "only='dca/tabel1': no artifact of profile 'tiny' fits"),
    (dict(only="dca/fig4,"), "only='': no artifact of profile 'tiny' fits"),
    (dict(profil="gpu"), "config 'profil' does not exist: did you mean 'profile'?"),
    (dict(out="build/x"), "out='build/x': must be an absolute path"),
    (dict(force="perhaps"), "force='perhaps': must be true or false"),
]


@pytest.mark.parametrize("config, sentence", BAD)
def test_bad_config_is_refused(config, sentence):
    with pytest.raises(InputError) as e: cluster.workflow(config)
    assert sentence in str(e.value) and "\n" not in str(e.value)


@needs_snakemake
def test_a_refusal_is_one_line_of_snakemake():
    code, said = snakemake("-n", only="dca/tabel1")
    told = [l for l in said.splitlines() if l.startswith("lcnb: ")]
    assert code == 1 and len(told) == 1 and "only='dca/tabel1'" in told[0] and "Traceback" not in said, said


@needs_snakemake
def test_rows_are_those_of_lcnb_run_and_a_second_call_has_nothing_to_do(tmp_path):
    ids, out = ["longembed/table6", "longembed/table1"], tmp_path/"with blanks"/"tiny"
    code, said = snakemake(only=",".join(ids), out=out)
    assert code == 0, said
    for id in ids:
        assert subprocess.run([cluster.LCNB, "run", id, "--no-notebook", "--out", tmp_path/"alone"/id]).returncode == 0
        assert (tmp_path/"alone"/id/"rows.csv").read_bytes() == (out/id/"rows.csv").read_bytes()
    began = {id: (out/id/"run.json").stat().st_mtime_ns for id in ids}
    code, said = snakemake(only=",".join(ids), out=out)
    assert code == 0 and "Nothing to be done" in said and all((out/id/"run.json").stat().st_mtime_ns == t for id, t in began.items())


# ---- a toy checkout, whose artifacts take the time that they are told

TOY = ['seconds = 0.0  # to sleep, unless there is a file `hurry`\nend = "well"  # well, fail, or meet: wait for another that has begun\nmemlong = "tiny"  # adapters\ntrain = False  # write them\nseed = 0  # seed\nout = None  # folder',
       'from lcnb.reproduction.run import start_run\nrun = start_run("toy/{name}", globals())',
       'import os, time\nfrom pathlib import Path\nfrom lcnb.foundations.checks import require\n'
       'trace = lambda what: open(os.environ["TRACE"], "a").write(f"{{what}} {name} {{time.time()}} {{os.environ.get(\'CUDA_VISIBLE_DEVICES\')}}\\n")\n'
       'trace("begin")\nuntil = time.time() + seconds\nwhile time.time() < until and not Path("hurry").exists(): time.sleep(.05)\n'
       'while end == "meet" and time.time() < until + 60 and open(os.environ["TRACE"]).read().count("begin") < 2: time.sleep(.05)\nif end == "fail": 1/0\n'
       'if memlong != "tiny" and train: Path(memlong).mkdir(parents=True, exist_ok=True); (Path(memlong)/"adapters").write_text(str(time.time_ns()))\n'
       'if memlong != "tiny" and not train: require((Path(memlong)/"adapters").is_file(), "memlong", memlong, "a folder with adapters")\n'
       'trace("end")',
       'run.save([dict(method="m", length=1, metric="slept", value=seconds, n=1, seed=seed)])']


class Toy:
    "A checkout with experiments toy/a, toy/b ... and a profile `toy`."
    def __init__(self, root):
        self.root, self.trace = root, root/"trace"
        (root/"data"/"profiles").mkdir(parents=True)
        (root/"nbs"/"experiments"/"toy").mkdir(parents=True)

    def write(self, **artifacts):
        "The profile: name -> `{cost, params, resources}`."
        for name in artifacts:
            cells = [dict(cell_type="markdown", id="a", metadata={}, source=f"# {name}\n\n> Toy.")]
            cells += [dict(cell_type="code", id=f"b{i}", metadata=dict(tags=["parameters"]*(i == 0)), source=s.format(name=name) if i else s, outputs=[], execution_count=None) for i, s in enumerate(TOY)]
            (self.root/"nbs"/"experiments"/"toy"/f"{name}.ipynb").write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))
        entries = {f"toy/{n}": dict(cost="1 s") | e for n, e in artifacts.items()}
        (self.root/"data"/"profiles"/"toy.yaml").write_text(json.dumps(dict(about="toy", artifacts=entries)))
        return self

    def events(self, what="begin"):
        "(artifact, time, GPU), in order."
        lines = [l.split() for l in self.trace.read_text().splitlines()] if self.trace.exists() else []
        return [(name, float(t), gpu) for w, name, t, gpu in lines if w == what]

    def began(self): return [name for name, *_ in self.events()]

    def rows(self, name): return (self.root/"figures"/"toy"/"toy"/name/"rows.csv").read_text()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    t = Toy(tmp_path/"a checkout")
    monkeypatch.setenv("LCNB_HOME", str(t.root))
    monkeypatch.setenv("TRACE", str(t.trace))
    return t


def make(*more, cwd=None, **config):
    "The toy's profile as far as its artifacts: the report needs the papers of a real checkout."
    return snakemake(*more, "--omit-from", "report", cwd=cwd, profile="toy", **config)


def wait_for(what, seconds=120):
    "Until `what()` is true."
    until = time.time() + seconds
    while not what() and time.time() < until: time.sleep(.05)
    assert what()


@needs_snakemake
def test_killed_in_the_middle_and_resumed(toy, state, tmp_path, monkeypatch):
    toy.write(a={}, b=dict(params=dict(seconds=300.0)))
    stamps = state/"cluster"/"toy"/"done"/"toy"
    p = subprocess.Popen(words("--omit-from", "report", profile="toy"), cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (stamps/"a").exists() and "b" in toy.began())
    os.killpg(p.pid, signal.SIGKILL)  # Snakemake, `lcnb run` and the experiment: a node that dies
    p.wait()
    assert [q.name for q in (toy.root/"figures"/"toy"/"toy").iterdir()] == ["a"] and [q.name for q in stamps.iterdir()] == ["a"]
    (toy.root/"hurry").touch()
    code, said = make()
    assert code and "--unlock" in said and sorted(toy.began()) == ["a", "b"], said
    assert make("--unlock")[0] == 0
    code, said = make()
    assert code == 0 and sorted(toy.began()) == ["a", "b", "b"], said
    monkeypatch.chdir(toy.root)  # where `hurry` is
    alone = runner.run_artifact("toy/b", "toy", out=tmp_path/"alone", notebook=False)
    assert alone.status == "done" and (tmp_path/"alone"/"rows.csv").read_text() == toy.rows("b")


@needs_snakemake
def test_a_failure_names_its_log_and_the_others_run(toy, state, tmp_path, monkeypatch):
    monkeypatch.setenv("LCNB_STATE", "the state")  # relative, and so is the folder that it is called from
    toy.write(a=dict(params=dict(end="fail")), b={}, c={})
    code, said = make("-c", "1", cwd=tmp_path)
    log = state/"cluster"/"toy"/"logs"/"toy"/"a.log"
    assert code == 1 and f"log: {log}" in said and "cell 3: ZeroDivisionError" in said, said
    assert "cell 3: ZeroDivisionError" in log.read_text() and sorted(toy.began()) == ["a", "a", "b", "c"]
    assert (state/"cluster"/"toy"/"benchmarks"/"toy"/"b.tsv").read_text().startswith("s\t")
    assert toy.rows("b") and toy.rows("c") and not (toy.root/"figures"/"toy"/"toy"/"a").exists()


@needs_snakemake
def test_what_is_trained_comes_first_and_gpu_jobs_one_at_a_time(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    gpu, adapters = dict(gpu=1), str(tmp_path/"ada pters")
    toy.write(reads=dict(params=dict(memlong=adapters, seconds=1.0), resources=gpu), other=dict(params=dict(seconds=1.0), resources=gpu),
              trains=dict(params=dict(memlong=adapters, train=True, seconds=1.0), resources=gpu))
    code, said = make()
    assert code == 0, said
    spans = sorted((t0, t1, name) for (name, t0, _) in toy.events() for (other, t1, _) in toy.events("end") if name == other)
    assert len(spans) == 3 and all(a[1] <= b[0] for a, b in zip(spans, spans[1:])), spans
    order = [name for *_, name in spans]
    assert order.index("trains") < order.index("reads") and {g for *_, g in toy.events()} <= {"5", "6"}
    assert "Nothing to be done" in make()[1] and len(toy.began()) == 3  # the adapters that it wrote do not make a training old


@needs_snakemake
def test_an_old_report_hides_nothing(toy):
    toy.write(a={}, b={})
    (toy.root/"figures").mkdir()
    (toy.root/"figures"/"report.html").write_text("of yesterday")
    code, said = snakemake("-n", profile="toy")
    assert code == 0 and sorted(listed(said)) == ["toy/a", "toy/b"] and "rule report:" in said, said


@needs_snakemake
def test_two_gpus_are_two_gpus(toy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    toy.write(a=dict(params=dict(end="meet"), resources=dict(gpu=1)), b=dict(params=dict(end="meet"), resources=dict(gpu=1)))
    code, said = make("--resources", "gpu=2")
    assert code == 0 and sorted(g for *_, g in toy.events()) == ["5", "6"], said


# ---- what counts as done, without Snakemake

def stamped(state): return sorted(p.name for p in (state/"cluster"/"toy"/"done"/"toy").iterdir())


def test_stamps_say_what_the_records_say(toy, state):
    toy.write(a={}, b={})
    def look(**config):
        cluster.workflow(dict(profile="toy") | config)
        return stamped(state)
    for name in "ab": assert runner.run_artifact(f"toy/{name}", "toy", notebook=False).status == "done"
    assert look() == ["a", "b"]  # made by `lcnb run`
    assert look(force=True) == [] and look() == ["a", "b"]
    (toy.root/"figures"/"toy"/"toy"/"a"/"rows.csv").write_text("another result, as after git checkout")
    assert look() == ["b"]
    toy.write(a={}, b=dict(params=dict(seed=1)))
    assert look() == []  # other parameters
    toy.write(a={}, b={})
    assert look() == ["b"] and cluster.workflow(dict(profile="toy"), main=False) and stamped(state) == ["b"]
    shutil.rmtree(state/"done")
    assert look() == []  # a fresh clone has results and no records


def test_a_result_from_git_is_not_done(state):
    ids = list(registry.profile("tiny")["artifacts"])
    assert (registry.result_dir(ids[0], "tiny")/"rows.csv").is_file()
    w = cluster.workflow({})
    assert list(w.jobs) == ids and not [p for p in (w.folder/"done").rglob("*") if p.is_file()]
