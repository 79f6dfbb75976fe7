"""Exp-E's identities in float64, its four runs against the models' own eager attention, its tables on planted
and on small real ones.
"""

import csv
import json
import math
import weakref
from types import SimpleNamespace

import expe_attention
from helpers import contents, log_probs_64, one_line, script, tiny_model
from transport_geometry.errors import UserError
from transport_geometry.measuring import attention_map, attention_plan
from transport_geometry.measuring.attention_plan import check_readable, four_runs, plan_change
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models import lm
from transport_geometry.models.lm import Hook
from transport_geometry.statistics import over_hooks

import numpy as np
import pytest
import torch
from test_models import make

B, H, T = 2, 3, 7
EPS = 0.6  # 1 / scaling


# ------------------------------------------------------------------------------------------ the identities
def draw(*shape, seed: int):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plan(scores):
    """(P, log P) of causal rows, as the module wants them: log P is 0 where a key is not seen."""
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    masked = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(masked, -1), torch.log_softmax(masked, -1).masked_fill(hidden, 0)


def change(scores, scores_hat):
    (p, log_p), (q, log_q) = plan(scores), plan(scores_hat)
    return plan_change(p, q, log_p, log_q)


@pytest.fixture
def scores():
    """s and s_hat, [B,H,T,T]."""
    return 2 * draw(B, H, T, T, seed=0), 2 * draw(B, H, T, T, seed=1)


def close(x, y, atol: float = 1e-12):
    torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_kl_is_the_regret_of_keeping_the_plan(scores):
    """eps KL(P || P_hat) = E_C_hat(P) - E_C_hat(P_hat), E_C(P) = <P, C> + eps sum P log P, C = -q.k."""
    s, s_hat = scores
    (p, log_p), (q, log_q) = plan(s), plan(s_hat)

    def energy(plan, log_plan):
        return (plan * -EPS * s_hat).sum(-1) + EPS * (plan * log_plan).sum(-1)

    close(EPS * change(s, s_hat)["kl"], energy(p, log_p) - energy(q, log_q))


def test_two_keys_in_closed_form():
    s, s_hat = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    s[..., 1, 0], s_hat[..., 1, 0] = 0.7, -1.1
    p, q = 1 / (1 + math.exp(-0.7)), 1 / (1 + math.exp(1.1))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    found = {name: v[0, 0, 1].item() for name, v in change(s, s_hat).items()}
    # kl_first: the other key has nothing to split
    truth = dict(kl=kl, kl_first=kl, jeffreys=(p - q) * (0.7 + 1.1), half_var=p * (1 - p) * 1.8**2 / 2)
    truth |= dict(first=p, first_hat=q, entropy=entropy(p), entropy_hat=entropy(q))
    assert found == pytest.approx(truth, abs=1e-12)


def test_chain_rule_at_position_0(scores):
    """Also at a sink that leaves the rest 1e-13, where 1 - P_0 would have lost its digits."""
    s, s_hat = (x.clone() for x in scores)
    s[:, 0, :, 0] += 30
    s_hat[:, 0, :, 0] += 29
    found = change(s, s_hat)
    hidden = torch.ones(T - 1, T - 1, dtype=torch.bool).triu(1)
    rest, rest_hat = (
        torch.log_softmax(x[..., 1:, 1:].masked_fill(hidden, -math.inf), -1) for x in (s, s_hat)
    )
    of_rest = (rest.exp() * (rest - rest_hat)).nan_to_num(0).sum(-1)
    whole = found["kl_first"][..., 1:] + plan(s)[0][..., 1:, 1:].sum(-1) * of_rest
    close(whole, found["kl"][..., 1:])
    # in the sink head nearly all of KL is about position 0, and it is known to 4 digits
    share = found["kl_first"][:, 0, 1:] / found["kl"][:, 0, 1:]
    assert ((share > 0) & (share <= 1 + 1e-6)).all()


