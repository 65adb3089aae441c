"""What a plan says before anything is fetched: sizes counted again from the models, memory against measurements, no network, and one sentence for each thing that is wrong."""
import contextlib, inspect, json, os, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lcnb.foundations.checks import InputError
from lcnb.reproduction import plan, registry
from lcnb.reproduction.cli import main

ROOT = Path(__file__).parents[1]
PROFILES = ("tiny", "gpu", "paper")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "An empty cache, no token, no variable that would change the answer."
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for k in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LCNB_HOME"): monkeypatch.delenv(k, raising=False)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A checkout with a hub.yaml of its own: `home(old, new)` writes it with one change."
    there = tmp_path / "checkout"
    (there / "nbs").mkdir(parents=True), (there / "data").mkdir()
    (there / "nbs/experiments").symlink_to(ROOT / "nbs/experiments")
    for d in ("profiles", "models", "published"): (there / "data" / d).symlink_to(ROOT / "data" / d)
    def write(*changes):
        text = (ROOT / "data/hub.yaml").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (there / "data/hub.yaml").write_text(text)
        monkeypatch.setenv("LCNB_HOME", str(there))
        return there / "data/hub.yaml"
    return write


def fake_machine(monkeypatch, **facts):
    base = dict(gpus=[("NVIDIA A100-SXM4-80GB", 80 * 2**30)], torch="2.13.0", disk=10**13, token=True, offline=False, extras={})
    monkeypatch.setattr(plan, "machine", lambda: base | facts)


# ---- profiles and facts belong together

@pytest.mark.parametrize("profile", PROFILES)
def test_every_artifact_is_in_the_profile(profile):
    entries = registry.profile(profile)["artifacts"]
    assert set(entries) == set(registry.artifacts())
    for id, e in entries.items():
        if profile != "tiny":
            known, given = registry.parameters(registry.artifact(id).notebook), e.get("params") or {}
            hub_model = any("/" in m for m in plan._list(given.get("model")))
            if hub_model: assert {k for k in ("revision", "dtype") if k in known} <= set(given), id
        assert plan.hours(e["cost"])[0] > 0


def test_everything_that_a_profile_names_is_described_and_nothing_else():
    plans = [p for n in ("gpu", "paper") for p in plan.make_plan(n)["artifacts"]]
    parts = [x for p in plans for x in p["models"] + p["data"]]
    assert not [x["name"] for x in parts if x["state"] == "unknown"]
    facts = plan.hub()
    assert {x["name"] for p in plans for x in p["models"]} >= set(facts["models"])
    assert {x["name"] for p in plans for x in p["data"] if x["kind"] == "hub"} == set(facts["datasets"])
    files = [x["path"] for x in parts if x.get("kind") == "file"]
    assert all(any(f.startswith(k) for f in files) for k in facts["files"]) and all(any(f.startswith(k) for k in facts["files"]) for f in files)


