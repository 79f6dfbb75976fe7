"""TODO grid."""

import dataclasses
import math
import os
import platform

from transport_geometry import ANY_X86, formats, ranks, text
from transport_geometry.errors import UserError
from transport_geometry.models import load_model, model_hash, pick_layer, readable_names, tokenizer_hash
from transport_geometry.train import TRAIN_VERSION, check_memory, trunk

import torch
from tqdm import tqdm

KEY = ["model", "layer", "sae", "recipe", "d_sae", "k", "seed", "tokens"]
NULLS = ("null-identity", "null-mean", "null-random", "null-gaussian")


# ---------------------------------------------------------------------------------------------------- plan
def sae_name(expansion: int, sinks: str) -> str:
    return f"topk-x{expansion}" + ("-nosinks" if sinks == "drop" else "")


def chosen_saes(args) -> list[dict]:
    """Jobs {file, label, format, declared, model, layer} for the SAEs of --sae that read a hook asked for;
    says which do not.

    Without --models the files name the model; without @LAYER each file its layer. Raises UserError.
    """
    asked = {}
    for name, layer in args.models:
        asked.setdefault(name, set()).add(layer)
    taken, left = [], []
    for file in tqdm(
        [file for spec in args.sae for file in formats.find(spec)], desc="what SAE files say", leave=False
    ):
        declared, about = formats.describe(file), f"--sae {file.label}"
        if len(asked) == 1:
            name = next(iter(asked))
        elif declared.model is None:
            raise UserError(f"{about}: its files name no model; name one with --models")
        else:
            name = formats.hub_name(declared.model)
        layers = asked.get(name, {None})
        layer = declared.layer if declared.layer is not None or len(layers) > 1 else next(iter(layers))
        if declared.site not in (None, "resid_post"):
            left.append(f"{file.label} ({declared.site}, not resid_post)")
        elif asked and name not in asked:
            left.append(f"{file.label} (of {name})")
        elif layer is None:
            raise UserError(f"{about}: its files name no layer; name one with --models {name}@LAYER")
        elif layer not in layers and None not in layers:
            left.append(f"{file.label} (layer {layer})")
        else:
            job = dict(file=file, label=file.label, format=file.format, declared=declared)
            taken.append(job | dict(model=name, layer=layer))
    if left:
        ranks.say(f"left out: {', '.join(left)}")
    if not taken:
        raise UserError(
            f"--sae {','.join(args.sae)}: none of its {len(left)} SAEs reads a hook that --models asks for"
        )
    if len({entry["label"] for entry in taken}) < len(taken):
        raise UserError("--sae: two SAEs of one name; name folders apart")
    return sorted(taken, key=lambda entry: entry["label"])


