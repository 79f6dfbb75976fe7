"""What a command asks for: the grid, as it was typed, and then every model, text and SAE of it found and
checked.
"""

import itertools
import math
import pathlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transport_geometry import ANY_X86, torchrun
from transport_geometry.errors import UserError
from transport_geometry.formats.contract import differences
from transport_geometry.formats.known_fields import is_called
from transport_geometry.models import plant
from transport_geometry.models.lm import Hook, cross_entropy, log_softmax, text_config
from transport_geometry.models.loading import (
    CACHE,
    load_model,
    model_hash,
    pick_layer,
    readable_names,
    tokenizer_hash,
)
from transport_geometry.models.model_files import bos_of
from transport_geometry.records.condition import NO_SINKS, NULLS, Condition
from transport_geometry.saes import external_saes
from transport_geometry.saes.external_saes import Chosen, ExternalSAE, Refused
from transport_geometry.saes.recipes import TRAIN_VERSION, trunk
from transport_geometry.saes.sae import TrainingSpec
from transport_geometry.saes.train import check_memory
from transport_geometry.text import heldout, sources

import torch


# ------------------------------------------------------------------------------------------ as it was typed
@dataclass(frozen=True)
class Grid:
    """What is measured. Sequences ascend, but models, recipes and sinks, which stand as they were given."""

    models: tuple[
        tuple[str, int | None], ...
    ]  # (name, layer; None: the middle one); none: the SAEs' files say
    k: tuple[int, ...]
    seeds: tuple[int, ...]
    tokens: tuple[int, ...]  # SAE training budgets
    expansion: int
    recipes: tuple[str, ...]  # the first is the one that a verdict is about
    sinks: tuple[str, ...]
    saes: tuple[str, ...]  # of --sae: these instead of training some
    basis: tuple[tuple[str, str], ...]  # (NAME or "", basis) of --basis
    data: str
    split: str
    revision: str | None
    dtype: str
    eval_seqs: int
    ctx: int
    leave_sinks: bool
    save_tokens: bool
    bos: str = "auto"
    ignore_fields: tuple[str, ...] = ()  # of --ignore-field
    column: str | None = None  # of the data
    config: str | None = None


@dataclass(frozen=True)
class Command:
    """A grid, and where and how it is run."""

    grid: Grid
    device: str
    out: pathlib.Path
    cache: pathlib.Path
    fresh: bool
    finished: pathlib.Path | None  # of --from
    dry_run: bool
    own: dict[str, Any] = field(default_factory=dict)  # a script's own flags: settings too
    quiet: bool = False  # nothing but errors and the last line
    json: bool = False  # the verdict on stdout, and nothing else there


# ------------------------------------------------------------------------------------------ found and checked
@dataclass(frozen=True, eq=False)
class Candidate:
    """A condition of the grid, and where its SAE comes from."""

    condition: Condition
    origin: TrainingSpec | ExternalSAE
    turn: float = 0.0  # how far its errors are turned, see `plant`


