"""Train the SAEs that the cache lacks: the stream of activations, passes of the language model over the text,
checkpoints.

Shapes: N tokens, d = d_model, F = d_sae, k = active latents.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transport_geometry import flops
from transport_geometry.errors import Damaged, Fault, UserError, reading
from transport_geometry.machine import processor
from transport_geometry.models.lm import Hook, block_outputs, text_config
from transport_geometry.progress import Progress, line
from transport_geometry.records import store
from transport_geometry.saes import recipes
from transport_geometry.saes.recipes import RECIPES, Statistics, Training
from transport_geometry.saes.sae import CHECKPOINT, TrainingSpec, is_whole, save_sae
from transport_geometry.saes.sinks import sink_positions
from transport_geometry.text import heldout

import torch
from torch import Tensor
from tqdm import tqdm

# share of the machine's or GPU's memory that the hooks of one pass may hold in activations and SAEs
MEMORY = 0.5


def memory_of(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(d: int, d_sae: int, device: torch.device) -> None:
    """Raises UserError where one SAE in training does not fit: weights, Adam's two moments, and gradients, 4
    bytes each of 2 F d.

    On a CPU recipe `base` holds no gradients: with D dead latents it takes 4 (6 F d + 4 D d) bytes, plus some
    [n,d] of a batch of n tokens and a tile. Recipe `saelens`, which ranks latents by copies folded with the
    decoder's norms and clips gradients by their common norm, takes up to 4 * 19 F d.
    """
    needed, there = 4 * 4 * 2 * d_sae * d, memory_of(device)
    if needed > there:
        called = device.type if device.type == "cuda" else "this machine"
        raise UserError(
            f"--expansion {d_sae // d}: an SAE of {d_sae} latents takes {needed / 1e9:,.0f} GB in training, "
            f"and {called} has {there / 1e9:,.0f}"
        )


# ------------------------------------------------------------------------------------------ activations
@dataclass(eq=False)
class Stream:
    """The activations of one hook that SAEs are trained on, with or without its sink positions."""

    layer: int
    sinks: str  # "drop" leaves sink positions out and does not count them
    tokens: int  # to give out in all
    number: int = 0  # of the next chunk
    median: float | None = None  # of the norms of the first batch, which defines sinks
    skip: int = field(init=False)  # tokens before the first chunk, still to be skipped
    waiting: int = 0  # tokens in `parts`
    # (h [n,d], sink [n], which of them): both arms of a hook share one h
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.skip = self.number * recipes.CHUNK

    @property
    def length(self) -> int:
        """Tokens of the next chunk; 0 after the last."""
        return max(0, min(recipes.CHUNK, self.tokens - self.number * recipes.CHUNK))

    def skips(self, n: int) -> bool:
        """Skip the next n positions without the model, if possible: only the model knows which are sinks."""
        if self.median is None or self.sinks == "drop" or n > self.skip:
            return False
        self.skip -= n
        return True

    def add(self, h: Tensor) -> None:
        """h [B,T,d] of the next rows."""
        norms = torch.linalg.vector_norm(h, dim=-1)
        self.median = norms[:, 1:].median().item() if self.median is None else self.median
        sink = sink_positions(norms, self.median).flatten()
        taken = (~sink if self.sinks == "drop" else torch.ones_like(sink)).nonzero().squeeze(1)
        skipped = min(self.skip, len(taken))
        self.skip -= skipped
        if skipped < len(taken):
            self.parts.append((h.flatten(0, 1), sink, taken[skipped:]))
            self.waiting += len(taken) - skipped

    def chunk(self) -> tuple[Tensor, Tensor]:
        """(h [n,d], sink [n]) of the next chunk, which leaves the stream."""
        n, at = self.length, 0
        h = self.parts[0][0].new_empty(n, self.parts[0][0].shape[1])
        sink = self.parts[0][1].new_empty(n)
        while at < n:
            of, of_sink, taken = self.parts.pop(0)
            now, later = taken[: n - at], taken[n - at :]
            h[at : at + len(now)], sink[at : at + len(now)] = of[now], of_sink[now]
            at += len(now)
            if len(later):
                self.parts.insert(0, (of, of_sink, later))
        self.number, self.waiting = self.number + 1, self.waiting - n
        return h, sink


def stream_chunks(
    model: Any,
    streams: Sequence[Stream],
    rows: Iterable[Tensor],
    after_batch: Callable[[int], object] = lambda positions: None,
) -> Iterator[tuple[Stream, Tensor, Tensor]]:
    """(stream, h [n,d], sink [n]) whenever a stream has a chunk of n tokens, until all are given out: one run
    of the model over `rows` [B,T], as deep as the deepest stream, serves them all.

    All positions of every sequence. after_batch(positions) is called for every batch.
    """
    device = next(model.parameters()).device
    for input_ids in rows:
        n = input_ids.numel()
        running = [stream for stream in streams if not stream.skips(n)]
        layers = sorted({stream.layer for stream in running})
        for layer in layers:  # refuse to train on what cannot be evaluated
            Hook(model, layer).way_to_patch(input_ids.to(device))
        found = block_outputs(model, layers, input_ids.to(device)) if layers else {}
        for stream in running:
            stream.add(found[stream.layer])
        after_batch(n)
        for stream in running:
            while 0 < stream.length <= stream.waiting:
                yield stream, *stream.chunk()
        streams = [stream for stream in streams if stream.length]
        if not streams:
            return


def activation_chunks(
    hook: Hook, data: str, tokenizer: Any, ctx: int, tokens: int, sinks: str, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(h [n,d], sink [n]) of one hook on the training text, n = CHUNK until `tokens` are given out. `first`
    chunks are skipped, without the model where possible.
    """
    rows = heldout.train_rows(data, tokenizer, ctx, rows_at_once(ctx))
    for _, h, sink in stream_chunks(hook.model, [Stream(hook.layer, sinks, tokens, first)], rows):
        yield h, sink