# ---------------------------------------------------------------- the four runs, on the model's own attention
class Eager:
    """A model in its own eager attention, attention's output made anew from a plan that is given to it."""

    def __init__(self, model, layer):
        self.model, self.layer = model, layer
        model.set_attn_implementation("eager")
        self.attentions = [
            next(m for m in block.modules() if hasattr(m, "layer_idx")) for block in lm.blocks(model)
        ]

    def values(self, attention, x):
        """v [B,H,T,e] of what the attention is fed, [B,T,d]."""
        if hasattr(attention, "query_key_value"):
            of_heads = attention.query_key_value(x).unflatten(-1, (-1, 3 * attention.head_size))
            return of_heads.chunk(3, -1)[2].transpose(1, 2)
        v = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return v.repeat_interleave(attention.num_key_value_groups, 1)

    def run(self, rows, h, plans=None):
        """(log p, plans by block, values by block) of the run whose hooked block gives h, its later
        attentions with `plans` where they are given.
        """
        handles, values = [], {}

        def given(attention, args, kwargs, output):
            x = kwargs.get("hidden_states", args[0] if args else None)
            values[attention.layer_idx] = v = self.values(attention, x)
            if plans is None or attention.layer_idx <= self.layer:
                return output
            out = (plans[attention.layer_idx] @ v).transpose(1, 2).flatten(2)
            project = getattr(attention, "dense", None) or attention.o_proj
            return project(out), output[1]

        def patch(module, inputs, output):
            return (h, *output[1:]) if isinstance(output, tuple) else h

        for attention in self.attentions:
            handles.append(attention.register_forward_hook(given, with_kwargs=True))
        handles.append(lm.blocks(self.model)[self.layer].register_forward_hook(patch))
        try:
            with torch.no_grad():
                out = self.model(rows, use_cache=False, output_attentions=True)
        finally:
            for handle in handles:
                handle.remove()
        return log_probs_64(out.logits), dict(enumerate(out.attentions)), values


def family(name):
    """(model, hook, rows, h, h_hat), float64."""
    model = tiny_model(layers=4) if name == "gpt_neox" else make(name)
    rows = torch.randint(3, 41, (2, 12), generator=torch.Generator().manual_seed(5))
    hook = Hook(model, 1)
    h = hook.head(rows)
    h_hat = h + h.std() * draw(*h.shape, seed=6)
    h_hat[:, -1] = h[:, -1]
    return model, hook, rows, h, h_hat


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mistral"])  # grouped queries, windows
def test_one_stack_is_four_runs_of_the_models_own(name):
    model, hook, rows, h, h_hat = family(name)
    seen = {}
    frozen, plan_only = four_runs(hook, rows, h, h_hat, lambda block, found: seen.update({block: found}))
    before = model.config._attn_implementation
    eager = Eager(model, 1)
    log_p, clean, v = eager.run(rows, h)
    log_q, patched, v_hat = eager.run(rows, h_hat)
    # eager softmax is in float32
    close(hook.log_probs(rows, h), log_p, atol=1e-5)
    close(frozen.double(), eager.run(rows, h_hat, clean)[0], atol=1e-5)
    close(plan_only.double(), eager.run(rows, h, patched)[0], atol=1e-5)
    assert before == "sdpa" and sorted(seen) == [2, 3]
    # all four are different runs, and the plans of another block would be noticed
    runs = [log_p, log_q, frozen.double(), plan_only.double()]
    swapped = {2: clean[3], 3: clean[2]}
    runs.append(eager.run(rows, h_hat, swapped)[0])
    assert min((x - y).abs().max() for i, x in enumerate(runs) for y in runs[:i]) > 1e-2
    for block, found in seen.items():
        a, b = clean[block].double(), patched[block].double()
        kl = torch.where(a > 0, a * (a.clamp(min=1e-300) / b.clamp(min=1e-300)).log(), 0).sum(-1)
        close(found.kl, kl, atol=2e-6)
        close(found.first, a[..., 0], atol=1e-6)
        close(found.entropy_hat, -torch.special.xlogy(b, b).sum(-1), atol=2e-6)
        # the change of a head's output in two parts
        of_plan = torch.einsum("bhts,bhse->bhte", b - a, v[block])
        of_value = torch.einsum("bhts,bhse->bhte", b, v_hat[block] - v[block])
        close(a @ v[block] + of_plan + of_value, b @ v_hat[block], atol=1e-12)
        parts = {"plan_sq": of_plan, "value_sq": of_value, "out_sq": a @ v[block]}
        for ours, truth in ((getattr(found, name), part) for name, part in parts.items()):
            torch.testing.assert_close(ours.double(), truth.square().sum(-1), rtol=1e-5, atol=1e-6)
        for part in (found.kl, found.jeffreys, found.half_var, found.plan_sq):
            assert (part[..., 0] == 0).all() and part[..., 1:].min() > 0  # query 0 has one key
        far = a[..., 0] == 0  # a window that position 0 is outside of
        assert found.kl_first[far].abs().sum() < 1e-14 and (far.any() or name != "mistral")