def plan(args, device: torch.device, script: str) -> tuple[dict, list[dict]]:
    """(settings, hooks): every model and SAE file loaded (on the CPU), every argument checked against it,
    before anything is written.

    A hook is one evaluation set for the SAEs at one place: dict(name, layer, model, tokenizer, rows [S,T],
    document [S], d, depth, source, jobs, names, nulls), where names[i] is how condition i is called (KEY
    without model and layer), and jobs[i] what trains or finds its SAE.
    """
    files = chosen_saes(args) if args.sae else []
    source = text.find(args.data)
    loaded, rows_of, hooks = {}, {}, []
    names = list(dict.fromkeys([entry["model"] for entry in files] or [name for name, _ in args.models]))
    called = readable_names(names)
    for name in names:
        model, tokenizer = load_model(name, torch.device("cpu"), args.revision, getattr(torch, args.dtype))
        loaded[name] = model, tokenizer, dict(weights=model_hash(model), tokenizer=tokenizer_hash(tokenizer))
    # no longer than the SAE was trained on; where nothing is said, trainers tokenise as the tokenizer does by
    # itself
    for entry in files:
        tokenizer = loaded[entry["model"]][1]
        entry["ctx"] = min(args.ctx, entry["declared"].ctx or args.ctx)
        entry["bos"] = (
            tokenizer("a").input_ids[0] == tokenizer.bos_token_id
            if entry["declared"].bos is None
            else bool(entry["declared"].bos)
        )
    place = lambda entry: (entry["model"], entry["layer"], entry["ctx"], entry["bos"])
    places = list(dict.fromkeys(map(place, files))) or [(*m, args.ctx, False) for m in args.models]
    for name, layer, ctx, bos in places:
        model, tokenizer, hashes = loaded[name]
        if ctx > getattr(model.config, "max_position_embeddings", ctx):
            raise UserError(
                f"--ctx {ctx}: {name} takes {model.config.max_position_embeddings} tokens at most"
            )
        if (name, ctx, bos) not in rows_of:
            first = (
                (tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
                if bos
                else None
            )
            rows_of[name, ctx, bos] = text.heldout_rows(
                source.data, tokenizer, ctx, args.eval_seqs, args.split, first
            )
        held = rows_of[name, ctx, bos]
        rows = held.rows
        if rows.max() >= model.config.vocab_size:
            raise UserError(
                f"--models {name}: its tokenizer gives the id {rows.max()}, and it has {model.config.vocab_size} embeddings"
            )
        hook = dict(
            name=called[name],
            layer=pick_layer(model, name, layer),
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            document=held.document,
            d=model.config.hidden_size,
            source=source,
        )
        hook["depth"] = f"{(hook['layer'] / model.config.num_hidden_layers):.2f}"
        # SAEs of one place that want other contexts
        several = sum(other[:2] == (name, layer) for other in places) > 1
        hook["nulls"] = [f"{null}-{'bos-' * bos}ctx{ctx}" if several else null for null in NULLS]
        if files:
            hook["jobs"] = checked(
                [entry for entry in files if place(entry) == (name, layer, ctx, bos)], hook, args, device
            )
            hook["names"] = [
                (job["label"], job["format"], job["d_sae"], job["k"], 0, 0) for job in hook["jobs"]
            ]
        else:
            if args.k[-1] > args.expansion * hook["d"]:
                raise UserError(
                    f"--k {args.k[-1]}: more than the {args.expansion * hook['d']} latents of an SAE at {args.expansion}x on {name}"
                )
            check_memory(hook["d"], args.expansion * hook["d"], device)
            # called by its own name, whatever other models the command names: the same SAE in every grid
            stream = dict(
                model=readable_names([name])[name],
                **hashes,
                dtype=args.dtype,
                layer=hook["layer"],
                data=source.name,
                data_content=source.content,
                split=args.split,
                ctx=args.ctx,
                device=device.type,
                version=TRAIN_VERSION,
                **any_x86(device),
            )
            hook["jobs"] = [
                stream
                | dict(
                    tokens=tokens,
                    trunk=trunk(recipe, tokens, args.tokens),
                    d_sae=args.expansion * hook["d"],
                    k=k,
                    seed=seed,
                    recipe=recipe,
                    sinks=sinks,
                )
                for sinks in args.sinks
                for recipe in args.recipe
                for tokens in args.tokens
                for k in args.k
                for seed in args.seeds
            ]
            hook["names"] = [
                (
                    sae_name(args.expansion, j["sinks"]),
                    j["recipe"],
                    j["d_sae"],
                    j["k"],
                    j["seed"],
                    j["tokens"],
                )
                for j in hook["jobs"]
            ]
        hooks.append(hook)
    if not files and len({(hook["name"], hook["layer"]) for hook in hooks}) < len(hooks):
        raise UserError(
            "--models: the same model and layer twice (a name without @LAYER means the middle layer)"
        )
    if text.stamp(source.data) != source.stamp:
        raise UserError(f"--data {args.data} is being changed: run again when it is still")
    size = {called[name]: sum(p.numel() for p in model.parameters()) for name, (model, *_) in loaded.items()}
    settings = dict(
        script=script,
        device=device.type,
        data=source.name,
        text_sha256=", ".join(sorted({held.sha256 for held in rows_of.values()})),
        documents=sorted({int(held.document.max()) + 1 for held in rows_of.values()}),
        cut=text.is_cut(source.data),
        python=platform.python_version() if args.data == "stdlib" else None,
        models=sorted(size, key=lambda name: (size[name], name)),
        hooks={f"{h['name']}@{h['layer']}": h["depth"] for h in hooks},
        last_blocks=sorted(
            {
                f"{h['name']}@{h['layer']}"
                for h in hooks
                if h["layer"] == h["model"].config.num_hidden_layers - 1
            }
        ),
        weights={called[name]: hashes["weights"] for name, (*_, hashes) in loaded.items()},
        tokenizers={called[name]: hashes["tokenizer"] for name, (*_, hashes) in loaded.items()},
        k=args.k,
        seeds=args.seeds,
        tokens=args.tokens,
        expansion=args.expansion,
        recipe=args.recipe,
        sinks=args.sinks,
        eval_seqs=args.eval_seqs,
        ctx=args.ctx,
        save_tokens=args.save_tokens,
    )
    if files:
        settings |= dict.fromkeys(("k", "seeds", "tokens", "expansion", "recipe", "sinks"))
        settings["saes"] = {job["label"]: job["in_settings"] for hook in hooks for job in hook["jobs"]}
    else:
        settings["data_content"] = source.content
    settings |= {
        name: value
        for name, value in (("revision", args.revision), ("split", args.split), ("dtype", args.dtype))
        if value not in (None, "train", "float32")
    }  # what is not the default
    return settings | any_x86(device), hooks


def any_x86(device: torch.device) -> dict:
    """A setting of runs, and of SAEs in the cache, whose bytes are the same on every x86-64 processor; {}
    otherwise.
    """
    return {"instructions": "any x86-64"} if ANY_X86 and device.type == "cpu" else {}


def checked(entries: list[dict], hook: dict, args, device: torch.device) -> list[dict]:
    """The jobs of one hook's SAE files, each read, of the model's width, and past the basis gate. Raises
    UserError.
    """
    # MPS is not believed before its own check
    where = device if device.type == "cuda" else torch.device("cpu")
    model, few = hook["model"].to(where), hook["rows"][:4].to(where)
    activations = formats.near(model, hook["layer"], few)
    model.to("cpu")
    for entry in tqdm(entries, desc=f"reading SAEs of {hook['name']} L{hook['layer']}", leave=False):
        sae = formats.read(entry["file"]).to(where)
        F, d = sae.W_enc.shape
        if d != hook["d"]:
            raise UserError(
                f"--sae {entry['label']}: reads {d} dimensions, and {hook['name']} has {hook['d']}"
            )
        declared = entry["declared"]
        model = declared.model
        if model and os.path.isabs(model):  # where it lay on somebody's machine is nobody's business
            model = os.path.basename(model)
        basis = args.basis or declared.basis
        declared = dataclasses.replace(declared, model=model, basis=basis, ctx=entry["ctx"], bos=entry["bos"])
        readings = (
            [math.nan]
            if args.basis
            else list(formats.check_basis(sae, basis, entry["label"], hook["layer"], activations).values())
        )
        sae.centred = basis == "centred"
        h = activations[hook["layer"]]
        active = (sae.encode(h)[0] > 0).sum(1).double().mean().item()
        entry |= dict(
            declared=declared,
            in_settings=vars(declared)
            | {"unseen": list(declared.unseen), "fingerprint": formats.sae_fingerprint(sae)},
            fvu_as_said=readings[0],
            fvu_otherwise=min(readings[1:], default=math.nan),
            d_sae=F,
            k=sae.k or 0,
            typical_k=max(1, round(active)),
            mean=h.mean(0).cpu(),
        )
    return entries
