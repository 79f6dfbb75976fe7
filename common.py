"""What every experiment's command line shares: the flags and the published grids.

    python common.py diff A B            # are two results folders one run?
    python common.py report outputs/     # what all finished experiments say, in the order to read them
    python common.py check --device mps  # does this machine's mps (or cuda) compute what its CPU does?

The answer of `diff` is one of four words, `identical`, `same SAEs`, `reproduced` (exit 0) or `different` (1).
`report` writes outputs/report.md: the verdicts of the runs in that folder, joined; nothing is computed.
`check` compares operators and one evaluation on four rows, without a network: exit 0 where they agree, 1
where not, 2 where there is no such device. What it prints can be pasted into an issue.
"""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
    # torch alone takes seconds, and on a disk that has not read it yet half a minute
    print("loading PyTorch ...", file=sys.stderr, flush=True)

from transport_geometry.errors import UserError, brief, printable, run_script
from transport_geometry.models import plant
from transport_geometry.models.loading import CACHE
from transport_geometry.records import compare_runs
from transport_geometry.records.tables import readable_count
from transport_geometry.reporting import summary
from transport_geometry.running import check_device
from transport_geometry.running.grid import Command, Grid

SMALL, MIDDLE, LARGE = (f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m"))


def at(model: str, *layers: int) -> str:
    """As --models takes it."""
    return ",".join(f"{model}@{layer}" for layer in layers)


# on Pythia and the Pile, as published (published numbers: published.py)
PUBLISHED = dict(data="NeelNanda/pile-small-tokenized-2b", expansion=32, eval_seqs=200, ctx=256)
SIX_HOOKS = f"{at(SMALL, 1, 3, 5)},{at(LARGE, 4, 12, 20)}"
# on a real model from a package, before, in and after the layers where one position has most of the norm
REAL = dict(seeds="0", expansion=8, eval_seqs=32, ctx=256)
TWELVE = at("smollm2-135m", 1, 4, 7, 9, 10, 11, 13, 16, 20, 24, 27, 28)
NINE = at("gemma3-270m", 0, 2, 4, 6, 8, 10, 12, 14, 16)
PRESETS: dict[str, dict[str, Any]] = {
    "fast2": dict(models=SIX_HOOKS, k="8,16,32,64,128,256", tokens="10M", seeds="0", **PUBLISHED),
    "fast3": dict(models=f"{SMALL},{MIDDLE},{LARGE}", k="8,16,32,64", tokens="10M", seeds="0", **PUBLISHED),
    "phase2": dict(models=f"{SMALL},{LARGE}", k="8,16", tokens="10M,50M,100M", seeds="0,1,2", **PUBLISHED),
    "smollm2": dict(models=TWELVE, k="8,32,128", tokens="300k", sinks="keep,drop", **REAL),
    "smollm2-quick": dict(models=at("smollm2-135m", 10, 11), k="8", tokens="20k", **REAL | {"eval_seqs": 12}),
    # half the context: the logits of 262,144 words are most of its price
    "gemma3": dict(models=NINE, k="8,32,128", tokens="300k", sinks="keep,drop", **REAL | {"ctx": 128}),
}
# of each number on the command line: far above what can be computed, and below what overflows (torch seeds a
# piece of a run by seed x 1000003 + its number, in 63 bits)
MOST = dict(k=10**6, seeds=2**32 - 1, tokens=10**12, expansion=10**9, eval_seqs=10**6, ctx=2**20)


# ------------------------------------------------------------------------------------------ arguments
def parse_count(text: str) -> int:
    """'250k' -> 250000, '10M' -> 10000000."""
    scale = {"k": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:], 1)
    try:
        count = float(text if scale == 1 else text[:-1]) * scale
    except ValueError:
        raise UserError(
            f"--tokens {brief(text)} is not a number of tokens: write 300000, 300k or 10M"
        ) from None
    if not count >= 1:
        raise UserError(f"--tokens {brief(text)} is not a positive number of tokens")
    if count > MOST["tokens"]:
        raise UserError(f"--tokens {brief(text)}: at most {readable_count(MOST['tokens'])}")
    return round(count)


def dest(flag: str) -> str:
    """Where argparse puts a flag's value."""
    return flag.removeprefix("--").replace("-", "_")