def test_without_an_error_all_four_runs_are_the_clean_one():
    _, hook, rows, h, _ = family("gpt_neox")
    seen = []
    frozen, plan_only = four_runs(hook, rows, h, h, lambda block, found: seen.append(found))
    for run in (frozen, plan_only):
        close(run, hook.log_probs(rows, h), atol=1e-6)
    for found in seen:
        for part in (found.kl, found.jeffreys, found.half_var, found.kl_first, found.plan_sq, found.value_sq):
            assert (part == 0).all()


def test_nothing_of_a_plans_size_outlives_its_block(monkeypatch):
    """Whatever `look` keeps of a Change."""
    _, hook, rows, h, h_hat = family("gpt_neox")
    plans, kept, whole = [], [], attention_plan.plan_change

    def watched(*args):
        assert not [ref for ref in plans if ref() is not None]
        plans.extend(weakref.ref(x) for arg in args for x in (arg, arg._base) if x is not None)
        return whole(*args)

    monkeypatch.setattr(attention_plan, "plan_change", watched)
    four_runs(hook, rows, h, h_hat, lambda block, found: kept.append(found))
    assert len(plans) >= 16 and not [ref for ref in plans if ref() is not None]
    fields = [getattr(found, name) for found in kept for name in attention_map.FIELDS]
    assert max(field.untyped_storage().nbytes() for field in fields) <= 2 * (2 * 2 * 12 * 8)  # of [B,H,T]


# ------------------------------------------------------------------------------------------ as an experiment
def test_columns_are_means_over_blocks_heads_and_queries():
    """Through `evaluate`, against the eager model's plans; shares against its runs."""
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(0, 41, (4, 12), generator=torch.Generator().manual_seed(5))
    hook, error = Hook(model, 0), 0.5 * draw(44, 16, seed=7).float()
    result = evaluate(hook, rows, {"x": lambda h, mean: h + error}, 4, terms=expe_attention.terms)["x"]
    sums = Sums({q: v[None] for q, v in result.sums.items()}, np.ones((1, 4)), 16)
    values = {name: float(v[0, 0]) for name, v in computed(sums, expe_attention.OWN).items()}
    model = model.double()
    h = Hook(model, 0).head(rows)
    h_hat = h.clone()
    h_hat[:, :-1] += error.view(4, 11, 16)
    eager = Eager(model, 0)
    (log_p, a, v), (log_q, b, v_hat) = eager.run(rows, h), eager.run(rows, h_hat)
    a, b, v, v_hat = (torch.stack([x[1], x[2]])[..., 1:-1, :].double() for x in (a, b, v, v_hat))
    kl = torch.where(a > 0, a * (a.clamp(min=1e-30) / b.clamp(min=1e-30)).log(), 0).sum(-1)

    def ce(log_p):
        return -log_p.gather(-1, rows[:, 1:, None]).mean().item()

    frozen = ce(eager.run(rows, h_hat, eager.run(rows, h)[1])[0])
    plan_only = ce(eager.run(rows, h, eager.run(rows, h_hat)[1])[0])
    dce = ce(log_q) - ce(log_p)
    truth = dict(
        plan_kl=kl.mean(),
        plan_next=kl[0].mean(),
        to_first_hat=b[..., 0].mean(),
        plan_entropy=-torch.special.xlogy(a, a).sum(-1).mean(),
        dce_frozen=frozen - ce(log_p),
        dce_plan_only=plan_only - ce(log_p),
        mediated=1 - (frozen - ce(log_p)) / dce,
        plan_only=(plan_only - ce(log_p)) / dce,
    )
    truth = {name: float(x) for name, x in truth.items()}
    assert {name: values[name] for name in truth} == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("name, why", [("gemma2", "soft-capped scores"), ("bloom", "cannot be exchanged")])
