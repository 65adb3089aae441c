"""Decoders that are split over devices, offloaded, or tensor-parallel keep working under `extend`, and are what they were after `undo`."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lcnb.foundations.checks import InputError
from lcnb.laboratory.models import load_model, random_llama
from lcnb.methods import extend, make_plan

ROOT = Path(__file__).resolve().parent.parent
PLANS = ("rope", "pi", "yarn", "dynamic_ntk", "lm_infinite", "lm_infinite_topk", "dca", "streaming")
LONG = 150


def a_plan(name): return make_plan(name, 48, LONG + 20, strict=False, n_start=4)


def llama(seed=0, **kw):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **kw)).eval()


def split(how, tmp):
    "The same model, held elsewhere."
    from accelerate import cpu_offload, disk_offload, dispatch_model
    from accelerate.utils import offload_state_dict
    model = llama()
    if how == "cpu and buffers": return cpu_offload(model, offload_buffers=True)
    if how == "disk": disk_offload(model, str(tmp)); return model
    names = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"} | {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    offload_state_dict(str(tmp), {k: v for k, v in model.state_dict().items() if ".layers.1." in k or ".layers.3." in k})
    return dispatch_model(model, names, main_device="cpu", offload_dir=str(tmp), force_hooks=True)


def padded(ids):
    "The second text is shorter, padded on the left."
    x, mask = ids.clone(), torch.ones_like(ids)
    x[1, :60], mask[1, :60] = 0, 0
    return x, mask


@pytest.mark.parametrize("how", ["cpu and buffers", "disk", "half of the layers on disk"])
def test_a_split_model_computes_the_same(how, tmp_path):
    whole, parts = llama(), split(how, tmp_path)
    ids = torch.randint(3, 97, (2, LONG), generator=torch.Generator().manual_seed(1))
    x, mask = padded(ids)
    with torch.no_grad():
        original = parts(ids).logits
        assert torch.equal(original, whole(ids).logits) and any(p.is_meta for p in parts.parameters())
        forwards = [m.__dict__.get("forward") for m in parts.modules()]
        for name in PLANS:
            got = []
            for m in (whole, parts):
                with extend(m, a_plan(name)) as h:
                    new = m.generate(x, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
                    kept = m.generate(x, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, past_key_values=h.new_cache()) if name in ("lm_infinite", "streaming") else new
                    got.append((m(ids).logits, m(x, attention_mask=mask).logits, new, kept))
            for a, b in zip(*got): assert torch.equal(a, b), name
        assert [m.__dict__.get("forward") for m in parts.modules()] == forwards           # accelerate's hooks are still there
        assert torch.equal(parts(ids).logits, original)


@pytest.mark.parametrize("family", ["GPTJ", "Mpt", "Bloom"])
def test_adapters_on_a_split_model(family):
    "The three families whose attention has an adapter, which takes the place of the forward that accelerate put there."
    import transformers as t
    from accelerate import cpu_offload
    sizes = dict(GPTJ=dict(rotary_dim=8, max_position_embeddings=256), Mpt=dict(max_seq_len=256), Bloom={})[family]
    def one():
        torch.manual_seed(0)
        return getattr(t, f"{family}ForCausalLM")(getattr(t, f"{family}Config")(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)).eval()
    whole, parts, ids = one(), cpu_offload(one()), torch.arange(3, 83)[None]
    with torch.no_grad():
        before = parts(ids).logits
        forwards = [m.__dict__.get("forward") for m in parts.modules()]
        with extend(whole, a_plan("dca")), extend(parts, a_plan("dca")): assert torch.equal(whole(ids).logits, parts(ids).logits)
        assert [m.__dict__.get("forward") for m in parts.modules()] == forwards and torch.equal(parts(ids).logits, before)


def test_load_model_split(tmp_path):
    folder = random_llama(tmp_path/"llama", load_model("tiny").tokenizer)
    whole = load_model(folder, device="cpu")
    names = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    ids = torch.arange(5, 105)[None]
    for device_map in ("auto", names):
        lm = load_model(folder, device_map=device_map)
        assert lm.revision == whole.revision and not lm.model.training
        with extend(lm.model, a_plan("dca")), extend(whole.model, a_plan("dca")): assert torch.equal(lm.model(ids).logits.cpu(), whole.model(ids).logits)
    for bad in ("everywhere", 3):
        with pytest.raises(InputError, match="device_map"): load_model(folder, device_map=bad)
    for bad in (torch.cuda.device_count(), "gpu"):
        with pytest.raises(InputError, match="device="): load_model(folder, device_map={"": bad})


SECOND = torch.device("cpu", 1)

class There(torch.Tensor):
    "A tensor that says it lies on a second device; no operation may mix it with others."
    @staticmethod
    def __new__(cls, x):
        t = torch.Tensor._make_wrapper_subclass(cls, x.size(), strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype, device=SECOND)
        t.x = x
        return t
    def __repr__(self): return f"There({self.x})"
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})

def run(func, args, kwargs):
    "One operation, on one device."
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there, here = [t for t in tensors if isinstance(t, There)], [t for t in tensors if not isinstance(t, There) and t.dim() and t.numel()]
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and here and not moves: raise RuntimeError(f"{func}: tensors on two devices")
    to = kwargs.get("device")
    inside = lambda t: t.x if isinstance(t, There) else t
    out = func(*tree_map(inside, args), **tree_map(inside, kwargs) | ({} if to is None else dict(device="cpu")))
    if func._schema.is_mutable and tensors and isinstance(out, torch.Tensor): return args[0] if "out" not in kwargs else kwargs["out"]
    goes = to == SECOND if to is not None else bool(there)
    return tree_map(lambda t: There(t) if isinstance(t, torch.Tensor) and not isinstance(t, There) else t, out) if goes else out

class TwoDevices(TorchDispatchMode):
    "Operations that make tensors on the second device, and none that mixes."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})

def on_two(model):
    "The upper two layers on the second device; what comes in is moved, as accelerate does."
    def moved(to): return lambda m, a, k: tree_map(lambda t: t.to(to) if isinstance(t, torch.Tensor) else t, (a, k))
    for layer in model.model.layers[2:]:
        for m in layer.modules():
            for n, p in m._parameters.items():
                if p is not None: m._parameters[n] = torch.nn.Parameter(There(p.data), requires_grad=False)
        layer.register_forward_pre_hook(moved(SECOND), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(moved(torch.device("cpu")), with_kwargs=True)
    return model


def test_no_operation_mixes_two_devices():
    "Two lower layers here, two upper ones there: tables, masks and layouts of one device are not used on the other, with padding and without."
    whole, parts = llama(), on_two(llama())
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    x, mask = padded(ids)
    with pytest.raises(RuntimeError, match="two devices"), TwoDevices(): torch.ones(2, device=SECOND) + torch.ones(2)
    for name in ("dca", "lm_infinite"):
        plan, both = make_plan(name, 24, 70, strict=False, n_start=4), []
        with torch.no_grad():
            with extend(whole, plan): both.append((whole(ids).logits, whole(x, attention_mask=mask).logits))
            with TwoDevices(), extend(parts, plan): both.append((parts(ids).logits, parts(x, attention_mask=mask).logits))
        for a, b in zip(*both): assert torch.equal(a, b), name


def worker(folder):
    "One of two processes that share each layer's heads."
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM
    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", device_map=None).eval()
    ids = torch.load(Path(folder)/"ids.pt", weights_only=True)
    x, mask = padded(ids)
    out = {}
    with torch.no_grad():
        out["none"] = model(ids).logits
        for name in PLANS:
            with extend(model, a_plan(name)): out[name], out[f"{name} new"] = model(ids).logits, model.generate(x, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        out["undone"] = model(ids).logits
    q = model.model.layers[0].self_attn.q_proj.weight
    out["rows of q"] = torch.tensor((q.to_local() if hasattr(q, "to_local") else q).shape[0])
    if torch.distributed.get_rank() == 0: torch.save(out, Path(folder)/"out.pt")
    torch.distributed.destroy_process_group()


def test_tensor_parallel(tmp_path):
    "transformers' tensor parallelism on two CPU processes: sums of two halves, so float32 rounding apart."
    model = llama()
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 97, (2, LONG), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path/"ids.pt")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)], env=env, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    out, (x, mask) = torch.load(tmp_path/"out.pt", weights_only=True), padded(ids)
    with torch.no_grad():
        assert_close(out["none"], model(ids).logits, rtol=0, atol=2e-5)
        assert torch.equal(out["none"], out["undone"]) and out["rows of q"] == 32
        for name in PLANS:
            with extend(model, a_plan(name)):
                assert_close(out[name], model(ids).logits, rtol=0, atol=2e-5, msg=lambda m: f"{name}: {m}")
                assert torch.equal(out[f"{name} new"], model.generate(x, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)), name


if __name__ == "__main__": worker(sys.argv[1])
