"""From a command to a results folder: what is missing there is trained and measured, by as many ranks as
there are.

Shapes: C conditions, S evaluation sequences.
"""

import contextlib
import ctypes
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from transport_geometry import flops, kernels, torchrun
from transport_geometry.errors import Fault, UserError
from transport_geometry.measuring.evaluate import (
    DRAWS,
    PATCHED_RUNS,
    Activations,
    Reconstruction,
    Result,
    Terms,
    activations,
    evaluate,
    keeping_clean_runs,
)
from transport_geometry.measuring.metrics import METRICS, Metric, Sums, code_metrics, computed
from transport_geometry.measuring.r2_by_library import r2_by_library
from transport_geometry.models import plant
from transport_geometry.models.lm import (
    Hook,
    check_parity,
    keeping_heads,
    pick_device,
    text_config,
)
from transport_geometry.models.plant import TurnedSAE, sensitivity_basis
from transport_geometry.progress import Progress
from transport_geometry.records import store
from transport_geometry.records.condition import NULLS, Condition
from transport_geometry.records.results import (
    ROW_VERSION,
    Measurements,
    add_results,
    check_verdict,
    finished_run,
    gather,
    in_record,
    load_results,
    next_free_folder,
    open_output,
    with_training,
)
from transport_geometry.records.store import RUN
from transport_geometry.reporting.where_it_hurts import HARM, WORST, by_position, worst_tokens
from transport_geometry.running.cost import dry_run
from transport_geometry.running.grid import Candidate, Command, EvalSet, Grid, plan
from transport_geometry.saes.external_saes import ExternalSAE
from transport_geometry.saes.sae import SAE, WEIGHTS, TrainingSpec, load_sae, tied_init
from transport_geometry.saes.train import runs_of, train_missing, training_flops
from transport_geometry.text import heldout

import numpy as np
import torch

# bytes of SAEs evaluated together; the clean pass is computed once for each such lot
SAES_AT_ONCE = 4 * 10**9
TURNED_BY = 16  # rows that say which directions change the logits
CPU = torch.device("cpu")
Table = list[dict]


@dataclass(frozen=True)
class Experiment:
    """What a script measures besides the metrics that all have."""

    name: str  # of the script
    terms: Terms | None = None  # Patch -> {quantity: [B,T-1]}
    metrics: tuple[Metric, ...] = ()  # columns that it appends, from those quantities' sums
    # (eval_set, middle SAE, device) -> {file name: rows}, each row with model and layer; once per hook
    study: Callable[[EvalSet, SAE, torch.device], dict[str, Table]] | None = None
    more_passes: int = 0  # what its terms cost an SAE, in passes through the tail
    study_passes: int = 0  # and its study a hook, in passes of the evaluation text
    # raises UserError for hooks that it cannot measure, before anything is trained or written
    check: Callable[[list[EvalSet]], None] | None = None
    # does its study patch SAEs? It knows neither --leave-sinks nor what `+turned` makes of an SAE
    study_patches: bool = False
    where: bool = False  # are the positions and tokens kept that a patch harms?
    # its folder where no other was asked for: a run with other settings is left there, and this one goes
    # beside it
    default_out: pathlib.Path | None = None


@dataclass(eq=False)
class Share:
    """What one rank measures of an evaluation set, at once."""

    eval_set: EvalSet
    candidates: list[Candidate] = field(default_factory=list)
    with_nulls: bool = False

    @property
    def needed(self) -> list[Candidate]:
        """The SAEs that it takes: those it measures, and the one that the null rows take as their model."""
        model = [self.eval_set.middle] if self.with_nulls else []
        return [one for one in self.eval_set.candidates if one in self.candidates or one in model]

    def __len__(self) -> int:
        return len(self.candidates) + self.with_nulls