def test_a_family_whose_attention_cannot_be_read_says_so(name, why):
    model = make(name)
    with pytest.raises(UserError, match=why):
        check_readable(Hook(model, 1), torch.arange(3, 15)[None])


def test_every_block_after_the_hook_must_attend():
    """A block of another kind would let the patch past frozen plans."""
    model = tiny_model(layers=4)
    block = model.gpt_neox.layers[2]
    block.attention.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(UserError, match=r"blocks \[2, 3\] after the hook, and was in \[3\]"):
        check_readable(Hook(model, 1), torch.arange(12)[None])
    check_readable(Hook(model, 2), torch.arange(12)[None])


@pytest.mark.slow
def test_refused_before_anything_is_trained(tmp_path):
    folders = ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    grid = ["--models", "stdlib-s@5", "--k", "2", "--tokens", "1k", "--eval-seqs", "2", "--ctx", "8"]
    last = script("expe_attention.py", *grid, *folders, check=2)
    assert "no attention follows" in one_line(last)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three hooks, one of them the last block's."""
    folder = tmp_path_factory.mktemp("expe")
    hooks = "--models stdlib-s@3,stdlib-s@4,stdlib-s@5 --k 2,8 --tokens 3k"
    size = "--eval-seqs 4 --ctx 32 --expansion 2 --device cpu"
    where = ["--out", folder / "out", "--cache", folder / "cache"]
    script("expe_attention.py", *f"{hooks} {size}".split(), *where)
    return folder / "out"


