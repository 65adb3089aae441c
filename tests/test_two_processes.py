"""Two processes compute what one computes: DDP and FSDP2 on CPU (gloo), both trainings, killed and resumed; and nobody waits for a process that gave up."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


def memlong(tmp, out, loss=None, **kw):
    "Train a random MemLong of two layers for six steps; texts differ in their number of recall tokens, and some have none."
    from lcnb.laboratory.models import load_model
    from lcnb.memlong.model import MemLong
    from lcnb.memlong.recall import random_retriever
    from lcnb.memlong.training import RecallTexts, add_adapters, train_memlong
    lm = load_model(str(tmp/"llama"), device="cpu")
    ml = add_adapters(MemLong(lm.model, random_retriever(), lm.tokenizer, 0, (0, 1), chunk_size=16, top_k=2, capacity=256, local_len=64), (1,), r=2)
    texts = RecallTexts(lm.tokenizer, 6*STEPS, n_chunks=4, n_facts=2, n_questions=2, chunk_size=16, stories=.6)
    return ml, train_memlong(ml, texts, out, STEPS, 4, lr=1e-2, warmup=1, every=1, save_every=3, **kw)


def e2llm(tmp, out, bad=False, **kw):
    "Train a random E2LLM for four steps; records differ in length and weight, and the last of eight is wrong if that is asked for."
    from lcnb.e2llm.model import E2LLM, TINY_PROMPTS
    from lcnb.e2llm.training import LINE, quiz_records, train_e2llm
    ml = E2LLM("tiny-rope", str(tmp/"llama"), chunk_size=LINE, reading="line_first", prompts=TINY_PROMPTS, eos=False, encoder_rank=2, decoder_rank=2, micro_batch=8)
    records = [quiz_records(1, 5 + i % 4, "train", i)[0] | dict(weight=1. + i % 3) for i in range(16)]
    if bad: records[7] = records[7] | dict(context=" ")
    return ml, train_e2llm(ml, records, out, 4, 4, lr=1e-2, m=2, warmup=1, every=1, shuffle=False, **kw)


def keep(name, tmp, ml, log):
    "What the main process leaves for the comparison."
    from lcnb.laboratory.finetune import is_main, trained_parameters
    if not is_main(): return
    save_file({n: p.detach().contiguous() for n, p in trained_parameters(ml).items()}, tmp/f"{name}.safetensors")
    (tmp/f"{name}.json").write_text(json.dumps(log))


class Dies:
    "An `evaluate` after which one process is gone."
    def __init__(self, process, step): self.process, self.left = process, step
    def __call__(self, model):
        self.left -= 1
        if not self.left and int(os.environ["RANK"]) == self.process: os._exit(9)
        return {}


def worker(what, tmp):
    "One of two processes."
    torch.set_num_threads(1)
    if what == "ddp":
        keep("ddp_memlong", tmp, *memlong(tmp, tmp/"ddp"))
        keep("ddp_e2llm", tmp, *e2llm(tmp, tmp/"ddp_e2llm"))
        memlong(tmp, tmp/"killed", evaluate=Dies(1, 5))
    if what == "resume":
        keep("resumed", tmp, *memlong(tmp, tmp/"killed", resume=True))
        e2llm(tmp, tmp/"bad", bad=True)
    if what == "fsdp":
        gpus_that_are_none()
        keep("fsdp_memlong", tmp, *memlong(tmp, tmp/"fsdp", evaluate=whole_model))
        keep("fsdp_resumed", tmp, *memlong(tmp, tmp/"fsdp_resumed", resume=str(tmp/"ddp"/"checkpoint-3")))
        keep("fsdp_e2llm", tmp, *e2llm(tmp, tmp/"fsdp_e2llm"))


def gpus_that_are_none():
    "accelerate 1.15 switches FSDP on for processes with GPUs alone; torch shards on CPUs as well. Tell it that these have one."
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    start = PartialState.__init__
    def init(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU: PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU
    PartialState.__init__ = init


def whole_model(ml):
    "In an evaluation the model can be called as ever; how many of its parameters are shards."
    from torch.distributed.tensor import DTensor
    return dict(seen=float(ml(torch.arange(80)[None] + 5).logits.abs().mean()), shards=sum(isinstance(p, DTensor) for p in ml.parameters()))


def launch(config, what, tmp, *more):
    "Two processes of this file; exit code and everything printed."
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT/"data"/"launch"/config), *more, __file__, what, str(tmp)], env=env, capture_output=True, text=True, timeout=600, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "One process, and two by DDP, killed at the end."
    from lcnb.laboratory.models import load_model, random_llama
    tmp = tmp_path_factory.mktemp("two")
    random_llama(tmp/"llama", load_model("tiny").tokenizer, pretrained_len=256)
    keep("one_memlong", tmp, *memlong(tmp, tmp/"one"))
    keep("one_e2llm", tmp, *e2llm(tmp, tmp/"one_e2llm"))
    code, said = launch("ddp_cpu.yaml", "ddp", tmp)
    assert code != 0 and (tmp/"ddp_e2llm.json").is_file(), said
    return tmp


def close(tmp, a, b, rtol=2e-5, atol=2e-5, first=0):
    """Logs and trained parameters of two runs. Sums of a batch are taken in another order, so a gradient differs by some 1e-7 of its size, and Adam
    divides it by its own size: a parameter moves by up to lr=1e-2 a step, and is off by 1e-7 of the way, or more where its gradient is nearly none."""
    rows, same = (json.loads((tmp/f"{x}.json").read_text()) for x in (a, b))
    rows = [r for r in rows if r["step"] > first]
    assert len(rows) == len(same) > 0
    for r, s in zip(rows, same): assert {k: s.get(k) for k in r if k not in ("seen", "shards")} == pytest.approx({k: v for k, v in r.items() if k not in ("seen", "shards")}, rel=rtol, abs=atol)
    p, q = (load_file(tmp/f"{x}.safetensors") for x in (a, b))
    assert p.keys() == q.keys()
    for n in p: torch.testing.assert_close(q[n], p[n], rtol=rtol, atol=atol, msg=lambda m: f"{n}: {m}")


@pytest.mark.parametrize("training", ["memlong", "e2llm"])
def test_two_processes_are_one(runs, training):
    close(runs, f"one_{training}", f"ddp_{training}")


def test_only_one_process_writes(runs):
    assert sorted(f.name for f in (runs/"ddp"/"checkpoint-6").iterdir()) == ["optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trained.safetensors", "trainer_state.json"]


def test_killed_and_resumed(runs):
    assert not (runs/"killed"/"checkpoint-6").exists()
    shutil.copytree(runs/"killed", runs/"one_resumed")
    code, said = launch("ddp_cpu.yaml", "resume", runs)
    close(runs, "ddp_memlong", "resumed", 0, 0, first=3)                          # the same two processes: the same bits
    keep("one_resumed", runs, *memlong(runs, runs/"one_resumed", resume=True))     # one process goes on where two were killed
    close(runs, "ddp_memlong", "one_resumed", first=3)
    assert code != 0 and "context=' '" in said                                    # then one of two found a record without text: both are gone


def test_shards_are_one(runs):
    code, said = launch("fsdp.yaml", "fsdp", runs, "--mixed_precision", "no")
    assert code == 0, said
    close(runs, "one_memlong", "fsdp_memlong"), close(runs, "one_e2llm", "fsdp_e2llm")
    close(runs, "one_memlong", "fsdp_resumed", first=3)                            # from a checkpoint that DDP wrote
    rows = json.loads((runs/"fsdp_memlong.json").read_text())
    assert rows[0]["shards"] > 20 and all(r["seen"] > 0 for r in rows)
    keep("one_from_shards", runs, *memlong(runs, runs/"one_from_shards", resume=str(runs/"fsdp"/"checkpoint-3")))
    close(runs, "one_memlong", "one_from_shards", first=3)


def test_launch_files_are_what_they_say():
    from accelerate.commands.config.config_args import load_config_from_file
    import transformers
    for name, kind in (("ddp_cpu", "MULTI_GPU"), ("ddp", "MULTI_GPU"), ("fsdp", "FSDP")):
        assert load_config_from_file(str(ROOT/"data"/"launch"/f"{name}.yaml")).distributed_type == kind
    fsdp = load_config_from_file(str(ROOT/"data"/"launch"/"fsdp.yaml")).fsdp_config
    from transformers.models.llama import modeling_llama
    assert fsdp["fsdp_version"] == 2 and hasattr(modeling_llama, fsdp["fsdp_transformer_layer_cls_to_wrap"]) and not fsdp["fsdp_activation_checkpointing"]


if __name__ == "__main__": worker(sys.argv[1], Path(sys.argv[2]))