# ------------------------------------------------------------------------------------------ the whole
def run(command: Command, experiment: Experiment) -> tuple[pathlib.Path, dict] | None:
    """Everything up to the results folder: (folder, settings), or None after --dry-run and for all ranks of
    torchrun but the first.

    Conditions that the folder already has are kept; --from takes a finished folder and runs nothing. Raises
    UserError.
    """
    if (command.finished or command.dry_run) and torchrun.RANK:
        return None
    if command.finished:
        done = finished_run(command.finished, experiment.name)
        check_verdict(command.finished)
        return done
    if command.dry_run:
        dry_run(command, experiment.more_passes)
        return None
    grid = command.grid
    device = pick_device(command.device)
    torchrun.join(device)
    keep_freed_memory()
    torchrun.say(kernels.in_short())
    settings, eval_sets = plan(grid, device, experiment.name, command.cache)
    if device.type == "mps" and command.device == "auto":
        try:
            check_parity(eval_sets[0].hook, eval_sets[0].held.input_ids[:2], device)
        except Fault as why:
            print(f"{why}; going on with the CPU")
            device = CPU
            settings, eval_sets = plan(grid, device, experiment.name, command.cache)
    settings |= {"rows": ROW_VERSION, **command.own}
    if experiment.check:
        experiment.check(eval_sets)
    turns = any(one.turn for eval_set in eval_sets for one in eval_set.candidates)
    if experiment.study_patches and (grid.leave_sinks or turns):
        what = "--leave-sinks" if grid.leave_sinks else "+turned"
        raise UserError(f"{what}: not for {experiment.name}.py, whose tables would be partly without it")
    if command.out == experiment.default_out and not command.fresh:
        command = replace(command, out=next_free_folder(command.out, settings))
        if command.out != experiment.default_out:
            torchrun.say(f"{experiment.default_out} holds another run: this one goes into {command.out}")
    out, start = command.out, time.time()
    if torchrun.RANK == 0:
        typed = [*(plant.split(name)[0] for name, _ in grid.models), grid.data]
        paths = {name: str(pathlib.Path(name).resolve()) for name in typed if os.path.exists(name)}
        open_output(out, settings, command.fresh, paths)
        gather(out, settings)
    torchrun.wait()
    missing = not_measured(eval_sets, out)
    training = [] if grid.saes else training_shares(missing)
    measuring = descending(shares(missing))
    works = [one.flops(command.cache) for one in training]
    total = sum(works) + sum(evaluation_work(one, experiment)[0] for one in measuring)
    with contextlib.closing(Progress(total)) as bar:
        with heldout.keeping_rows():
            train(training, works, command.cache, device, bar)
        torchrun.wait()
        part = out / f".rank{torchrun.RANK}" if torchrun.WORLD > 1 else out
        with keeping_heads(one.eval_set.hook for one in measuring), keeping_clean_runs():
            for share in measuring:
                bar.phase(f"evaluating {share.eval_set.label}", *evaluation_work(share, experiment))
                add_results(part, settings, measure(share, command, device, experiment, bar))
                bar.end()
    torchrun.leave()
    if torchrun.RANK:
        return None
    gather(out, settings)
    if lost := sum(map(len, not_measured(eval_sets, out))):
        raise Fault(f"{lost} of the results are not in {out}: do all ranks write to the same --out?")
    found = seen_in_training(eval_sets, command)
    store.put(out / RUN, {}, ranks=torchrun.WORLD, seconds=round(time.time() - start, 1), **found)
    return out, with_training(settings, found)


