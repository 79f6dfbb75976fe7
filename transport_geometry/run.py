"""TODO run."""

import os
import pathlib
import time

from transport_geometry import formats, kernels, ranks, store
from transport_geometry.cost import OVERHEAD, block_size, dry_run
from transport_geometry.errors import Fault
from transport_geometry.evaluate import evaluate, hook_statistics
from transport_geometry.grid import KEY, NULLS, plan
from transport_geometry.libraries import r2_by_library
from transport_geometry.lm import check_parity, pick_device
from transport_geometry.metrics import VALUE_BITS, index_bits, metrics
from transport_geometry.results import (
    add_results,
    check_verdict,
    finished_run,
    gather,
    load_results,
    open_output,
    with_passes,
)
from transport_geometry.sae import cache_folder, load_sae, tied_init
from transport_geometry.store import RUN
from transport_geometry.train import train_missing

import numpy as np
import torch
from tqdm import tqdm

# bytes of SAEs evaluated together; the clean pass is computed once for each such lot
SAES_AT_ONCE = 4 * 10**9


# ----------------------------------------------------------------------------------------------------- run
def eval_batch(model, ctx: int, device: torch.device) -> int:
    """Sequences at a time: 8 MB of logits on the CPU (more leaves the cache, and malloc returns it page by
    page), 256 MB elsewhere.
    """
    return max(1, 2 ** (21 if device.type == "cpu" else 26) // (ctx * model.config.vocab_size))


def null_rows(hook: dict, trained: torch.nn.Module) -> dict:
    """What a score must be seen beside: nothing lost, everything lost, an untrained dictionary, and an error
    without direction.

    The random dictionary and the Gaussian error (same norm per token) take the middle SAE of the grid as
    their model.
    """
    job = hook["jobs"][len(hook["jobs"]) // 2]
    # another's may be of normalised activations
    b_dec = job["mean"].to(trained.b_dec.device) if "mean" in job else trained.b_dec
    random = tied_init(
        hook["d"], len(trained.W_dec), trained.k or job["typical_k"], 10**6, b_dec
    ).requires_grad_(False)
    noise = torch.Generator().manual_seed(10**6)

    def gaussian(h, mean):
        error = trained.reconstruct(h)[2] - h
        direction = torch.randn(h.shape, generator=noise).to(h.device)
        return (
            h
            + direction
            * (torch.linalg.vector_norm(error, dim=1) / torch.linalg.vector_norm(direction, dim=1))[:, None]
        )

    shape = {"null-random": (len(random.W_dec), random.k)}
    made = {
        "null-identity": lambda h, mean: h,
        "null-mean": lambda h, mean: mean.expand_as(h),
        "null-random": random,
        "null-gaussian": gaussian,
    }
    return {
        (name, "null", *shape.get(null, (0, 0)), 0, 0): made[null] for null, name in zip(NULLS, hook["nulls"])
    }


def load(hook: dict, i: int, args) -> torch.nn.Module:
    """SAE i of the hook, on the CPU."""
    job = hook["jobs"][i]
    if not args.sae:
        return load_sae(cache_folder(args.cache, job), torch.device("cpu"))
    sae = formats.read(job["file"])
    sae.centred = job["declared"].basis == "centred"
    return formats.fused(sae)


def run_hook(
    hook: dict,
    args,
    device: torch.device,
    which: list[int],
    with_nulls: bool,
    terms=None,
    own_metrics=None,
    study=None,
) -> tuple:
    """Evaluate SAEs `which` of one hook, and its null rows: (rows, sums {quantity: [C,S]}, per-token arrays,
    own tables).

    An experiment's own: terms, see `proxies.evaluate`; own_metrics(sums, weights) -> {column: [W,C]} from
    their sums; study(hook, middle SAE, device) -> {name of a table: rows}, each row with the hook's model and
    layer; it comes with the null rows.
    """
    model, middle = hook["model"], len(hook["jobs"]) // 2
    if device.type != "cpu":
        check_parity(model, hook["layer"], hook["rows"][:2], device)
    model.to(device)
    reconstructions = {hook["names"][i]: load(hook, i, args).to(device) for i in which}
    trained = load(hook, middle, args).to(device) if with_nulls else None
    if with_nulls:
        reconstructions |= null_rows(hook, trained)
    n_seq, ctx = hook["rows"].shape
    batch = eval_batch(model, ctx, device)
    shared = hook_statistics(model, hook["layer"], hook["rows"], batch)
    results = evaluate(
        model,
        hook["layer"],
        hook["rows"],
        reconstructions,
        batch,
        keep_tokens=args.save_tokens,
        what=f"{hook['name']} L{hook['layer']}",
        terms=terms,
        shared=shared,
        document=hook["document"],
    )
    tables = study(hook, trained, device) if study and with_nulls else {}
    definitions = r2_by_library(shared, reconstructions, device) if args.sae else {}
    model.to("cpu")
    names = list(reconstructions)
    sums = {q: np.stack([results[name]["sums"][q] for name in names]) for q in results[names[0]]["sums"]}
    point = metrics(sums, np.ones((1, n_seq)), hook["d"]) | (
        own_metrics(sums, np.ones((1, n_seq))) if own_metrics else {}
    )
    rows = []
    for i, name in enumerate(names):
        row = dict(zip(KEY, (hook["name"], hook["layer"], *name)))
        row |= {
            "n_seq": n_seq,
            "n_tok": n_seq * (ctx - 1),
            "n_sink": results[name]["n_sink"],
            "alive": np.nan,
            "bits_idx": np.nan,
            "bits": np.nan,
        }
        row |= {metric: float(value[0, i]) for metric, value in point.items()}
        fired = results[name]["fired"]
        if not isinstance(fired, int):
            row["alive"] = float((fired.sum(0) > 0).double().mean())
            row["bits_idx"] = index_bits(
                fired.numpy(), np.bincount(hook["document"] % 2, minlength=2) * (ctx - 1)
            )
            row["bits"] = row["bits_idx"] + VALUE_BITS * row["l0"]
        if args.sae:
            job = hook["jobs"][which[i]] if i < len(which) else {}
            row |= definitions[name] | {
                column: job.get(column, np.nan) for column in ("fvu_as_said", "fvu_otherwise")
            }
        rows.append(row)
    sums["d"] = np.full(len(names), hook["d"])
    sums["document"] = np.tile(hook["document"], (len(names), 1))
    tokens = {
        f"{hook['name']}@{hook['layer']}/" + "-".join(map(str, name)) + f"/{q}": v
        for name in names
        for q, v in results[name]["tokens"].items()
    }
    return rows, sums, tokens, tables


def run(
    args, script: str, terms=None, own_metrics=None, study=None, more_passes: int = 0
) -> tuple[pathlib.Path, dict] | None:
    """Everything up to the results folder: (folder, settings), or None after --dry-run and for all ranks of
    torchrun but the first.

    Conditions that the folder already has are kept; --from takes a finished folder and runs nothing. Raises
    UserError.
    """
    if (args.from_dir or args.dry_run) and ranks.RANK:
        return None
    if args.from_dir:
        done = finished_run(args.from_dir, script)
        check_verdict(args.from_dir)
        return done
    if args.dry_run:
        return dry_run(args, more_passes)
    device = pick_device(args.device)
    ranks.join(device)
    ranks.say(kernels.describe())
    settings, hooks = plan(args, device, script)
    if device.type == "mps" and args.device == "auto":
        try:
            check_parity(hooks[0]["model"], hooks[0]["layer"], hooks[0]["rows"][:2], device)
        except Fault as why:
            print(f"{why}; going on with the CPU")
            device = torch.device("cpu")
            settings, hooks = plan(args, device, script)
    start = time.time()
    if ranks.RANK == 0:
        paths = {
            name: str(pathlib.Path(name).resolve())
            for name, _ in [*args.models, (args.data, None)]
            if os.path.exists(name)
        }
        open_output(args.out, settings, args.fresh, paths)
        gather(args.out, settings)
    ranks.wait()
    missing = not_measured(hooks, args.out)
    if not args.sae:
        train(missing, args, device)
    ranks.wait()
    part = args.out / f".rank{ranks.RANK}" if ranks.WORLD > 1 else args.out
    for hook, which, with_nulls in tqdm(shares(missing), desc="hooks", leave=False):
        add_results(
            part, settings, *run_hook(hook, args, device, which, with_nulls, terms, own_metrics, study)
        )
    ranks.leave()
    if ranks.RANK:
        return None
    gather(args.out, settings)
    if lost := sum(len(which) + with_nulls for _, which, with_nulls in not_measured(hooks, args.out)):
        raise Fault(f"{lost} of the results are not in {args.out}: do all ranks write to the same --out?")
    passes = set(store.load(args.out / RUN).get("one_pass", []))
    for folder in (
        [] if args.sae else [cache_folder(args.cache, job) for hook in hooks for job in hook["jobs"]]
    ):
        passes |= {store.load(folder / store.PROVENANCE).get("one_pass")} - {None}
    store.put(
        args.out / RUN, {}, ranks=ranks.WORLD, seconds=round(time.time() - start, 1), one_pass=sorted(passes)
    )
    return args.out, with_passes(settings, sorted(passes))


def not_measured(hooks: list[dict], out: pathlib.Path) -> list[tuple]:
    """[(hook, indices of SAEs, null rows?)]: what the results folder has no rows of."""
    there = {tuple(row[c] for c in KEY) for row in load_results(out)[0]}
    nulls = {key[:3] for key in there}
    return [
        (
            hook,
            [i for i, name in enumerate(hook["names"]) if (hook["name"], hook["layer"], *name) not in there],
            (hook["name"], hook["layer"], hook["nulls"][0]) not in nulls,
        )
        for hook in hooks
    ]


def train(missing: list[tuple], args, device: torch.device) -> None:
    """Train this rank's share of the SAEs that the missing rows need and the cache has not; budgets of one
    trunk stay together.
    """
    families = {}
    for number, (hook, which, with_nulls) in enumerate(missing):
        for i in sorted({*which, *([len(hook["jobs"]) // 2] if with_nulls else [])}):
            job = hook["jobs"][i]
            families.setdefault((number, job["sinks"], job["recipe"], job["k"], job["seed"]), []).append(job)
    mine = ranks.share(
        list(families.items()),
        [
            sum(job["tokens"] * (job["d_sae"] * missing[key[0]][0]["d"] + OVERHEAD) for job in jobs)
            for key, jobs in families.items()
        ],
    )
    for number, (hook, *_) in enumerate(missing):
        for sinks in args.sinks:
            jobs = [job for key, family in mine if key[:2] == (number, sinks) for job in family]
            if jobs:
                if device.type != "cpu":
                    check_parity(hook["model"], hook["layer"], hook["rows"][:2], device)
                train_missing(hook["model"].to(device), hook["tokenizer"], jobs, args.cache, hook["source"])
        hook["model"].to("cpu")


def shares(missing: list[tuple]) -> list[tuple]:
    """This rank's share of the missing rows, [(hook, indices of SAEs, null rows?)], cut where the SAEs would
    fill the memory.
    """
    items = [
        (number, i)
        for number, (_, which, with_nulls) in enumerate(missing)
        for i in which + [None] * with_nulls
    ]

    def tail(hook: dict) -> float:
        """What a token costs from the hook on, in multiplications."""
        config = hook["model"].config
        return (config.num_hidden_layers - 1 - hook["layer"]) * (
            block_size(hook["model"]) + OVERHEAD
        ) + config.vocab_size * (hook["d"] + 64)

    out, filled = [], 0
    mine = ranks.share(
        items, [tail(missing[number][0]) * (1 if i is not None else len(NULLS)) for number, i in items]
    )
    for number, i in mine:
        hook = missing[number][0]
        size = 8 * hook["d"] * hook["jobs"][i if i is not None else 0]["d_sae"]
        if not out or out[-1][0] is not hook or filled + size > SAES_AT_ONCE:
            out.append((hook, [], []))
            filled = 0
        out[-1][1 if i is not None else 2].append(i)
        filled += size
    return [(hook, which, bool(nulls)) for hook, which, nulls in out]
