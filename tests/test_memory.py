"""MemLong's memory: the traces of its rules, and a state machine that holds it against a list of dictionaries."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors.torch import save

from lcnb.foundations.checks import InputError
from lcnb.memlong.memory import POLICIES, MemoryBank, load_memory

TRACES = json.loads((GOLDEN / "memlong" / "traces.json").read_text())["traces"]


def unit(i, dim=8):
    x = np.random.RandomState(1000+i).randn(dim).astype(np.float32)
    return torch.from_numpy(x/np.linalg.norm(x))


def chunk(i, t=2):
    "keys[h,t,:] = 100*i + t, values their negative"
    k = (100*i + torch.arange(t)).float()[None, :, None].expand(2, t, 4)
    return k, -k


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("name", sorted(TRACES))
def test_traces(name, backend):
    if backend == "faiss": pytest.importorskip("faiss")
    policy, chunks = name.rsplit("_", 1)
    bank = MemoryBank(2*int(chunks), 2, 8, policy, dtype=torch.float32, backend=backend)
    for step in TRACES[name]:
        op, *args = step["op"]
        if op == "add": assert bank.add([chunk(args[0])[0]], [chunk(args[0])[1]], unit(args[0])[None], [f"c{args[0]}"]) == args
        else:
            found = bank.search(unit(args[0]), args[1]).ids[0].tolist()
            if "found" in step: assert found == step["found"]
        assert bank.ids == step["ids"] and bank.texts == [f"c{i}" for i in step["ids"]]
        if "counts" in step: assert bank.counters == step["counts"]
        bank.check()


def test_odd_capacity_and_ragged_chunks_stay_whole():
    "Where the official code loses count (five chunks, or a chunk that is not full), every entry is still itself."
    for policy in POLICIES:
        bank = MemoryBank(10, 2, 8, policy, dtype=torch.float32)
        for i in range(40):
            t = 1 + i % 2
            bank.add([chunk(i, t)[0]], [chunk(i, t)[1]], unit(i)[None], [f"c{i}"])
            bank.check()
            for j in bank.ids:
                k, v, sizes = bank.read([j])
                assert k[0, :, 0].tolist() == [100*j + n for n in range(1 + j % 2)] and bank.search(unit(j), 1).ids.item() == j


def slow_survivors(policy, entries, slots):
    "The four rules once more, one entry at a time, on a list of dictionaries; what goes is named, not what stays."
    n, left = len(entries), list(entries)
    if policy == "fifo_half":
        while len(left) > n//2: left.pop(0)                                      # of an odd number the smaller half stays, as of the official texts
        return left
    if policy == "lru":
        while 2*len(left) > slots: left.remove(min(left, key=lambda e: (e["used"], e["i"])))
        return left
    for _ in range(n//10): left.pop(0)
    if policy == "paper":
        safe = left[len(left)-max(1, n//10):]
        while 2*len(left) > slots and len(left) > len(safe): left.remove(min((e for e in left if e not in safe), key=lambda e: (e["count"], e["i"])))
        return left
    middle = entries[n//10:n*9//10]
    while middle and n-len(left) < n//2:
        least = min(e["count"] for e in middle)
        for e in [e for e in middle if e["count"] == least]: left.remove(e); middle.remove(e)
    return left


class Memory(RuleBasedStateMachine):
    "A `MemoryBank` beside a list of dictionaries."
    def __init__(self):
        super().__init__()
        self.bank, self.slow, self.n, self.step = None, [], 0, 0

    @precondition(lambda self: self.bank is None)
    @rule(chunks=st.integers(1, 8), size=st.integers(1, 3), policy=st.sampled_from(POLICIES), backend=st.sampled_from(["torch", None]))
    def make(self, chunks, size, policy, backend):
        self.size, self.capacity, self.policy = size, chunks*size, policy
        self.bank = MemoryBank(self.capacity, size, 8, policy, dtype=torch.float32, backend=backend)

    def make_room(self, n):
        slots = self.capacity//self.size
        if len(self.slow) + n > slots: self.slow = slow_survivors(self.policy, self.slow, slots)
        while len(self.slow) + n > slots: self.slow.pop(0)

    @precondition(lambda self: self.bank is not None)
    @rule(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=10))
    def add(self, sizes):
        sizes = [min(t, self.size) for t in sizes]
        self.step += 1
        new = [dict(i=self.n+j, t=t, count=0, used=self.step) for j, t in enumerate(sizes[max(0, len(sizes)-self.capacity//self.size):])]
        base = self.n
        kv = [chunk(base-max(0, len(sizes)-len(new))+j, t) for j, t in enumerate(sizes)]
        E = torch.stack([unit(base-max(0, len(sizes)-len(new))+j) if base+j >= 0 else unit(0) for j in range(len(sizes))])
        got = self.bank.add([k for k, _ in kv], [v for _, v in kv], E, [f"t{base-(len(sizes)-len(new))+j}" for j in range(len(sizes))])
        assert got == [None]*(len(sizes)-len(new)) + [e["i"] for e in new]
        self.n += len(new)
        self.make_room(len(new))
        self.slow += new

    @precondition(lambda self: self.bank is not None)
    @rule(q=st.integers(0, 60), k=st.integers(1, 12), count=st.booleans())
    def search(self, q, k, count):
        hits = self.bank.search(unit(q), k, count)
        order = sorted(self.slow, key=lambda e: (-round(float(unit(q) @ unit(e["i"])), 5), e["i"]))[:k]
        assert hits.ids[0].tolist() == [e["i"] for e in order]
        if count and self.slow:
            self.step += 1
            for e in order: e["count"] += 1; e["used"] = self.step

    @precondition(lambda self: self.bank is not None)
    @rule(n=st.integers(0, 6))
    def evict(self, n):
        "Room for n tokens in one chunk is made when there is none."
        n = min(n, self.size)
        self.make_room(1)
        self.bank.evict(n)

    @precondition(lambda self: self.bank is not None)
    @rule()
    def reset(self): self.bank.reset(); self.slow = []

    @precondition(lambda self: self.bank is not None)
    @rule()
    def save_and_load(self):
        import tempfile
        with tempfile.TemporaryDirectory() as tmp:
            self.bank.save(f"{tmp}/m.safetensors")
            self.bank = load_memory(f"{tmp}/m.safetensors", dim=8, chunk_size=self.size)

    @invariant()
    def same(self):
        if self.bank is None: return
        self.bank.check()
        assert (self.bank.ids, self.bank.counters, self.bank.lengths) == tuple([e[x] for e in self.slow] for x in ("i", "count", "t"))
        assert self.bank.texts == [f"t{e['i']}" for e in self.slow]
        if not self.slow: return
        k, v, sizes = self.bank.read(self.bank.ids)
        assert k[1, :, 3].tolist() == [100*e["i"]+j for e in self.slow for j in range(e["t"])] and torch.equal(v, -k) and sizes == [e["t"] for e in self.slow]
        torch.testing.assert_close(self.bank.embeddings, torch.stack([unit(e["i"]) for e in self.slow]), rtol=0, atol=1e-6)


Memory.TestCase.settings = settings(max_examples=220, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TestMemory = Memory.TestCase


def test_faiss_is_torch():
    pytest.importorskip("faiss")
    g = torch.Generator().manual_seed(0)
    E, Q = torch.randn(200, 16, generator=g), torch.randn(20, 16, generator=g)
    E[50:60] = E[10]                                                             # equal cosines: the older first
    banks = [MemoryBank(400, 2, 16, dtype=torch.float32, backend=b) for b in ("torch", "faiss")]
    for b in banks: b.add([chunk(0)[0]]*200, [chunk(0)[1]]*200, E, [""]*200)
    for k in (1, 5, 200, 300):
        x, y = (b.search(torch.cat((Q, E[10:11])), k, count=False) for b in banks)
        assert torch.equal(x.ids, y.ids)
        torch.testing.assert_close(x.scores, y.scores, rtol=0, atol=1e-6)
    assert banks[1].search(E[10], 3).ids[0].tolist() == [10, 50, 51]


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equal_embeddings_come_oldest_first(backend):
    "A text that repeats itself: the order of summation must not decide which copy is found."
    if backend == "faiss": pytest.importorskip("faiss")
    for n, dim in ((17, 100), (64, 8), (257, 384)):
        g = torch.Generator().manual_seed(n + dim)
        base = torch.randn(3, dim, generator=g)
        which = torch.randint(0, 3, (n,), generator=g)
        bank = MemoryBank(n, 1, dim, dtype=torch.float32, backend=backend)
        bank.add(torch.zeros(n, 1, 1, 1), torch.zeros(n, 1, 1, 1), base[which], [""]*n)
        for n_queries in (1, 30):
            hits = bank.search(base[:1] + .1*torch.randn(n_queries, dim, generator=g), 5, count=False)
            copies = (which == 0).nonzero().flatten().tolist()[:5]
            assert all(ids[:len(copies)] == copies for ids in hits.ids.tolist())


def test_refused_chunks_leave_no_trace():
    "A chunk that is refused, the last of several too, changes nothing: no slot is lost, nothing is forgotten for it."
    bank = MemoryBank(4, 2, 8, dtype=torch.float32, n_kv_heads=2, head_dim=4)
    assert bank.add([], [], torch.zeros(0, 8), []) == []
    for i in range(2): bank.add([chunk(i)[0]], [chunk(i)[1]], unit(i)[None], [f"c{i}"])
    k, v = chunk(7)
    for bad in (v[..., :1], v[..., :3], v[:, :1], v[0], v[:1]):
        with pytest.raises(InputError, match="values="): bank.add([k, k], [v, bad], torch.stack([unit(7), unit(8)]), ["a", "b"])
        bank.check()
        assert bank.ids == [0, 1] and bank.step == 2
    with pytest.raises(InputError, match="embeddings="): bank.add([k], [v], torch.full((1, 8), torch.inf), ["a"])
    bank.add([k], [v], torch.full((1, 8), 1e-30), ["small, not zero"])
    bank.check()


def test_short_chunks_are_forgotten_by_the_rule_too():
    "Twenty chunks of one token fill the twenty slots of forty tokens; the rule counts slots, and so has something to delete."
    bank = MemoryBank(40, 2, 8, "paper", dtype=torch.float32)
    for i in range(20): bank.add([chunk(i, 1)[0]], [chunk(i, 1)[1]], unit(i)[None], [f"c{i}"])
    for i in (0, 5, 5, 6): bank.search(unit(i), 1)
    bank.add([chunk(20, 1)[0]], [chunk(20, 1)[1]], unit(20)[None], ["c20"])
    assert bank.ids == [5, 6, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_bfloat16_and_devices():
    bank = MemoryBank(8, 2, 8)
    k, v = chunk(3)
    bank.add([k], [v], unit(3)[None], ["x"])
    got = bank.read([0])
    assert got[0].dtype == torch.bfloat16 and torch.equal(got[0], k.bfloat16())


def test_killed_while_saving(tmp_path):
    "A process that is killed while it saves again and again leaves a whole file."
    code = ("import torch\nfrom lcnb.memlong.memory import MemoryBank\nb = MemoryBank(4096, 16, 8)\n"
            "k = torch.zeros(2, 16, 32)\nfor i in range(200): b.add([k], [k], torch.ones(1, 8)+i, [f't{i}'])\n"
            f"print('ready', flush=True)\nwhile True: b.save(r'{tmp_path}/m.safetensors'); b.search(torch.ones(8), 1)\n")
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    p.stdout.readline()
    for _ in range(100):
        if (tmp_path / "m.safetensors").exists(): break
        time.sleep(.05)
    time.sleep(.3)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    bank = load_memory(tmp_path / "m.safetensors", dim=8, chunk_size=16)
    bank.check()
    assert len(bank) == 200
    bank.save(tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]                             # what the kill left is gone with the next save


def test_a_foreign_or_broken_file_is_refused(tmp_path):
    for name, content in (("a.safetensors", b""), ("b.safetensors", b"{}"*10), ("c.safetensors", save({"x": torch.zeros(2)})), ("d.safetensors", save({"x": torch.zeros(2)}, metadata={"memory": "{"}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="path="): load_memory(tmp_path / name)
    with pytest.raises(InputError, match="safetensors"): MemoryBank(8, 2, 8).save(tmp_path / "m.pt")