def keep_freed_memory() -> None:
    """Tell glibc to keep up to 1 GB of what is freed: left to itself it gives arrays of some MB back to the
    system and takes them anew, page by page, in every batch. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def seen_in_training(eval_sets: list[EvalSet], command: Command) -> dict:
    """What this run's SAEs met, and those before it: `one_pass`, tokens of the texts that budgets repeat, and
    `trained_on`, {processor: SAEs}.
    """
    before = store.load(command.out / RUN)
    one_pass, on = set(before.get("one_pass", [])), dict[str, set[str]]()
    for name, saes in before.get("trained_on", {}).items():
        on[name] = set(saes)
    for candidate in (one for eval_set in eval_sets for one in eval_set.candidates):
        if isinstance(candidate.origin, TrainingSpec):
            record = store.load(candidate.origin.folder(command.cache) / store.PROVENANCE)
            one_pass |= {record.get("one_pass")} - {None}
            if name := record.get("processor"):
                on.setdefault(name, set()).add(in_record(candidate.condition))
    return {
        "one_pass": sorted(one_pass),
        "trained_on": {name: sorted(saes) for name, saes in sorted(on.items())},
    }


def not_measured(eval_sets: list[EvalSet], out: pathlib.Path) -> list[Share]:
    """What the results folder has no rows of, one evaluation set at a time."""
    there = {Condition.of(row) for row in load_results(out)[0]}
    return [
        Share(
            eval_set,
            [one for one in eval_set.candidates if one.condition not in there],
            with_nulls=eval_set.nulls[0] not in there,
        )
        for eval_set in eval_sets
    ]


# ------------------------------------------------------------------------------------------ training
@dataclass(frozen=True, eq=False)
class TrainingShare:
    """What one rank trains of the SAEs of one language model, on one text."""

    eval_sets: list[EvalSet]  # its hooks
    specs: list[TrainingSpec]

    @property
    def label(self) -> str:
        first, *more = self.eval_sets
        return f"SAEs of {first.name}, {len(more) + 1} hooks" if more else f"SAEs of {first.label}"

    def flops(self, cache: pathlib.Path) -> float:
        """Of what the cache has not."""
        todo = {spec.folder(cache): spec for spec in self.specs}
        runs = runs_of({path: spec for path, spec in todo.items() if not (path / WEIGHTS).exists()})
        return training_flops(self.eval_sets[0].hook.model, runs)


def training_shares(missing: list[Share]) -> list[TrainingShare]:
    """This rank's share of the SAEs that the missing rows need, a language model at a time; budgets of one
    trunk stay together.

    Ranks share out hooks, and the SAEs of a hook where there are more ranks than hooks: a rank runs the model
    no further than its last hook. Shared by SAEs, every rank would run it to the last of all.
    """
    families: dict[tuple, list[TrainingSpec]] = {}
    for number, share in enumerate(missing):
        for spec in (one.origin for one in share.needed):
            assert isinstance(spec, TrainingSpec)
            key = (number, spec.sinks, spec.recipe, spec.k, spec.seed)
            families.setdefault(key, []).append(spec)
    work = [
        sum(spec.tokens * flops.of_training(missing[number].eval_set.d, spec.d_sae) for spec in specs)
        for (number, *_), specs in families.items()
    ]
    of_text: dict[tuple, tuple[dict[int, EvalSet], list[TrainingSpec]]] = {}
    for (number, *_), specs in torchrun.share(list(families.items()), work):
        eval_set = missing[number].eval_set
        one = specs[0]
        same = id(eval_set.hook.model), eval_set.source.content, one.ctx, one.split, one.bos
        hooks, theirs = of_text.setdefault(same, ({}, []))
        hooks[number] = eval_set
        theirs += specs
    return [TrainingShare(list(hooks.values()), specs) for hooks, specs in of_text.values()]


def train(
    training: list[TrainingShare],
    works: list[float],
    cache: pathlib.Path,
    device: torch.device,
    bar: Progress,
) -> None:
    """Train those of the SAEs that the cache has not. works: the FLOPs of each share."""
    for share, work in zip(training, works):
        first = share.eval_sets[0]
        for eval_set in share.eval_sets:
            check_device_matches_cpu(eval_set, device)
        bar.phase(f"training {share.label}", work, work)
        model = first.hook.to(device).model
        train_missing(model, first.tokenizer, share.specs, cache, first.source, bar)
        bar.end()
        first.hook.to(CPU)


def check_device_matches_cpu(eval_set: EvalSet, device: torch.device) -> None:
    """Raises Fault where the device computes this hook otherwise than the CPU."""
    if device.type != "cpu":
        check_parity(eval_set.hook, eval_set.held.input_ids[:2], device)


# ------------------------------------------------------------------------------------------ measuring
def shares(missing: list[Share]) -> list[Share]:
    """This rank's share of the missing rows, cut where the SAEs would fill the memory."""
    items: list[tuple[EvalSet, Candidate | None]] = []  # None: the null rows
    for share in missing:
        items += [(share.eval_set, one) for one in share.candidates]
        items += [(share.eval_set, None)] if share.with_nulls else []
    work = [flops.of_tail(eval_set.hook) * (len(NULLS) if one is None else 1) for eval_set, one in items]
    out: list[Share] = []
    filled = 0
    for eval_set, one in torchrun.share(items, work):
        size = 8 * eval_set.d * (one or eval_set.candidates[0]).condition.d_sae
        if not out or out[-1].eval_set is not eval_set or filled + size > SAES_AT_ONCE:
            out.append(Share(eval_set))
            filled = 0
        if one is None:
            out[-1].with_nulls = True
        else:
            out[-1].candidates.append(one)
        filled += size
    return out


