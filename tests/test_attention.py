"""attend = attend_dense for random plans, shapes, paddings, cache splits, dtypes and backends; and gradients."""
import random

import pytest
import torch

from lcnb.foundations.attention import Branch, Plan, attend, attend_dense, relative_positions
from lcnb.foundations.rope import rope
from lcnb.methods import METHODS, make_plan
from lcnb.methods.relatives import self_extend

# Differences of two orders of summation. float64: rounding of values of order 1. float32: a few units in the last place,
# the longest sums here have 300 terms. bfloat16: 8 bits in the probabilities and in the output, values up to about 4.
ATOL = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2}
CASES = 1008


def random_plan(g, n):
    "One of the named methods with random sizes, or two branches with arbitrary ranges and positions."
    if g.random() < .15:
        jumps = torch.tensor([g.randrange(0, 4) for _ in range(4096)]).cumsum(0)
        edge = lambda i: torch.minimum(jumps[i] // 2, i+1)                      # a frontier that moves by 0, 1 or 2
        far, near = g.randrange(1, 50), g.randrange(1, 9)
        return Plan("jagged", (Branch("near", lambda i: (edge(i), i+1)), Branch("far", lambda i: (edge(i)//3, edge(i)), lambda i: i//near + far, lambda j: j//near)))
    c = g.choice([1, 2, 3, 5, 16, 63, 64, 65, 100, 200])
    if g.random() < .1: return self_extend(c, g.randrange(1, c+1), bidirectional=True)
    name = g.choice([m for m in METHODS if c >= 8 or not m.startswith("dca")])
    options = dict(n_start=g.choice([0, 1, 4, 10]), top_k=g.choice([1, 5]), inclusive=g.random() < .3) if "infinite" in name or "only" in name else {}
    if name == "ceiling_only": options["n_start"] = max(1, options["n_start"])
    if name == "self_extend": options = dict(log_base=g.choice([None, 8]))
    if name in ("lm_infinite", "window", "streaming"): options["window"] = g.choice([1, 2, c, c+1])
    if name.startswith("dca") and name != "dca_official_code":
        s = g.randrange(1, c)
        options = dict(chunk_size=s, local_window=g.randrange(1, c-s+1))
    return make_plan(name, c, max(n, 1), strict=False, **options)


def random_case(seed):
    "plan, q, k, v, mask, keyword arguments"
    g = random.Random(seed)
    m = g.choice([1, 2, 15, 16, 17, 64, 65, 128, 130, 200, 300])
    n = g.choice([m, m, 1, g.randrange(0, m+1)])
    hk, groups, b, d = g.choice([1, 2, 3]), g.choice([1, 2, 4]), g.choice([1, 2, 3]), g.choice([8, 16])
    dtype = g.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    t = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, l, d, generator=t).to(dtype) for h, l in ((hk*groups, n), (hk, m), (hk, m)))
    kind, mask = g.choice(["none", "none", "left", "right", "both", "holes", "empty"]), None
    if kind != "none":
        at = torch.arange(m)
        a = [g.randrange(0, m+1) if kind in ("left", "both") else 0 for _ in range(b)]
        z = [g.randrange(0, m+1) if kind in ("right", "both") else m for _ in range(b)]
        mask = torch.stack([(at >= x) & (at < y) for x, y in zip(a, z)])
        if kind == "holes": mask = torch.rand(b, m, generator=t) < .7
        if kind == "empty": mask[0] = False
    kw = dict(layer=g.randrange(0, 3), scale=g.choice([None, .3]), mask=mask)
    plan = random_plan(g, m)
    if plan.causal and g.random() < .1: kw["slopes"] = torch.rand(hk*groups, generator=t)
    return plan, q, k, v, kw, g.choice([None, None, "math", "flex"]), g.choice([rope(d), rope(d, 500., partial=.5), rope(d, interleaved=True)]), g.random() < .5


@pytest.mark.parametrize("block", range(12))
def test_fast_equals_dense(block):
    for seed in range(block*CASES//12, (block+1)*CASES//12):
        plan, q, k, v, kw, backend, f, rotated = random_case(seed)
        if plan.branches[-1].top_k and q.dtype != torch.float64: q, k, v = q.double(), k.double(), v.double()  # a near tie in rounded logits picks another key
        want = attend_dense(plan, q.double(), k.double(), v.double(), f, **kw)
        if rotated and plan.scaling is None and "slopes" not in kw:                                       # keys and queries as a cache holds them
            pos = torch.arange(k.shape[2]).expand(k.shape[0], -1) if kw["mask"] is None else (kw["mask"].cumsum(1)-1).clamp(min=0)
            pos = plan.branches[0].k_pos(pos)[:, None]
            turned = f(q.double(), pos[..., k.shape[2]-q.shape[2]:]), f(k.double(), pos)
            got = attend(plan, *(x.to(q.dtype) for x in turned), v, f, rotated=True, backend=backend, memo={}, **kw)
        else: got = attend(plan, q, k, v, f, backend=backend, **kw)
        assert got.shape == want.shape and got.dtype == q.dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=ATOL[q.dtype], msg=lambda s: f"seed {seed}, {plan}, q {tuple(q.shape)}, k {tuple(k.shape)}: {s}")


@pytest.mark.parametrize("block", range(6))
def test_gradients(block):
    for seed in range(1000+block*8, 1000+(block+1)*8):
        plan, q, k, v, kw, backend, f, _ = random_case(seed)
        if any(b.top_k for b in plan.branches) or backend == "flex": continue
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        w = torch.randn(*q.shape[:3], v.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        want = torch.autograd.grad((attend_dense(plan, *leaves, f, **kw)*w).sum(), leaves, allow_unused=True, materialize_grads=True)
        out = (attend(plan, *leaves, f, backend=backend, **kw)*w).sum()
        got = torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True) if out.requires_grad else [torch.zeros_like(x) for x in leaves]
        for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda s: f"seed {seed}, {plan}: {s}")


def test_cache_split_is_one_pass():
    "A text read in pieces, the last one a single token, equals one pass."
    for name in METHODS:
        plan = make_plan(name, 48, 150, strict=False, n_start=4)
        q, k, v = torch.randn(3, 1, 2, 150, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        f, whole = rope(16), attend(plan, q, k, v, rope(16))
        if plan.scaling and plan.scaling.follows_length: continue
        for a, z in ((0, 77), (77, 149), (149, 150)):
            torch.testing.assert_close(attend(plan, q[:, :, a:z], k[:, :, :z], v[:, :, :z], f), whole[:, :, a:z], rtol=0, atol=1e-11)


def test_every_named_method_is_a_plan():
    for name in METHODS:
        for n in (1, 2, 47, 48, 49, 130): relative_positions(make_plan(name, 48, n), n)