def table(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_last_block_stands_in_no_comparison(small):
    rows = table(small / "conditions.csv")
    own = [metric.name for metric in expe_attention.OWN]
    for row in rows:
        undefined = [row[name] == "undefined" for name in own]
        assert all(undefined) if row["layer"] == "5" else not any(undefined) or row["recipe"] == "null"
    board = [row for row in table(small / "leaderboard.csv") if row["stratum"] == "pooled"]
    assert {row["n_cells"] for row in board} == {"4"} and {row["n_clusters"] for row in board} == {"2"}
    ranked = {row["proxy"]: row["partial"] for row in board if row["target"] == "ce_rec"}
    assert {"plan_kl", "plan_next", "kl", "r2", "cosine", "swd_tok", "nmse_tok"} <= ranked.keys()
    assert "undefined" not in ranked.values()
    verdict = json.loads((small / "verdict.json").read_text())
    assert verdict["leaf"] == "undecided" and verdict["n_clusters"] == 2
    report = (small / "report.md").read_text()
    assert "P: undecided." in report and "Left out" in report


@pytest.mark.slow
def test_the_map_and_the_columns_are_one_measurement(small):
    """Mean over blocks and heads of depth.csv = plan_kl of the middle SAE; a block and head in it once."""
    depth = [row for row in table(small / "depth.csv") if row["layer"] != "5"]
    found = " ".join(row["layer"] + row["block"] + row["head"] for row in depth)
    assert found == "340 341 350 351 450 451"
    assert [row["kl"] for row in table(small / "depth.csv") if row["layer"] == "5"] == ["undefined"]
    for row in table(small / "conditions.csv"):
        of_hook = [float(r["kl"]) for r in depth if (r["layer"], r["k"]) == (row["layer"], row["k"])]
        if row["recipe"] != "null" and of_hook:
            assert np.mean(of_hook) == pytest.approx(float(row["plan_kl"]), rel=1e-4)


@pytest.mark.slow
def test_tables_are_made_from_files_alone(small, tmp_path):
    before = contents(small)
    script("expe_attention.py", "--from", small)
    assert contents(small) == before


# ------------------------------------------------------------------------------------------ planted answers
def planted(models=("s", "l"), layers=(0, 1, 2, 3), ks=(4, 8)):
    grid = [(m, layer, k) for m in models for layer in layers for k in ks]
    model, layer, k = (np.array(column) for column in zip(*grid))
    return dict(model=model, layer=layer, k=k, depth=layer.astype(str), tokens=np.zeros(len(k)))


N_RESAMPLES = 200


def test_larger_minus_smaller_is_of_the_same_depth_and_k():
    meta = planted()
    y = 0.3 * (meta["model"] == "l") + 0.1 * meta["layer"] - 0.2 * meta["k"]

    def found(y, meta):
        return over_hooks.larger_minus_smaller(np.tile(y, (3, 1)), meta, ["s", "l"], N_RESAMPLES)

    more = found(y, meta)
    assert more["value"] == pytest.approx(0.3) and more["lo"] == pytest.approx(0.3) and more["n"] == 4
    assert over_hooks.side_of_zero(more, "more", "less") == "more"
    assert over_hooks.side_of_zero(found(-y, meta), "more", "less") == "less"
    other = meta | {"k": meta["k"] + (meta["model"] == "l")}  # no k in common
    assert np.isnan(found(y, other)["value"])


def test_means_and_correlations_over_hooks():
    model, layer = np.repeat(["s", "m", "l"], 4), np.tile(np.arange(4), 3)
    hooks, rng = {"model": model, "layer": layer}, np.random.default_rng(0)
    v = 1 + 0.1 * rng.standard_normal(12)
    found = over_hooks.mean_over_hooks(v[None], hooks, N_RESAMPLES)
    assert found["value"] == pytest.approx(v.mean()) and 0.8 < found["lo"] < v.mean() < found["hi"]
    # within models PR and plan go apart, though the larger model has more of both
    x = layer + 0.1 * rng.standard_normal(12)
    y = -x + 10 * (model == "l") + 0.1 * rng.standard_normal(12)
    of_pr = over_hooks.correlation_within_models(x + 10 * (model == "l"), y[None], hooks, N_RESAMPLES)
    assert -1 <= of_pr["value"] < -0.9 and over_hooks.side_of_zero(of_pr, "less", "more") == "more"
    few = {name: column[:5] for name, column in hooks.items()}
    found = over_hooks.mean_over_hooks(v[None, :5], few, N_RESAMPLES)
    assert over_hooks.side_of_zero(found, "a", "b") == "undecided"


def test_the_map_by_hand():
    depth = [
        dict(model="s", layer=layer, k=4, block=block, head=head, kl=kl + head)
        for layer, of in ((1, {2: 8.0, 3: 1.0, 4: 3.0}), (3, {4: 1.0}))
        for block, kl in of.items()
        for head in (-0.5, 0.5)
    ] + [dict(model="s", layer=4, k=4, block=math.nan, head=math.nan, kl=math.nan)]
    hooks = [dict(model="s", layer=layer, pr=9 - layer, pr_nosink=1) for layer in (1, 3, 4)]
    rows = attention_map.by_block(depth, hooks)
    first, second = rows
    assert first["kl"].tolist() == [8, 1, 3] and first["share"] == pytest.approx(8 / 12)
    assert first["first_over_rest"] == pytest.approx(2) and [row["pr"] for row in rows] == [8, 6]
    assert second["share"] == 1 and math.isnan(second["first_over_rest"])
    assert not attention_map.is_lowest(first, rows) and attention_map.is_lowest(second, rows)


def test_shares_are_ratios_of_a_hooks_sums():
    meta = planted(models=("s",), layers=(0, 1), ks=(4, 8))
    dce, frozen, plan_only = [[2.0, 1, 4, 4]], [[1.0, 0.5, 4, 2]], [[0.3, 0, 0, 8]]
    columns = dict(dce=dce, dce_frozen=frozen, dce_plan_only=plan_only)
    values = {name: np.array(column) for name, column in columns.items()}
    rows, _ = expe_attention.shares(SimpleNamespace(values=values, meta=meta))
    assert [row["mediated"] for row in rows] == pytest.approx([0.5, 0.25])
    assert [row["plan_only"] for row in rows] == pytest.approx([0.1, 1.0])


def test_the_rule():
    leaf = expe_attention.leaf_p
    assert leaf(0.2, 0.04) == "supported" and leaf(math.nan, 1) == "undecided"
    assert leaf(0.19, 0.01) == leaf(0.9, 0.05) == "rejected"