def descending(shares: list[Share]) -> list[Share]:
    """Each model's hooks from the last to the first: an earlier one's gradients go on from a later one's."""
    models = list(dict.fromkeys(id(share.eval_set.hook.model) for share in shares))
    order = {id(share): i for i, share in enumerate(shares)}
    return sorted(
        shares,
        key=lambda s: (models.index(id(s.eval_set.hook.model)), -s.eval_set.hook.layer, order[id(s)]),
    )


def evaluation_work(share: Share, experiment: Experiment) -> tuple[float, float]:
    """(FLOPs, sequences of all reconstructions) of a share."""
    hook, n = share.eval_set.hook, share.eval_set.held.input_ids.numel()
    n_saes = len(share.candidates) + len(NULLS) * share.with_nulls
    codes = [one.condition.d_sae for one in share.candidates]
    passes = (PATCHED_RUNS + experiment.more_passes) * n_saes + experiment.study_passes * share.with_nulls
    work = n * flops.of_evaluation(hook.model, hook.layer, passes, 1 + DRAWS, sum(codes))
    return work, n_saes * len(share.eval_set.held.input_ids)


def eval_batch(hook: Hook, ctx: int, vocabulary: bool = True) -> int:
    """Sequences at a time: 8 MB of logits on the CPU (more leaves the cache, and malloc returns it page by
    page), 256 MB elsewhere. Where logits are made a tile at a time and not kept (`vocabulary` False), 1024
    tokens at least.
    """
    logits = 2 ** (21 if hook.device.type == "cpu" else 26)
    tokens = logits // text_config(hook.model).vocab_size
    return max(1, (tokens if vocabulary else max(tokens, 1024)) // ctx)


def load(candidate: Candidate, cache: pathlib.Path) -> SAE:
    """Its SAE, on the CPU."""
    if isinstance(candidate.origin, ExternalSAE):
        return candidate.origin.load()
    return load_sae(candidate.origin.folder(cache), CPU)


def null_rows(eval_set: EvalSet, trained: SAE) -> dict[Condition, Reconstruction]:
    """What a score must be seen beside: nothing lost, everything lost, an untrained dictionary, and an error
    without direction.

    The random dictionary and the Gaussian error (same norm per token) take the middle SAE of the grid as
    their model.
    """
    origin, b_dec = eval_set.middle.origin, trained.b_dec
    if isinstance(origin, ExternalSAE):  # it may be of normalised activations
        b_dec = origin.mean.to(trained.b_dec.device)
    identity, everything, random, gaussian = eval_set.nulls
    noise = torch.Generator().manual_seed(10**6)

    def turned(h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        error = trained.reconstruct(h)[2] - h
        direction = torch.randn(h.shape, generator=noise).to(h.device)
        norm = torch.linalg.vector_norm
        return h + direction * (norm(error, dim=1) / norm(direction, dim=1))[:, None]

    return {
        identity: lambda h, mean: h,
        everything: lambda h, mean: mean.expand_as(h),
        random: tied_init(eval_set.d, random.d_sae, random.k, 10**6, b_dec).requires_grad_(False),
        gaussian: turned,
    }


def measure(
    share: Share, command: Command, device: torch.device, experiment: Experiment, bar: Progress | None = None
) -> Measurements:
    """Evaluate a share: its SAEs, its null rows, and what the experiment studies once per hook with them."""
    eval_set, grid = share.eval_set, command.grid
    check_device_matches_cpu(eval_set, device)
    hook, input_ids, document = eval_set.hook.to(device), eval_set.held.input_ids, eval_set.held.document
    saes = {one.condition: load(one, command.cache).to(device) for one in share.candidates}
    reconstructions: dict[Condition, Reconstruction] = {**saes, **turned(share, saes, grid)}
    if share.with_nulls:
        trained = load(eval_set.middle, command.cache).to(device)
        reconstructions |= null_rows(eval_set, trained)
    batch = eval_batch(hook, input_ids.shape[1], vocabulary=bool(experiment.terms))
    shared = activations(hook, input_ids, batch)
    results = evaluate(
        hook,
        input_ids,
        reconstructions,
        batch,
        keep_tokens=grid.save_tokens,
        leave_sinks=grid.leave_sinks,
        terms=experiment.terms,
        shared=shared,
        document=document,
        label=eval_set.label,
        bar=bar,
    )
    tables = experiment.study(eval_set, trained, device) if experiment.study and share.with_nulls else {}
    definitions = r2_by_library(shared, reconstructions, device) if grid.saes else {}
    if experiment.where:
        harm = {one: results[one].harm for one in saes}
        tables |= {
            HARM: [row for one in harm for row in by_position(one, harm[one])],
            WORST: [
                row
                for one in harm
                for row in worst_tokens(one, harm[one], input_ids, document, eval_set.tokenizer)
            ],
        }
    hook.to(CPU)
    conditions = list(results)
    names = results[conditions[0]].sums
    sums = {q: np.stack([results[one].sums[q] for one in conditions]) for q in names}
    rows = table(eval_set, results, sums, shared, experiment)
    for one, row in zip(conditions, rows):
        row |= definitions.get(one, {})
    if grid.saes:
        origins = {one.condition: one.origin for one in share.candidates}
        for one, row in zip(conditions, rows):
            for column in ("fvu_as_said", "fvu_otherwise"):
                row[column] = getattr(origins.get(one), column, np.nan)
    sums["d"] = np.full(len(conditions), eval_set.d)
    sums["document"] = np.tile(document, (len(conditions), 1))
    tokens = {
        f"{one.hook}/{one.within_hook}/{q}": v for one in conditions for q, v in results[one].tokens.items()
    }
    return Measurements(rows, sums, tokens, tables)


def turned(share: Share, saes: dict[Condition, SAE], grid: Grid) -> dict[Condition, Reconstruction]:
    """Those whose errors are to be turned, turned: which directions change the logits, a few rows of the
    training text say.
    """
    turns = {one.condition: one.turn for one in share.candidates if one.turn}
    if not turns:
        return {}
    eval_set, hook = share.eval_set, share.eval_set.hook
    ctx = eval_set.held.input_ids.shape[1]
    source, tokenizer, bos = eval_set.source, eval_set.tokenizer, eval_set.bos
    rows = heldout.train_rows(source.data, tokenizer, ctx, TURNED_BY, grid.split, bos=bos)
    directions = sensitivity_basis(hook, next(rows).to(hook.device))
    return {one: TurnedSAE(saes[one], directions, turn) for one, turn in turns.items()}


def table(
    eval_set: EvalSet,
    results: dict[Condition, Result],
    sums: dict[str, np.ndarray],
    shared: Activations,
    experiment: Experiment,
) -> Table:
    """The rows of conditions.csv; sums {quantity: [C,S]}."""
    n_seq, ctx = eval_set.held.input_ids.shape
    values = computed(Sums(sums, np.ones((1, n_seq)), eval_set.d), (*METRICS, *experiment.metrics))
    n_sink = int(shared.sink.sum())
    counts = dict(n_seq=n_seq, n_tok=n_seq * (ctx - 1), n_sink=n_sink, calm_share=shared.calm_share)
    n_tok = np.bincount(eval_set.held.document % 2, minlength=2) * (ctx - 1)
    rows = []
    for i, (condition, result) in enumerate(results.items()):
        row = vars(condition) | counts | dict.fromkeys(("alive", "dense", "bits_idx", "bits"), np.nan)
        row |= {name: float(value[0, i]) for name, value in values.items()}
        if stored := getattr(eval_set.hook.model, "stored_as", ""):
            row["weights"] = stored
        if result.fired is not None:
            row |= code_metrics(result.fired, n_tok, row["l0"])
        rows.append(row)
    return rows