def parse_int(text: str, flag: str, least: int) -> int:
    name = dest(flag)
    try:
        value = int(text) if len(text) < 100 else float(text)  # int() refuses more than 4300 digits
    except ValueError:
        raise UserError(f"{flag} {brief(text)}: whole numbers, please") from None
    if not least <= value <= MOST[name]:
        raise UserError(f"{flag} {brief(text)}: must be at least {least} and at most {MOST[name]}")
    return int(value)


def parse_ints(text: str, flag: str, least: int) -> tuple[int, ...]:
    """Whole numbers separated by commas, each once, ascending."""
    return tuple(sorted({parse_int(part, flag, least) for part in text.split(",")}))


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{brief(message, 280)} (see --help)")


# (flag, what argparse is told): the same in every script
GRID_FLAGS: tuple[tuple[str, dict], ...] = (
    (
        "--models",
        dict(
            metavar="NAME[@LAYER],...",
            help="stdlib-s, -m, -l, smollm2-135m or gemma3-270m, a local folder or GGUF file, or a hub id; "
            "without layer the middle one",
        ),
    ),
    (
        "--plant",
        dict(
            metavar="PLANT,...",
            help="beside the last model, its twins with a known truth planted: a sink of that norm "
            "(null3700, visible3700, relative3700), none (short300: larger norms compressed), SAEs on half "
            "the tokens (starved0.5), errors turned towards directions that change the logits (turned0.5); "
            "joined by +",
        ),
    ),
    ("--revision", dict(help="of the models, where they come from the hub: a branch, tag or commit (main)")),
    (
        "--dtype",
        dict(
            default="float32",
            choices=["float32", "bfloat16"],
            help="of the language model; sums are in float32 or better",
        ),
    ),
    (
        "--data",
        dict(
            help="stdlib, a local file or folder (txt, jsonl, parquet, arrow; .gz, .zst; what save_to_disk "
            "wrote), or a hub data set"
        ),
    ),
    ("--split", dict(help="of the data set")),
    ("--config", dict(metavar="NAME", help="of the data set: which of its configurations")),
    ("--column", dict(metavar="NAME", help="of the data set: where its text, token ids or chats are")),
    (
        "--sae",
        dict(
            metavar="PATH_OR_ID,...",
            help="SAEs to evaluate instead of training some: local, or hub id with sub-path or pattern; a "
            r"comma in a name is written \, or the name in double quotes",
        ),
    ),
    (
        "--basis",
        dict(
            metavar="[NAME=]BASIS,...",
            help="raw or centred: of the activations that this SAE of --sae was trained on, against what its "
            "files say; NAME may be a pattern, and is needed where there are several",
        ),
    ),
    (
        "--ignore-field",
        dict(
            metavar="NAME,...",
            action="append",
            help="fields of the files of --sae that are not known and refused for it: go on without them",
        ),
    ),
    ("--k", dict(help="active latents, e.g. 8,16,32")),
    ("--seeds", dict(help="e.g. 0,1,2")),
    ("--tokens", dict(help="SAE training budgets, e.g. 300k,10M")),
    ("--expansion", dict(help="SAE width = expansion x d_model")),
    (
        "--recipe",
        dict(
            help="how SAEs are trained: base, saelens, or both, the first being the one the verdict is about"
        ),
    ),
    ("--sinks", dict(help="sink positions in SAE training: keep, drop, or both")),
    ("--eval-seqs", dict(help="held-out sequences")),
    ("--ctx", dict(help="tokens per sequence")),
    (
        "--bos",
        dict(
            default="auto",
            choices=["auto", "yes", "no"],
            help="do rows begin with the beginning-of-text token? auto: where the tokenizer puts it before a "
            "text; an SAE file's own word stands above it",
        ),
    ),
    (
        "--preset",
        dict(
            choices=sorted(PRESETS),
            help="a published grid on Pythia and the Pile (fast2, fast3, phase2) or one on a real model from "
            "a package (smollm2, smollm2-quick, gemma3); other flags override it",
        ),
    ),
)
DEFAULTS = dict(data="stdlib", split="train", recipe="base", sinks="keep", seeds="0")
TRAINING = (
    "k",
    "seeds",
    "tokens",
    "expansion",
    "recipe",
    "sinks",
    "preset",
)  # nothing of it applies to --sae