def test_short_names_and_shapes_are_those_of_the_modules():
    from lcnb.e2llm.data import HUB
    from lcnb.e2llm.studies import ENCODER_SHAPES
    from lcnb.laboratory.cost import SHAPES
    from lcnb.memlong.icl import TASKS
    aliases = plan.hub()["aliases"]
    assert {k: t.hub for k, t in TASKS.items() if t.hub} == {k: v for k, v in aliases.items() if k in TASKS}
    for k, how in HUB.items():
        name, _, config = aliases[k].partition(":")
        if how["path"] == "json": assert all(name in f and plan.hub()["datasets"][name]["revision"] in f for f in how["data_files"].values())
        else: assert (how["path"], how.get("name", "")) == (name, config)
    assert set(aliases) == {k for k, t in TASKS.items() if t.hub} | set(HUB)
    for k, name in plan.hub()["shapes"].items():
        c = plan.hub()["models"][name]["config"]
        if k in SHAPES: assert SHAPES[k] == tuple(c[x] for x in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"))
        elif k in ENCODER_SHAPES: assert ENCODER_SHAPES[k] == tuple(c[x] for x in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"))


def row(columns): # made up, of the right types
    made = dict(label=1, sentence="a", text="a", label_text="positive", answer=1, options=["a", "b"], question="q?", article="x", input="q?\n\nx", output="a",
                meeting_transcripts=[dict(speaker="A", content="x")], general_query_list=[dict(query="q?", answer="a")], specific_query_list=[], report="x", summary="a")
    return {c: made.get(c, "1") for c in columns}

@pytest.mark.parametrize("name", sorted(plan.hub()["datasets"]))
def test_the_reader_of_a_data_set_takes_its_columns_and_misses_any_that_it_needs(name):
    from lcnb.e2llm import data as records
    from lcnb.laboratory import corpora, fewshot
    from lcnb.longembed import benchmark
    from lcnb.memlong import icl
    entry = plan.hub()["datasets"][name]
    columns, reader = entry["columns"], entry["reader"]
    if reader == "corpora":
        take, needed = (lambda c: corpora._column(c, None, name)), {"text"}
    elif reader == "questions":
        take, needed = (lambda c: list(fewshot.read_rows([row(c)], name))), {"input", "output"}
    elif reader == "retrieval":
        for table, c in columns.items():
            said = {n for part in benchmark.TABLES[table].values() for n in part if n in c}
            assert set(benchmark._columns(name, table, [dict.fromkeys(c, "x")]).values()) == said
            with pytest.raises(InputError, match="has no column"): benchmark._columns(name, table, [dict.fromkeys(set(c) - {sorted(said)[0]}, "x")])
        return
    elif reader == "classes":
        task = next(t for t in icl.TASKS.values() if t.hub == name)
        take, needed = (lambda c: icl._word({k: v for k, v in row(c).items() if k != "label_text"}, task, name)), {"label"}
    else:
        made = {"deepmind/narrativeqa": dict(document=dict(text="x"), question=dict(text="q?"), answers=[dict(text="a")]),
                "mandarjoshi/trivia_qa": dict(question="q?", answer=dict(value="a", aliases=[]), entity_pages=[dict(wiki_context="x")], search_results=[])}.get(name, row(columns))
        take = lambda c: records.layout(c, name)({k: made.get(k, "1") for k in c})
        assert all(set(r) >= set(records.FIELDS) for r in take(columns)) and take(columns)
        needed = next(set(c) for c, _ in records.LAYOUTS if set(c) <= set(columns))
    take(columns)
    for c in needed:
        with pytest.raises(InputError): take([x for x in columns if x != c])


# ---- sizes, counted again

@pytest.mark.parametrize("name", sorted(plan.hub()["models"]))
def test_parameters_are_those_of_the_model(name):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    c = dict(plan.hub()["models"][name]["config"])
    kind, head = c.pop("model_type"), c.pop("head", True)
    if kind == "mpt": c = dict(d_model=c["hidden_size"], n_heads=c["num_attention_heads"], n_layers=c["num_hidden_layers"], expansion_ratio=c["intermediate_size"] // c["hidden_size"], vocab_size=c["vocab_size"])
    if kind == "gptj": c = dict(n_embd=c["hidden_size"], n_inner=c["intermediate_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"], vocab_size=c["vocab_size"])
    encodes = kind in ("bert", "xlm-roberta")
    with torch.device("meta"): model = (AutoModel if encodes or not head else AutoModelForCausalLM).from_config(AutoConfig.for_model(kind, **c))
    assert plan.n_parameters(plan.hub()["models"][name]["config"]) == sum(p.numel() for p in model.parameters())

def test_widely_printed_counts():
    n = lambda name: plan.n_parameters(plan.hub()["models"][name]["config"])
    assert n("meta-llama/Llama-2-7b-hf") == 6_738_415_616 and n("meta-llama/Llama-2-13b-hf") == 13_015_864_320
    assert n("TinyLlama/TinyLlama-1.1B-Chat-v1.0") == 1_100_048_384 and n("dwzhu/e5-base-4k") == 112_234_752
    for model, mib in (("intfloat/e5-base-v2", 418), ("thenlper/gte-base", 209), ("thenlper/gte-large", 639), ("BAAI/bge-m3", 2167), ("BAAI/bge-small-en-v1.5", 127), ("intfloat/e5-mistral-7b-instruct", 13563)):
        assert abs(n(model)*plan.BYTES[plan.hub()["models"][model]["stored"]]/2**20 - mib) < 2, model      # as MTEB prints

@pytest.mark.parametrize("name", ["tiny", "tiny-ape", "tiny-rope"])
def test_a_folder_is_counted_from_its_files(name):
    from safetensors.torch import load_file
    folder = ROOT / "data/models" / plan._OURS[name]
    assert plan.header_parameters(folder) == sum(t.numel() for t in load_file(folder / "model.safetensors").values())

def test_memory_by_hand():
    c = plan.hub()["models"]["meta-llama/Llama-2-7b-hf"]["config"]
    assert plan.cache_bytes(c, 4096) == 2*32*32*128*4096*2 == 2**31                    # two GiB, as everybody says
    assert plan.pass_bytes(c, 1000) == 1000*(2*(4*4096 + 3*11008 + 2*128) + 8)
    g = plan.hub()["models"]["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]["config"]
    assert plan.cache_bytes(g, 1) == 2*22*4*64*2                                      # four key heads, not thirty-two

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, dtype, low, high", [("llama", "float32", 1, 1), ("mistral", "bfloat16", 1, 1), ("gptj", "float32", .97, 1.01), ("mpt", "float32", .2, 1.01), ("bert", "float32", .85, 1.01)])
def test_memory_of_a_pass_is_what_torch_allocates(kind, dtype, low, high):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from lcnb.laboratory.cost import peak_bytes
    from lcnb.methods import extend, make_plan
    n, c = 512, dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, vocab_size=1000, max_position_embeddings=1024)
    if kind == "mistral": c |= dict(num_key_value_heads=2)
    own = dict(mpt=dict(d_model=256, n_heads=4, n_layers=3, expansion_ratio=4, vocab_size=1000), gptj=dict(n_embd=256, n_inner=1024, n_layer=3, n_head=4, rotary_dim=32, vocab_size=1000, bos_token_id=1, eos_token_id=2)).get(kind, c)
    model = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_config(AutoConfig.for_model(kind, **own), dtype=getattr(torch, dtype)).eval()
    ids = torch.zeros(1, n, dtype=torch.long)
    read = (lambda **k: model(ids)) if kind == "bert" else (lambda use_cache=False: model(ids, use_cache=use_cache, logits_to_keep=1))
    with torch.inference_mode(), extend(model, make_plan("rope", n, n)) if kind in ("gptj", "mpt") else contextlib.nullcontext():
        want = plan.pass_bytes(c | dict(model_type=kind), n, dtype)
        assert low <= peak_bytes(read, torch.device("cpu"))/want <= high
        if kind == "llama": assert peak_bytes(lambda: read(use_cache=True), torch.device("cpu")) == pytest.approx(want + plan.cache_bytes(c, n, dtype), rel=.03)

@pytest.mark.filterwarnings("ignore")
def test_memory_of_a_training_is_what_autograd_keeps():
    from peft import LoraConfig, get_peft_model
    from lcnb.laboratory.cost import SHAPES, random_model
    n, kept, hold = 256, {}, []
    model = get_peft_model(random_model("small", 512, "bfloat16", "cpu"), LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    def pack(x):
        if x.untyped_storage().data_ptr() not in own: kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); hold.append(x)
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): model(torch.zeros(1, n, dtype=torch.long), use_cache=False, logits_to_keep=1)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    c = dict(zip(names, SHAPES["small"]), model_type="llama") | dict(vocab_size=0)       # without the logits
    assert .9 < plan.training_bytes(c, n, 0)/sum(kept.values()) < 1.15
    assert plan.training_bytes(c, n, 0, checkpointing=True) < .5*plan.training_bytes(c, n, 0)

def test_no_protocol_takes_more_at_once_than_is_counted():
    from lcnb.foundations import attention
    from lcnb.laboratory import fewshot, generation, protocols
    from lcnb.longembed import encoders
    takes = [f for m in (protocols, generation, fewshot) for f in vars(m).values() if inspect.isfunction(f) and "batch_tokens" in inspect.signature(f).parameters]
    defaults = [inspect.signature(f).parameters["batch_tokens"].default for f in takes]
    assert len(takes) > 4 and max(d for d in defaults if isinstance(d, int)) == plan.AT_ONCE
    assert inspect.signature(protocols.token_nll).parameters["at_once"].default == plan.LOGITS
    assert inspect.signature(encoders._batches).parameters["budget"].default == plan.ENCODED
    assert inspect.signature(attention._attend_biased).parameters["budget"].default == plan.SCORES

def test_models_that_are_there_together():
    of = lambda id, profile="paper": plan.plan_artifact(id, profile, plan.machine(), plan._trained(profile))
    seven = 6_738_415_616*2
    assert of("dca/table1")["memory"]["weights"] == seven
    assert of("lm_infinite/table1")["memory"]["weights"] == 2*seven                    # the old one is there until the new one is
    assert of("lm_infinite/table3")["memory"]["weights"] == seven + 6_649_286_656*2
    two = of("e2llm/table2")                                                           # a decoder for the baselines, one inside the E2LLM, and an encoder in float32
    assert two["memory"]["weights"] == 2*seven + 335_141_888*4 and two["memory"]["tokens"] == 0
    assert of("e2llm/windows")["memory"]["weights"] == seven + 335_141_888*4           # one decoder for both
    assert of("memlong/fig4")["memory"]["weights"] == 3_426_473_600*2 + 567_754_752*4
    assert of("e2llm/table3")["memory"]["weights"] == 13_015_864_320*2 + 567_754_752*4 # the largest variant
    shape = of("dca/fig3")
    assert shape["memory"]["cache"] == 32768*2**19 and not shape["keep"]
    long = of("longembed/table2")["memory"]
    assert long["tokens"] == 32768                                                     # E5-Mistral by eight; BGE-M3 is not extended


# ---- nothing is fetched

def test_no_network_and_no_torch():
    code = """
import socket, sys
def refuse(*a, **k): raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from lcnb.reproduction.cli import main
rc = main(["plan", "--profile", "paper"])
assert "torch" not in sys.modules and "transformers" not in sys.modules and "datasets" not in sys.modules
sys.exit(rc)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE="1"), timeout=120)
    assert done.returncode == 0, done.stderr[-600:]
    assert "HF_HUB_OFFLINE is set" in done.stdout and "nothing was downloaded" in done.stdout.splitlines()[-1]
    assert not Path(os.environ["HF_HUB_CACHE"]).exists()

def test_a_need_of_two_counts_once():
    both, one = plan.make_plan("paper", "dca/table[12]"), plan.make_plan("paper", "dca/table2")
    assert len(both["artifacts"]) == 2 and both["total"]["download"] == one["total"]["download"] == 6_738_415_616*2
    assert both["total"]["stream"] == one["total"]["stream"] == 17402295
    whole = plan.make_plan("paper")["total"]
    by_hand = {m["name"]: m["disk"] for p in plan.make_plan("paper")["artifacts"] for m in p["models"] if m["state"] == "download"}
    assert whole["models"] == sum(by_hand.values())
    everything = plan.make_plan("all")["total"]
    assert everything["artifacts"] >= sum(len(registry.profile(n)["artifacts"]) for n in PROFILES) and whole["models"] < everything["models"] < whole["models"] + plan.make_plan("gpu")["total"]["models"]

def cached(name, files, commit="c"*40, kind="models"):
    "A repository as the hub's cache keeps it."
    here = plan.cache_dir() / f"{kind}--{name.replace('/', '--')}"
    for f, text in files.items():
        (here / "snapshots" / commit / f).parent.mkdir(parents=True, exist_ok=True)
        (here / "snapshots" / commit / f).write_text(text)
    (here / "refs").mkdir(exist_ok=True), (here / "refs/main").write_text(commit)

def test_what_is_in_the_cache_is_not_downloaded():
    name, index = "meta-llama/Llama-2-7b-hf", json.dumps(dict(weight_map=dict(a="model-1.safetensors", b="model-2.safetensors")))
    assert not plan.cached_model(name)
    cached(name, {"config.json": "{}", "model.safetensors.index.json": index, "model-1.safetensors": ""})
    assert not plan.cached_model(name)                                                 # one of two files
    cached(name, {"model-2.safetensors": ""})
    assert plan.cached_model(name) and plan.cached_model(name, "c"*40) and not plan.cached_model(name, "d"*40)
    p = plan.make_plan("paper", "dca/table2")
    assert p["total"]["download"] == 0 and "in the cache" in plan.say(p) and "no access token for" not in plan.say(p)
    cached("intfloat/e5-base-v2", {"config.json": "{}", "model.safetensors": ""})    # of another commit than the pinned one
    assert plan.describe(dict(role="model", name="intfloat/e5-base-v2", dtype="float16", loads="weights"))["state"] == "download"

def test_a_data_set_in_the_cache():
    at = plan.hub()["datasets"]["dwzhu/LongEmbed"]["revision"]
    cached("dwzhu/LongEmbed", {"qmsum/corpus.jsonl": ""}, at, "datasets")
    states = {d["config"]: d["state"] for d in plan.make_plan("paper", "longembed/table1")["artifacts"][0]["data"]}
    assert states["qmsum"] == "cached" and states["needle"] == "download"


def test_a_profile_whose_folders_are_not_there_is_left_out_of_all_and_refused_alone(monkeypatch, capsys):
    monkeypatch.delenv("LCNB_ASSETS", raising=False)
    p = plan.make_plan("all", "dca/table1")
    assert p["profiles"] == ["tiny", "gpu", "paper"] and "left out: profile assets: the variable LCNB_ASSETS is not set" in plan.say(p)
    assert main(["plan", "--profile", "assets"]) == 2 and "LCNB_ASSETS is not set" in capsys.readouterr().err


# ---- what this machine cannot run

def test_reasons(monkeypatch, tmp_path):
    why = lambda id, profile="paper": plan.make_plan(profile, id)["artifacts"][0]["cannot"]
    fake_machine(monkeypatch)
    assert why("dca/table1") == [] and why("lm_infinite/fig3", "gpu") == []
    fake_machine(monkeypatch, gpus=[])
    assert why("dca/fig3") == ["no CUDA GPU"] and why("dca/fig1_fig2_fig8") == []
    fake_machine(monkeypatch, gpus=[("small", 24*2**30)])
    assert why("dca/fig3") == ["needs 33.9 GB of GPU memory, this machine has 25.8 GB"]
    fake_machine(monkeypatch, torch="2.13.0+cpu")
    assert why("dca/fig3") == ["torch 2.13.0+cpu cannot use the GPU"]
    fake_machine(monkeypatch, disk=10**9)
    assert why("dca/table1") == ["needs 13.5 GB of disk, 1.0 GB are free"] and why("dca/fig3") == []
    fake_machine(monkeypatch, token=False)
    assert why("dca/table1") == ["no access token for the gated meta-llama/Llama-2-7b-hf"] and why("lm_infinite/fig5") == []
    fake_machine(monkeypatch, offline=True)
    assert "HF_HUB_OFFLINE is set" in why("dca/table1")[0] and why("dca/fig3") == []
    fake_machine(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert why("dca/table4") == ["no ~/LEval-data/Closed-ended-tasks/tpo.jsonl and 3 more (the folder LEval-data of github.com/OpenLMLab/LEval)"]
    (tmp_path / "LEval-data/Closed-ended-tasks").mkdir(parents=True)
    for f in ("tpo", "quality", "coursera", "sci_fi"): (tmp_path / f"LEval-data/Closed-ended-tasks/{f}.jsonl").touch()
    assert why("dca/table4") == []
    monkeypatch.setattr(plan, "_has", lambda k: k != "zstandard")
    assert why("lm_infinite/fig5") == ["package zstandard is not installed"] and why("dca/table1") == []

def test_prepared_copies_take_disk_too(monkeypatch):
    fake_machine(monkeypatch)
    p = plan.make_plan("paper", "e2llm/table2")["artifacts"][0]
    assert p["disk"] == sum(v or 0 for v in p["keep"].values()) + 16_315_602_701 + 16_000_000_000

def test_gpus_are_read_from_nvidia_smi(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA A100, PCIe, 40960'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert plan.machine()["gpus"] == [("NVIDIA H100 80GB HBM3", 81559*2**20), ("NVIDIA A100, PCIe", 40960*2**20)]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert plan.machine()["gpus"] == []


# ---- the command

@pytest.mark.parametrize("argv, words", [
    (["--profile", "papr"], "profile 'papr' does not exist: did you mean 'paper'"),
    (["--only", "longformer"], "only='longformer': no artifact of profile 'paper' fits"),
    (["--profile", "all", "--only", "longformer"], "only='longformer': must be a pattern that fits an artifact"),
])
def test_refused(argv, words, capsys):
    assert main(["plan", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("lcnb: ") and err.count("\n") == 1

LLAMA = "meta-llama/Llama-2-7b-hf:\n    revision: null\n"
@pytest.mark.parametrize("old, new, words", [
    ("    stored: float16", "    stored: float17", "hub.yaml: models: meta-llama/Llama-2-7b-hf: stored='float17'"),
    (LLAMA, LLAMA.replace("null", "main"), "hub.yaml: models: meta-llama/Llama-2-7b-hf: revision='main': must be null or a commit"),
    ("    licence: llama2\n", "", "hub.yaml: models: meta-llama/Llama-2-7b-hf: has no 'licence'"),
    ("num_hidden_layers: 26, ", "", "hub.yaml: models: openlm-research/open_llama_3b_v2: config has no 'num_hidden_layers'"),
    ("model_type: mpt", "model_type: mamba", "hub.yaml: models: mosaicml/mpt-7b: model_type='mamba'"),
    ("    reader: corpora", "    reader: corpus", "hub.yaml: datasets: emozilla/pg19: reader='corpus'"),
    ("    bytes: {default: {train: 11453688452, validation: 17402295, test: 40482852}}", "    bytes: 3", "hub.yaml: datasets: emozilla/pg19: bytes=3"),
    ("  sst2: stanfordnlp/sst2", "  sst2: stanfordnlp/sst3", "hub.yaml: aliases: sst2: stanfordnlp/sst3 is not among the datasets"),
    ("bert-large: thenlper/gte-large", "bert-large: thenlper/gte-huge", "hub.yaml: shapes: bert-large: thenlper/gte-huge is not among the models"),
    ("    gated: true\n", "    gated: [\n", "hub.yaml: is not YAML"),
])
def test_a_broken_entry_is_named(old, new, words, home, capsys):
    home((old, new))
    assert main(["plan", "--only", "dca/fig3"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1

def test_a_repository_that_nobody_described_is_not_a_fault(home, capsys):
    home(("  facebook/contriever:\n", "  facebook/contriever-of-another-name:\n"))
    assert main(["plan", "--only", "longembed/table2"]) == 0
    out = capsys.readouterr().out
    assert "facebook/contriever: not in data/hub.yaml, so its size is not known" in out and "facebook/contriever take, whose sizes are not known" in out.replace(", tau/scrolls", "")

def test_json_has_the_same_numbers(capsys):
    assert main(["plan", "--profile", "gpu", "--only", "e2llm", "--json"]) == 0
    said, made = json.loads(capsys.readouterr().out), plan.make_plan("gpu", "e2llm")
    assert said["total"] == made["total"] and [a["id"] for a in said["artifacts"]] == [a["id"] for a in made["artifacts"]]
    assert said["artifacts"][0]["keep"]["data/deepmind/narrativeqa/default"] == 3232805701

@pytest.mark.parametrize("cost, want", [("about 2 h on one A100-80G (estimate)", (2, False)), ("about a day on one A100-80G", (24, False)), ("about half a day on one GPU", (12, False)),
                                        ("days on one A100-80G (estimate; E5-Mistral at 32k)", (48, True)), ("months on one GPU", (1440, True)), ("about two weeks on one GPU", (336, False)),
                                        ("20 s", (20/3600, False)), ("1 min on 2 cores", (1/60, False)), ("5 s on a CPU", (5/3600, False))])
def test_hours(cost, want): assert plan.hours(cost) == want

@pytest.mark.parametrize("cost", ["", "soon", "about", None, "5 stones"])
def test_a_cost_without_a_time(cost):
    with pytest.raises(InputError, match="cost="): plan.hours(cost)


# ---- commits

class Api:
    "In the hub's place."
    def __init__(self, refuse=()): self.refuse, self.asked = refuse, []
    def model_info(self, name):
        self.asked.append(name)
        if name in self.refuse: raise OSError(f"403 Client Error: gated {name}")
        return SimpleNamespace(sha="a"*40)
    def dataset_info(self, name):
        self.asked.append(name)
        return SimpleNamespace(sha="b"*40)

def test_commits_are_written_and_nothing_else(home, monkeypatch, capsys):
    path = home()
    before, api = path.read_text().splitlines(), Api()
    told = plan.pin(api)
    after = path.read_text().splitlines()
    facts = plan.hub()
    assert {e["revision"] for e in facts["models"].values()} == {"a"*40}
    assert {n: e["revision"] for n, e in facts["datasets"].items() if e["revision"] != "b"*40} == {"Yale-LILY/QMSum": "83d7768c1f2b4dfeb091385d3dc7e239b8e5bb7e"}   # on GitHub
    assert len(before) == len(after) and all(re.match(r"    revision: ", a) for a, b in zip(after, before) if a != b)
    assert sorted(api.asked) == sorted(n for n, *_ in told) and not list(path.parent.glob(".hub*"))
    said = plan.say(plan.make_plan("paper", "dca/table2"))
    assert "commit aaaaaaaaaaaa" in said and "commit bbbbbbbbbbbb" in said and "not pinned" not in said
    assert plan.pin(Api()) and path.read_text().splitlines() == after                  # again: the same

def test_a_commit_that_cannot_be_had(home, monkeypatch, capsys):
    path = home()
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: Api(refuse=("meta-llama/Llama-2-7b-hf", "intfloat/e5-base-v2"))))
    assert main(["plan", "--pin"]) == 1
    out = capsys.readouterr().out
    assert "not had: 403 Client Error: gated meta-llama/Llama-2-7b-hf" in out and "(was 07163b72af14)" in out
    models = plan.hub()["models"]
    assert models["meta-llama/Llama-2-7b-hf"]["revision"] is None and models["intfloat/e5-base-v2"]["revision"].startswith("1c644c92") and models["BAAI/bge-m3"]["revision"] == "a"*40

def test_the_key_of_a_run_has_the_commits_of_what_it_names(home):
    key = lambda id="dca/table1", profile="paper", **p: registry.run_key(id, registry.profile_params(profile, id, p))
    home()
    before, tiny, table7 = key(), key(profile="tiny"), key("longembed/table7")
    assert registry.profile_params("paper", "dca/table1")["revision"] is None             # the loaders ask, not the profile
    home((LLAMA, LLAMA.replace("null", "e"*40)))
    assert key() != before and (key(profile="tiny"), key("longembed/table7")) == (tiny, table7)
    home((LLAMA, LLAMA.replace("null", "main")))                                       # a broken entry is in nobody's way who reads nothing from the hub
    assert registry.profile_params("tiny", "dca/table1")["revision"] is None
    with pytest.raises(InputError, match="Llama-2-7b-hf: revision='main'"): key()