@dataclass(frozen=True, eq=False)
class EvalSet:
    """One evaluation set, for the SAEs at one hook."""

    name: str  # of the model, as results call it
    hook: Hook
    tokenizer: Any
    source: heldout.Source
    held: heldout.HeldOut
    candidates: tuple[Candidate, ...]
    nulls: tuple[Condition, ...]  # in the order of NULLS
    bos: int | None = None  # what its rows, and those it is trained on, begin with

    @property
    def d(self) -> int:
        return text_config(self.hook.model).hidden_size

    @property
    def label(self) -> str:
        return f"{self.name} L{self.hook.layer}"

    @property
    def middle(self) -> Candidate:
        """The SAE that stands for the grid where one is enough."""
        return self.candidates[len(self.candidates) // 2]


@dataclass(frozen=True)
class Place:
    """What the SAEs of an evaluation set have in common, as asked for."""

    model: str
    layer: int | None
    ctx: int
    bos: bool


@dataclass(frozen=True, eq=False)
class Loaded:
    """A language model and what determines its SAEs."""

    called: str
    model: Any
    tokenizer: Any
    weights: str  # hash
    tokenizer_hash: str

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def first_token(self) -> int:
        """What stands before a sequence that begins with BOS: the tokenizer's own, else what it calls so,
        else the token between documents.
        """
        known = (bos_of(self.tokenizer), self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(token for token in known if token is not None)

    def begins(self, asked: str) -> bool:
        """Do rows of text begin with BOS, by --bos? By itself as the tokenizer encodes a text."""
        return asked == "yes" or (asked == "auto" and bos_of(self.tokenizer) is not None)

    def place(self, chosen: Chosen, grid: Grid, kind: str) -> Place:
        """No longer than the SAE was trained on. Its file's word on BOS stands above --bos."""
        bos = chosen.declared.bos
        if bos is None:
            bos = rows_begin(self, grid, kind)
        return Place(chosen.model, chosen.layer, min(grid.ctx, chosen.declared.ctx or grid.ctx), bos)


def sae_name(expansion: int, sinks: str) -> str:
    """How an SAE trained here is called within its hook and recipe."""
    return f"topk-x{expansion}" + (NO_SINKS if sinks == "drop" else "")


def plan(
    grid: Grid, device: torch.device, script: str, cache: pathlib.Path = CACHE
) -> tuple[dict[str, Any], list[EvalSet]]:
    """(settings, eval_sets): every model and SAE file loaded (on the CPU), every argument checked against it,
    before anything is written. Settings are what a results folder is the results of, as its run.json keeps
    them. cache: of models in GGUF files. Raises UserError.
    """
    chosen, refused = external_saes.choose(grid.saes, grid.models, grid.basis) if grid.saes else ([], [])
    source = heldout.find(grid.data, grid.column, grid.config)
    kind = heldout.kind_of(source.data, grid.split)
    names = list(dict.fromkeys([one.model for one in chosen] or [name for name, _ in grid.models]))
    called, models = readable_names(names), {}
    for name in names:
        try:
            dtype = getattr(torch, grid.dtype)
            model, tokenizer = load_model(name, torch.device("cpu"), grid.revision, dtype, cache)
        except UserError as why:
            if grid.models:
                raise
            refused += [external_saes.refusal(one, why) for one in chosen if one.model == name]
            chosen = [one for one in chosen if one.model != name]
            continue
        rules = tokenizer_hash(tokenizer, of_chats=kind == "chats")
        models[name] = Loaded(called[name], model, tokenizer, model_hash(model), rules)
    place_of = {one.file.label: models[one.model].place(one, grid, kind) for one in chosen}
    for flag, otherwise in (
        (f"--bos {grid.bos}", [at for at, on in place_of.items() if grid.bos == ("no" if on.bos else "yes")]),
        (f"--ctx {grid.ctx}", [at for at, on in place_of.items() if on.ctx < grid.ctx]),
    ):
        if otherwise:
            these = f"{len(otherwise)} of {len(place_of)} SAEs"
            torchrun.say(f"{flag}: not for {these}, whose files say otherwise: {', '.join(otherwise[:3])}")
    places = list(dict.fromkeys(place_of.values()))
    if not grid.saes:
        begins = {name: rows_begin(loaded, grid, kind) for name, loaded in models.items()}
        places = [Place(name, layer, grid.ctx, begins[name]) for name, layer in grid.models]
    rows: dict[tuple, heldout.HeldOut] = {}
    eval_sets = []
    for place in places:
        loaded = models[place.model]
        here = [one for one in chosen if place_of[one.file.label] == place]
        try:
            layer = pick_layer(loaded.model, place.model, place.layer)
        except UserError as why:  # an SAE of a block that the model has not
            if not here:
                raise
            refused += [external_saes.refusal(one, why) for one in here]
            continue
        which = (place.model, place.ctx, place.bos)
        if which not in rows:
            rows[which] = evaluation_rows(loaded, place, source, grid)
        hook = Hook(loaded.model, layer)
        check_plant(place.model, hook, bool(here), rows[which].input_ids[:4])
        if here:
            candidates, not_these = from_files(here, hook, loaded, rows[which], place, device, grid)
            refused += not_these
            if not candidates:
                continue
        else:
            candidates = trained_here(place, hook, loaded, source, kind, grid, device)
        several = sum((other.model, other.layer) == (place.model, place.layer) for other in places) > 1
        # SAEs of one place that want other contexts have null rows of their own
        suffix = f"-{'bos-' if place.bos else ''}ctx{place.ctx}" if several else ""
        nulls = null_conditions(loaded.called, hook.layer, suffix, candidates[len(candidates) // 2])
        eval_sets.append(
            EvalSet(
                loaded.called,
                hook,
                loaded.tokenizer,
                source,
                rows[which],
                tuple(candidates),
                nulls,
                bos=loaded.first_token if place.bos else None,
            )
        )
    external_saes.say(refused, any_left=bool(eval_sets))
    check_ignored(grid, eval_sets)
    hooks = {(eval_set.name, eval_set.hook.layer) for eval_set in eval_sets}
    if not grid.saes and len(hooks) < len(eval_sets):
        raise UserError(
            "--models: the same model and layer twice (a name without @LAYER means the middle layer)"
        )
    if heldout.stamp(source.data) != source.stamp:
        raise UserError(f"--data {grid.data} is being changed: run again when it is still")
    used = {id(eval_set.hook.model) for eval_set in eval_sets}
    in_use = [one for one in models.values() if id(one.model) in used]
    read = [held for held in rows.values() if any(eval_set.held is held for eval_set in eval_sets)]
    about = settings(grid, device, script, eval_sets, in_use, read)
    if refused:
        about["refused"] = {one.label: one.why for one in refused}
    return about, eval_sets


def check_ignored(grid: Grid, eval_sets: Sequence[EvalSet]) -> None:
    """Raises UserError for a name of --ignore-field that let nothing pass."""
    origins = [one.origin for eval_set in eval_sets for one in eval_set.candidates]
    passed = {name for origin in origins if isinstance(origin, ExternalSAE) for name in origin.fields.ignored}
    for typed in grid.ignore_fields:
        if not any(is_called(name, typed) for name in passed):
            raise UserError(f"--ignore-field {typed}: no SAE here is refused for such a field")


def rows_begin(loaded: Loaded, grid: Grid, kind: str) -> bool:
    """Do a model's rows begin with BOS? Those that come as token ids stay as they are unless asked for. kind:
    of the documents, `heldout.kind_of`.
    """
    return loaded.begins(grid.bos) and (grid.bos == "yes" or kind != "ids")


def check_plant(name: str, hook: Hook, from_files: bool, input_ids: torch.Tensor) -> None:
    """Raises UserError where what the name plants has no place at this hook; says where it changes nothing
    in these rows [B,T].
    """
    for planted in plant.plants(name):
        if planted.in_model and hook.is_last:
            raise UserError(f"--models {name}@{hook.layer}: no block comes after it that could undo it")
        if from_files and not planted.in_model:
            raise UserError(f"--models {name}: {planted.kind} is about SAEs trained here, not about --sae")
        if planted.kind == "short" and not (hook.head(input_ids).norm(dim=-1) > planted.first).any():
            torchrun.say(
                f"{name}@{hook.layer}: no norm is above {planted.first:g}, nothing is shortened here"
            )


def evaluation_rows(loaded: Loaded, place: Place, source: heldout.Source, grid: Grid) -> heldout.HeldOut:
    """The rows that a model's SAEs are evaluated on. Raises UserError."""
    config = text_config(loaded.model)
    longest = getattr(config, "max_position_embeddings", place.ctx)
    if place.ctx > longest:
        raise UserError(f"--ctx {place.ctx}: {place.model} takes {longest} tokens at most")
    first = loaded.first_token if place.bos else None
    held = heldout.heldout_rows(
        source.data, loaded.tokenizer, ctx=place.ctx, n=grid.eval_seqs, split=grid.split, bos=first
    )
    if held.input_ids.max() >= config.vocab_size:
        raise UserError(
            f"--models {place.model}: its tokenizer gives the id {held.input_ids.max()}, and it has "
            f"{config.vocab_size} embeddings"
        )
    say_if_guessing(place.model, loaded.model, held.input_ids, grid.data)
    return held


@torch.no_grad()
def say_if_guessing(name: str, model: Any, input_ids: torch.Tensor, data: str) -> None:
    """Say where the model is worse on the text than one that knows nothing: it is none that it was trained
    for. On four rows' beginnings, so that it is known before anything is trained.
    """
    rows = input_ids[:: -(-len(input_ids) // 4), :64]
    ce = cross_entropy(log_softmax(model(input_ids=rows).logits), rows).mean().item()
    if ce > (chance := math.log(text_config(model).vocab_size)):
        torchrun.say(
            f"--data {data}: {name} predicts it worse than guessing would (CE {ce:.2f}, ln V {chance:.2f}): "
            "is it text of its kind, tokenised for it?"
        )


def from_files(
    chosen: Sequence[Chosen],
    hook: Hook,
    loaded: Loaded,
    held: heldout.HeldOut,
    place: Place,
    device: torch.device,
    grid: Grid,
) -> tuple[list[Candidate], list[Refused]]:
    """The SAEs of --sae at one place, read and checked, and those that are refused."""
    believed = device if device.type == "cuda" else torch.device("cpu")  # MPS not before its own check
    found, refused = external_saes.check(
        chosen, hook, loaded.called, held.input_ids[:4], place.ctx, place.bos, believed, grid.ignore_fields
    )
    here: dict[str, Any] = {
        "weights": loaded.weights,
        "tokenizer": loaded.tokenizer_hash,
        "dtype": grid.dtype,
    }
    here |= {"bos": loaded.first_token} if place.bos else {}
    found = [replace(one, differs=differences(dict(one.declared.model_facts), here)) for one in found]
    candidates = [
        Candidate(
            Condition(loaded.called, hook.layer, one.file.label, one.file.format, one.d_sae, one.k, 0, 0), one
        )
        for one in found
    ]
    return candidates, refused


def trained_here(
    place: Place,
    hook: Hook,
    loaded: Loaded,
    source: heldout.Source,
    kind: str,
    grid: Grid,
    device: torch.device,
) -> list[Candidate]:
    """The SAEs that the grid asks for at one hook. Raises UserError."""
    name = place.model
    d = text_config(hook.model).hidden_size
    d_sae = grid.expansion * d
    if grid.k[-1] > d_sae:
        raise UserError(
            f"--k {grid.k[-1]}: more than the {d_sae} latents of an SAE at {grid.expansion}x on {name}"
        )
    check_memory(d, d_sae, device)
    planted, trained_on = plant.plants(name), plant.own_name(name)
    # called by its own name, whatever other models the command names: the same SAE in every grid
    own_name = readable_names([trained_on])[trained_on]
    turn = sum(one.turn(hook.layer, text_config(hook.model).num_hidden_layers) for one in planted)
    had = {tokens: plant.planted_budget(planted, tokens) for tokens in grid.tokens}
    out = []
    arms = itertools.product(grid.sinks, grid.recipes, grid.tokens, grid.k, grid.seeds)
    for sinks, recipe, tokens, k, seed in arms:
        spec = TrainingSpec(
            model=own_name,
            weights=loaded.weights,
            tokenizer=loaded.tokenizer_hash,
            dtype=grid.dtype,
            layer=hook.layer,
            data=source.name,
            data_content=source.for_training,
            split=grid.split,
            ctx=grid.ctx,
            device=device.type,
            version=TRAIN_VERSION,
            tokens=had[tokens],
            trunk=trunk(recipe, had[tokens], list(had.values())),
            d_sae=d_sae,
            k=k,
            seed=seed,
            recipe=recipe,
            sinks=sinks,
            bos=loaded.first_token if place.bos else None,
            as_ids=kind == "ids" or None,
            instructions=any_x86(device),
        )
        called = sae_name(grid.expansion, sinks)
        condition = Condition(loaded.called, hook.layer, called, recipe, d_sae, k, seed, tokens)
        out.append(Candidate(condition, spec, turn))
    return out


def null_conditions(name: str, layer: int, suffix: str, middle: Candidate) -> tuple[Condition, ...]:
    """In the order of NULLS; the random dictionary is of the middle SAE's shape."""
    k = middle.condition.k
    if isinstance(middle.origin, ExternalSAE):
        k = k or middle.origin.typical_k
    shapes = {"null-random": (middle.condition.d_sae, k)}
    return tuple(
        Condition(name, layer, null + suffix, "null", *shapes.get(null, (0, 0)), 0, 0) for null in NULLS
    )


def settings(
    grid: Grid,
    device: torch.device,
    script: str,
    eval_sets: Sequence[EvalSet],
    models: Sequence[Loaded],
    rows: Sequence[heldout.HeldOut],
) -> dict[str, Any]:
    """All that a results folder must be the results of, in JSON's types."""
    trained = None if grid.saes else grid
    source = eval_sets[0].source
    out: dict[str, Any] = dict(
        script=script,
        device=device.type,
        data=source.name,
        text_sha256=", ".join(sorted({held.sha256 for held in rows})),
        documents=sorted({int(held.document.max()) + 1 for held in rows}),
        cut=sources.is_cut(source.data, grid.split),
        python=platform.python_version() if grid.data == "stdlib" else None,
        models=[one.called for one in sorted(models, key=lambda one: (one.size, one.called))],
        hooks={f"{eval_set.name}@{eval_set.hook.layer}": depth(eval_set.hook) for eval_set in eval_sets},
        last_blocks=sorted(
            {f"{eval_set.name}@{eval_set.hook.layer}" for eval_set in eval_sets if eval_set.hook.is_last}
        ),
        weights={one.called: one.weights for one in models},
        tokenizers={one.called: one.tokenizer_hash for one in models},
        k=trained and list(trained.k),
        seeds=trained and list(trained.seeds),
        tokens=trained and list(trained.tokens),
        expansion=trained and trained.expansion,
        recipe=trained and list(trained.recipes),
        sinks=trained and list(trained.sinks),
        eval_seqs=grid.eval_seqs,
        ctx=grid.ctx,
        save_tokens=grid.save_tokens,
    )
    origins = [(one.condition.sae, one.origin) for eval_set in eval_sets for one in eval_set.candidates]
    if trained:
        out["data_content"] = source.content
        if begun := {one.name: one.bos for one in eval_sets if one.bos is not None}:
            out["bos"] = begun
    else:
        out["saes"] = {sae: one.in_settings() for sae, one in origins if isinstance(one, ExternalSAE)}
    if stored := {one.called: one.model.stored_as for one in models if hasattr(one.model, "stored_as")}:
        out["stored_as"] = stored
    # what is not the default
    for name, value, default in (
        ("revision", grid.revision, None),
        ("split", grid.split, "train"),
        ("config", grid.config, None),
        ("column", sources.columns_read(source.data, grid.split) or "text", "text"),
        ("dtype", grid.dtype, "float32"),
        ("instructions", any_x86(device), None),
        ("leave_sinks", grid.leave_sinks, False),
    ):
        if value != default:
            out[name] = value
    return out


def depth(hook: Hook) -> str:
    """Of a hook in its model, by which hooks of different models are matched."""
    return f"{(hook.layer / text_config(hook.model).num_hidden_layers):.2f}"


def any_x86(device: torch.device) -> str | None:
    """A setting of runs, and of SAEs in the cache, whose bytes are the same on every x86-64 processor."""
    return "any x86-64" if ANY_X86 and device.type == "cpu" else None