def parser_of(
    doc: str, flags: Mapping[str, dict] | None = None, own: Mapping[str, Any] | None = None
) -> argparse.ArgumentParser:
    """flags {--flag: what argparse is told}: of one script. own: its grid, which --help shows as defaults."""
    parser = _OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    grid = parser.add_argument_group("the grid")
    defaults = {**DEFAULTS, **(own or {})}
    for flag, how in GRID_FLAGS:
        grid.add_argument(flag, **with_default(how, defaults.get(dest(flag))))
    add = parser.add_argument
    out = pathlib.Path("outputs") / pathlib.Path(sys.argv[0]).stem
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda", "mps"],
        help="auto: cuda where there is one, else mps, else cpu (default: auto)",
    )
    add("--out", type=parse_path, default=out, help="results folder (default: %(default)s)")
    add(
        "--cache",
        type=parse_path,
        default=CACHE,
        help="trained SAEs, and GGUF models unpacked (default: %(default)s)",
    )
    add(
        "--fresh",
        action="store_true",
        help="start the results folder over (what a run wrote there goes, and nothing else)",
    )
    add(
        "--from",
        dest="finished",
        type=parse_path,
        help="recompute tables, verdict and plots of a finished folder; no model",
    )
    add(
        "--leave-sinks",
        action="store_true",
        help="patch every position but sinks, which keep their activation",
    )
    add("--save-tokens", action="store_true", help="also keep per-token arrays")
    add("--dry-run", action="store_true", help="print the grid and what it would cost, and stop")
    add("--quiet", action="store_true", help="say nothing but errors and, at the end, where the report is")
    add(
        "--json",
        action="store_true",
        help="print verdict.json on stdout and nothing else there (progress goes to stderr)",
    )
    for flag, how in (flags or {}).items():
        parser.add_argument(flag, **with_default(how))
    return parser


def with_default(how: dict, default: Any = None) -> dict:
    """What argparse is told of a flag, its help ending in what stands where it is not typed."""
    if default is None and (default := how.get("default")) is None:
        return how
    first, *rest = str(default).split(",")
    short = f"{first},...,{rest[-1]}" if len(rest) > 3 else default
    return how | {"help": f"{how['help']} (default: {short})"}


def parse_args(
    doc: str, own: Mapping[str, Any], argv: list[str] | None = None, flags: Mapping[str, dict] | None = None
) -> Command:
    """The flags that mean the same in every script; `own` is the script's grid. `flags` are the script's own,
    as `parser_of` takes them: their values are settings of its results. Raises UserError.
    """
    args = parser_of(doc, flags, own).parse_args(argv)
    check_output(args)
    preset = PRESETS[args.preset] if args.preset else {}
    if args.sae:  # they are what they are
        if typed := [f"--{name}" for name in TRAINING if getattr(args, name) is not None]:
            raise UserError(f"--sae evaluates SAEs that exist; {', '.join(typed)} would train some")
        own = {**own, "models": None, "k": "1", "seeds": "0", "tokens": "1", "expansion": 1}
    elif args.basis:
        raise UserError("--basis is about the SAEs of --sae")
    elif args.ignore_field:
        raise UserError("--ignore-field is about the SAEs of --sae")
    for name, value in {**DEFAULTS, **own, **preset}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    saes = [printable(spec, "--sae") for spec in dict.fromkeys(parse_names(args.sae or ""))]
    models = parse_models(args.models) if args.models else []
    if args.plant:
        models = with_twins(models, args.plant)
    for name in ("revision", "data", "split", "config", "column", "out", "cache", "finished"):
        printable(str(getattr(args, name)), f"--{name.replace('finished', 'from')}")
    if not (models or saes or args.finished):
        raise UserError("--sae: a path or a hub id, please")
    grid = Grid(
        models=tuple(models),
        k=parse_ints(args.k, "--k", 1),
        seeds=parse_ints(args.seeds, "--seeds", 0),
        tokens=tuple(sorted({parse_count(part) for part in args.tokens.split(",")})),
        expansion=parse_int(str(args.expansion), "--expansion", 1),
        recipes=parse_choices(args.recipe, "--recipe", ("base", "saelens")),
        sinks=parse_choices(args.sinks, "--sinks", ("keep", "drop")),
        saes=tuple(saes),
        basis=parse_basis(args.basis) if args.basis else (),
        data=args.data,
        split=args.split,
        revision=args.revision,
        dtype=args.dtype,
        eval_seqs=parse_int(str(args.eval_seqs), "--eval-seqs", 2),
        ctx=parse_int(str(args.ctx), "--ctx", 2),
        leave_sinks=args.leave_sinks,
        save_tokens=args.save_tokens,
        bos=args.bos,
        ignore_fields=tuple(
            dict.fromkeys(
                printable(name, "--ignore-field")
                for typed in args.ignore_field or ()
                for name in parse_names(typed)
            )
        ),
        column=args.column,
        config=args.config,
    )
    own_names = [dest(flag) for flag in flags or {}]
    return Command(
        grid,
        args.device,
        args.out,
        args.cache,
        args.fresh,
        args.finished,
        args.dry_run,
        own={name: getattr(args, name) for name in own_names},
        quiet=args.quiet,
        json=args.json,
    )