def rows_at_once(ctx: int) -> int:
    """Rows in a batch of the training text."""
    return max(1, 4096 // ctx)


# --------------------------------------------------------------------------------------- the cache is filled
def train_missing(
    model: Any,
    tokenizer: Any,
    specs: Sequence[TrainingSpec],
    cache: pathlib.Path,
    source: heldout.Source,
    bar: Progress | None = None,
) -> None:
    """Train the SAEs of one language model that the cache lacks, together, from one pass of the model over
    `source`, or as few as memory allows.

    The text's part of their specs is the same in all; hook, recipe, sinks and budget may differ. An
    interrupted run continues from its last checkpoint; what is damaged is set aside and trained again; where
    another process trains one of them, this one waits. Raises UserError, Fault.
    """
    wanted = {spec.folder(cache): spec for spec in specs}
    locks = {folder: f".{folder.name}{store.LOCK}" for folder in sorted(wanted)}
    with contextlib.suppress(Damaged):
        if all(is_whole(folder, spec) for folder, spec in wanted.items()):
            for lock in locks.values():  # that a killed run left; one that cannot be claimed does no harm
                with contextlib.suppress(UserError, Fault):
                    if (cache / lock).exists():
                        store.claim(cache, lock)
                        store.release(cache, lock)
            return
    store.writable(cache, "--cache")
    try:
        for folder, lock in locks.items():  # all in one order: no two processes wait for each other

            def waiting(who: str, folder: pathlib.Path = folder) -> None:
                tqdm.write(f"{folder.name} is being trained by {who}; waiting")

            store.claim(cache, lock, waiting)
        todo = {folder: spec for folder, spec in wanted.items() if not repaired(folder, spec)}
        runs = runs_of(todo)
        with line(bar, f"training SAEs of {specs[0].model}", training_flops(model, runs)) as bar:
            for of_pass in passes(model, runs):
                train_runs(model, tokenizer, of_pass, source, bar)
    finally:
        for lock in locks.values():
            store.release(cache, lock)


def repaired(folder: pathlib.Path, spec: TrainingSpec) -> bool:
    """`is_whole`, after finishing or undoing what a killed run left; a damaged folder is set aside."""
    try:
        store.settle(folder / store.PROVENANCE)
        return is_whole(folder, spec)
    except Damaged as why:
        tqdm.write(f"{why}; set aside as {store.set_aside(folder, 'damaged').name}, trained again")
        return False


def load_checkpoint(folder: pathlib.Path, device: torch.device) -> dict | None:
    """What an interrupted training left. A damaged checkpoint is set aside. Raises Damaged for a damaged
    record.
    """
    record, path = folder / store.PROVENANCE, folder / CHECKPOINT
    if CHECKPOINT not in store.written(record):
        return None
    try:
        with reading(store.checked(record, CHECKPOINT)):
            return torch.load(path, map_location=device, weights_only=True)
    except Damaged as why:
        aside = f", set aside as {store.set_aside(path, 'damaged').name}" if path.exists() else ""
        tqdm.write(f"{why}{aside}; training starts anew")
        store.put(record, {CHECKPOINT: None})
        return None


@dataclass(eq=False)
class BudgetRun:
    """SAEs that differ only in their budget: the longest, and branches on its way."""

    spec: TrainingSpec  # of the longest budget
    folders: dict[int, pathlib.Path]  # {budget: where its SAE lies}, of those to be made
    chunks: int = 0  # that it has had
    live: list[Training] = field(default_factory=list)  # trunk and branches, as they stand after these chunks
    processors: list[str] = field(default_factory=list)  # that it was trained on

    @property
    def budgets(self) -> list[int]:
        return [*self.spec.trunk, self.spec.tokens]

    def new_training(self, statistics: Statistics, budgets: Sequence[int]) -> Training:
        """statistics: of the first of the run's budgets."""
        spec = self.spec
        return RECIPES[spec.recipe](statistics, spec.d_sae, spec.k, spec.seed, budgets)

    def resume(self, device: torch.device) -> None:
        """Continue from the checkpoint that an interrupted run left."""
        saved = load_checkpoint(self.folders[self.spec.tokens], device)
        if saved is None:
            return
        trainings = [
            self.new_training(Statistics(**state["statistics"]), state["budgets"]).load(state)
            for state in saved["runs"]
        ]
        to_come = {training.budgets[-1] for training in trainings}
        to_come |= {budget for _, budget in trainings[0].ahead} if trainings else set()
        if self.folders.keys() <= to_come:  # else someone deleted an SAE that this run is past
            self.live, self.chunks = trainings, saved["chunks"]
            self.processors = saved.get("processors", [])

    def feed(self, h: Tensor, bar: tqdm | Progress, about: str) -> list[Training]:
        """Train on the next chunk -> the trainings that have ended. Interrupted within, it holds no state to
        checkpoint.
        """
        trainings, self.live = self.live, []
        self.processors = sorted({*self.processors, processor(h.device)})
        label = f"{about} k={self.spec.k} seed {self.spec.seed}"
        start = self.chunks * recipes.CHUNK
        fed = [run for training in trainings for run in training.feed(h, start, bar, label)]
        self.chunks += 1
        if self.chunks * recipes.CHUNK < self.spec.tokens:
            self.live = [training for training in fed if training.step < training.steps]
        # the longest, whose checkpoint serves all, last
        ended = [training for training in fed if training.step == training.steps]
        return sorted(ended, key=lambda training: training.budgets[-1])

    def save(self, training: Training, one_pass: int | None) -> None:
        """Write a finished SAE. one_pass: tokens of the text, once the stream has begun again."""
        *before, tokens = training.budgets
        if tokens in self.folders:
            spec = dataclasses.replace(self.spec, tokens=tokens, trunk=tuple(before))
            seen: dict[str, Any] = {"processor": ", ".join(self.processors)}
            if one_pass is not None and one_pass < tokens:
                seen["one_pass"] = one_pass
            save_sae(self.folders[tokens], training.finished(), spec.facts(), **seen)

    def checkpoint(self) -> None:
        if self.live:
            states = [training.state() for training in self.live]
            state = {"chunks": self.chunks, "runs": states, "processors": self.processors}
            record = self.folders[self.spec.tokens] / store.PROVENANCE
            store.put(record, {CHECKPOINT: functools.partial(torch.save, state)}, **self.spec.facts())


def runs_of(todo: dict[pathlib.Path, TrainingSpec]) -> list[BudgetRun]:
    """One for each trunk: the specs that share all but the budget. Hooks ascend."""
    runs: dict[tuple, BudgetRun] = {}
    for folder, spec in sorted(todo.items(), key=lambda item: (item[1].layer, item[1].tokens)):
        first = (*spec.trunk, spec.tokens)[0]
        pace = RECIPES[spec.recipe].pace(spec.tokens)
        key = (spec.layer, spec.sinks, spec.recipe, spec.d_sae, spec.k, spec.seed, *pace, first)
        shorter = runs[key].folders if key in runs else {}
        runs[key] = BudgetRun(spec, {**shorter, spec.tokens: folder})
    return list(runs.values())


# ------------------------------------------------------------------------------------- passes of the model
def held_bytes(d: int, longest: int, live: Iterable[tuple[str, int, int]]) -> int:
    """What a hook of width d holds during a pass: a chunk of activations and, where `longest` tokens are more
    than a chunk, the SAEs (recipe, d_sae, how many) between one chunk and the next.
    """
    saes = sum(RECIPES[recipe].COPIES * 2 * d * d_sae * n for recipe, d_sae, n in live)
    return 4 * (d * min(recipes.CHUNK, longest) + (saes if longest > recipes.CHUNK else 0))


def in_passes(hooks: Mapping[int, int], memory: float) -> list[list[int]]:
    """{layer: bytes held} -> the layers of every pass, ascending: as many as fit into `memory`, or one."""
    out: list[list[int]] = []
    filled = 0
    for layer, size in sorted(hooks.items()):
        if not out or filled + size > memory:
            out.append([])
            filled = 0
        out[-1].append(layer)
        filled += size
    return out


def passes(model: Any, runs: Sequence[BudgetRun]) -> list[list[BudgetRun]]:
    """The runs of every pass of the model over the text: see MEMORY."""
    at: dict[int, list[BudgetRun]] = {}
    for run in runs:
        at.setdefault(run.spec.layer, []).append(run)
    sizes = {}
    for layer, theirs in at.items():
        live = [(run.spec.recipe, run.spec.d_sae, 2 if run.spec.trunk else 1) for run in theirs]
        longest = max(run.spec.tokens for run in theirs)
        sizes[layer] = held_bytes(text_config(model).hidden_size, longest, live)
    memory = MEMORY * memory_of(next(model.parameters()).device)
    return [[run for layer in layers for run in at[layer]] for layers in in_passes(sizes, memory)]


def pass_flops(model: Any, runs: Sequence[BudgetRun]) -> float:
    """Of one position in a pass: the blocks up to the last hook."""
    return flops.of_blocks(model, 1 + max(run.spec.layer for run in runs))


def training_flops(model: Any, runs: Sequence[BudgetRun]) -> float:
    """Of training these SAEs, with the passes that it takes."""
    of_passes = (max(run.spec.tokens for run in one) * pass_flops(model, one) for one in passes(model, runs))
    return sum(of_passes) + sum(sae_flops(model, run) for run in runs)


def sae_flops(model: Any, run: BudgetRun) -> float:
    tokens = run.spec.tokens + RECIPES[run.spec.recipe].DECAY * sum(run.spec.trunk)
    return tokens * flops.of_training(text_config(model).hidden_size, run.spec.d_sae)


def train_runs(
    model: Any, tokenizer: Any, runs: Sequence[BudgetRun], source: heldout.Source, bar: Progress
) -> None:
    """Train them to the end, in one pass of the model over the text."""
    of_text, device = runs[0].spec, next(model.parameters()).device
    fed_by: dict[tuple[int, str], list[BudgetRun]] = {}
    for run in runs:
        run.resume(device)
        fed_by.setdefault((run.spec.layer, run.spec.sinks), []).append(run)
        bar.update(min(run.chunks * recipes.CHUNK / run.spec.tokens, 1) * sae_flops(model, run))
    streams = [
        Stream(*key, max(run.spec.tokens for run in theirs), min(run.chunks for run in theirs))
        for key, theirs in fed_by.items()
    ]
    one_pass: list[int] = []  # tokens of the text, once it begins again
    per_position = pass_flops(model, runs)

    def text_repeats(tokens: int) -> None:
        one_pass.append(tokens)
        tqdm.write(
            f"{of_text.model}: the training side of {source.name} holds {tokens:,} tokens; from here it "
            "repeats"
        )

    def after_batch(positions: int) -> None:
        bar.update(positions * per_position)
        bar.set_postfix_str("the language model reads", refresh=False)

    def checkpoint() -> None:
        for run in runs:
            run.checkpoint()

    how = rows_at_once(of_text.ctx), of_text.split, text_repeats, of_text.bos
    rows = heldout.train_rows(source.data, tokenizer, of_text.ctx, *how)
    saved_at, cost = time.monotonic(), 0.0
    known: dict[tuple[int, str, int], Statistics] = {}  # of the first n tokens of a stream
    try:
        for stream, h, sink in stream_chunks(model, streams, rows, after_batch):
            number, about = stream.number - 1, f"{of_text.model} L{stream.layer}"
            if heldout.stamp(source.data) != source.stamp:
                raise Fault(
                    f"--data {source.data} was changed while SAEs were trained on it: they are not kept; run "
                    "again"
                )
            if not torch.isfinite(h).all():
                raise Fault(f"{about}: an activation is not finite in chunk {number} of the training text")
            for run in fed_by[stream.layer, stream.sinks]:
                # else it has ended, or was further on than the others when they were interrupted
                if run.chunks == number and number * recipes.CHUNK < run.spec.tokens:
                    if not run.live:
                        n = run.budgets[0]
                        key = stream.layer, stream.sinks, n
                        if key not in known:
                            known[key] = Statistics.of(h[:n], sink[:n], about)
                        run.live = [run.new_training(known[key], run.budgets)]
                    for training in run.feed(h, bar, about):
                        run.save(training, one_pass[0] if one_pass else None)
            del h, sink  # before the next chunk is put together
            if time.monotonic() - saved_at > max(60, 50 * cost):  # at most 2% of the time
                start = time.perf_counter()
                checkpoint()
                saved_at, cost = time.monotonic(), time.perf_counter() - start
    # the text broke off, or the user interrupted: `live` stands at the end of a chunk
    except (UserError, KeyboardInterrupt):
        checkpoint()
        raise