def check_output(args: argparse.Namespace) -> None:
    """Raises UserError where --quiet or --json would leave nothing to print."""
    if args.dry_run and (args.quiet or args.json):
        raise UserError(
            f"--dry-run prints a grid and its cost; leave out {'--json' if args.json else '--quiet'}"
        )


def with_twins(models: list[tuple[str, int | None]], plants: str) -> list[tuple[str, int | None]]:
    """The models, and of the last one, at its layers, a twin for each of the plants."""
    if not models:
        raise UserError("--plant: of which model? --models says")
    last = models[-1][0]
    names = [f"{last}+{printable(one, '--plant')}" for one in dict.fromkeys(plants.split(","))]
    if unknown := [name for name in names if not plant.plants(name)]:
        raise UserError(f"--plant {brief(unknown[0].rpartition('+')[2])}: {plant.FORMS}, please")
    layers = [layer for name, layer in models if name == last]
    return models + [(name, layer) for name in names for layer in layers]


def parse_path(text: str) -> pathlib.Path:
    """An empty name would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; the current folder is .")
    return pathlib.Path(text)


def parse_names(text: str) -> list[str]:
    r"""Names separated by commas. A comma within a name is escaped, or the name stands in quotes.

    >>> parse_names(r'a,"b,c",d\,e')
    ['a', 'b,c', 'd,e']
    """
    parts = re.findall(r'"[^"]+"(?=,|$)|(?:\\,|[^,])+', text)
    return [part[1:-1] if part[:1] == part[-1:] == '"' else part.replace("\\,", ",") for part in parts]


def parse_choices(text: str, flag: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Names separated by commas, in the order given."""
    values = tuple(dict.fromkeys(text.split(",")))
    if unknown := [v for v in values if v not in choices]:
        raise UserError(f"{flag} {brief(','.join(unknown))}: choose from {', '.join(choices)}")
    return values


def parse_basis(text: str) -> tuple[tuple[str, str], ...]:
    """(NAME or "", basis) of each part of --basis."""
    parts = [printable(part, "--basis").rpartition("=") for part in text.split(",")]
    if unknown := [basis for _, _, basis in parts if basis not in ("raw", "centred")]:
        raise UserError(f"--basis {brief(unknown[0])}: raw or centred, or NAME=raw, please")
    return tuple((name, basis) for name, _, basis in parts)


def parse_models(text: str) -> list[tuple[str, int | None]]:
    models = []
    for part in text.split(","):
        name, at, layer = printable(part, "--models").partition("@")
        if not name or (at and not layer.isdecimal()):
            raise UserError(f"--models {brief(part)}: NAME or NAME@LAYER, please")
        if len(layer) > 4:
            raise UserError(f"--models {brief(part)}: no model has so many layers")
        models.append((name, int(layer) if at else None))
    if len(set(models)) < len(models):
        raise UserError(f"--models {brief(text, 280)}: the same model and layer twice")
    return models


# -------------------------------------------------------------------------------------------------- command
def main() -> None:
    folders = [pathlib.Path(text) for text in sys.argv[2:]]
    if sys.argv[1:] in (["--help"], ["-h"]):
        return print(__doc__, end="")
    if sys.argv[1:2] == ["diff"] and len(folders) == 2:
        sys.exit(compare_runs.diff(*folders))
    if sys.argv[1:2] == ["report"] and len(folders) == 1:
        return summary.write(*folders)
    if sys.argv[1:3] == ["check", "--device"] and sys.argv[3:] in (["cpu"], ["cuda"], ["mps"]):
        sys.exit(check_device.check(sys.argv[3]))
    raise UserError(
        "usage: python common.py diff FOLDER FOLDER | report FOLDER | check --device mps|cuda|cpu"
    )


if __name__ == "__main__":
    run_script(main)
