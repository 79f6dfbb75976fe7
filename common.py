"""What every experiment's command line shares: the flags and the published grids, and how a script ends.

python common.py diff A B      # are two results folders one run? identical, same SAEs, reproduced (exit 0) or different (1)
"""

import argparse
import pathlib
import sys

from transport_geometry import rerun
from transport_geometry.errors import UserError, brief, printable, run_script
from transport_geometry.tables import readable_count

PRESETS = {  # the published grids, all on pythia and the Pile at 32x (published numbers: README)
    "fast2": dict(
        models="EleutherAI/pythia-70m@1,EleutherAI/pythia-70m@3,EleutherAI/pythia-70m@5,EleutherAI/pythia-410m@4,"
        "EleutherAI/pythia-410m@12,EleutherAI/pythia-410m@20",
        k="8,16,32,64,128,256",
        tokens="10M",
        seeds="0",
    ),
    "fast3": dict(
        models="EleutherAI/pythia-70m,EleutherAI/pythia-160m,EleutherAI/pythia-410m",
        k="8,16,32,64",
        tokens="10M",
        seeds="0",
    ),
    "phase2": dict(
        models="EleutherAI/pythia-70m,EleutherAI/pythia-410m", k="8,16", tokens="10M,50M,100M", seeds="0,1,2"
    ),
}
# of each number on the command line: far above what can be computed, and below what overflows (torch seeds a
# piece of a run by seed x 1000003 + its number, in 63 bits)
MOST = dict(k=10**6, seeds=2**32 - 1, tokens=10**12, expansion=10**9, eval_seqs=10**6, ctx=2**20)
PRESET_ALL = dict(data="NeelNanda/pile-small-tokenized-2b", expansion=32, eval_seqs=200, ctx=256)


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


def parse_int(text: str, flag: str, least: int) -> int:
    name = flag.removeprefix("--").replace("-", "_")
    try:
        value = int(text) if len(text) < 100 else float(text)  # int() refuses more than 4300 digits
    except ValueError:
        raise UserError(f"{flag} {brief(text)}: whole numbers, please") from None
    if not least <= value <= MOST[name]:
        raise UserError(f"{flag} {brief(text)}: must be at least {least} and at most {MOST[name]}")
    return int(value)


def parse_ints(text: str, flag: str, least: int) -> list[int]:
    """Whole numbers separated by commas, each once, ascending."""
    return sorted({parse_int(part, flag, least) for part in text.split(",")})


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{brief(message, 280)} (see --help)")


def parse_args(doc: str, argv: list[str] | None = None, **defaults) -> argparse.Namespace:
    """The flags that mean the same in every script; `defaults` are the script's own grid.

    Returns models as [(name, layer or None)] (none: the files of --sae name it), k, seeds, tokens as sorted
    lists of int, recipe, sinks and sae as lists. Raises UserError.
    """
    parser = _OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    grid = parser.add_argument_group("the grid")
    grid.add_argument(
        "--models",
        metavar="NAME[@LAYER],...",
        help="embedded name, local folder or hub id; layer: the middle one",
    )
    grid.add_argument(
        "--revision", help="of the models, where they come from the hub: a branch, tag or commit"
    )
    grid.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the language model; sums are in float32 or better",
    )
    grid.add_argument(
        "--data", help="stdlib, a local file or folder (txt, jsonl, parquet, arrow), or a hub data set"
    )
    grid.add_argument("--split", help="of the data set: train")
    grid.add_argument(
        "--sae",
        metavar="PATH_OR_ID,...",
        help="SAEs to evaluate instead of training some: local, or hub id with sub-path or pattern",
    )
    grid.add_argument(
        "--basis",
        choices=["raw", "centred"],
        help="of the activations that --sae were trained on, against what their files say",
    )
    grid.add_argument("--k", help="active latents, e.g. 8,16,32")
    grid.add_argument("--seeds", help="e.g. 0,1,2")
    grid.add_argument("--tokens", help="SAE training budgets, e.g. 300k,10M")
    grid.add_argument("--expansion", help="SAE width = expansion x d_model")
    grid.add_argument(
        "--recipe",
        help="how SAEs are trained: base, saelens, or both, the first being the one the verdict is about",
    )
    grid.add_argument("--sinks", help="sink positions in SAE training: keep, drop, or both")
    grid.add_argument("--eval-seqs", help="held-out sequences")
    grid.add_argument("--ctx", help="tokens per sequence")
    grid.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="a published grid on Pythia and the Pile; other flags override it",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add(
        "--out",
        type=parse_path,
        default=pathlib.Path("outputs") / pathlib.Path(sys.argv[0]).stem,
        help="results folder",
    )
    add("--cache", type=parse_path, default=pathlib.Path("outputs/cache"), help="trained SAEs")
    add(
        "--fresh",
        action="store_true",
        help="start the results folder over (what a run wrote there goes, and nothing else)",
    )
    add(
        "--from",
        dest="from_dir",
        type=parse_path,
        help="recompute tables, verdict and plots of a finished folder; no model",
    )
    add(
        "--verdict",
        type=parse_path,
        help="Exp-A's verdict, which opens the gate: outputs/expa/verdict.json, where there is one",
    )
    add("--save-tokens", action="store_true", help="also keep per-token arrays")
    add("--dry-run", action="store_true", help="print the grid and what it would cost, and stop")
    args = parser.parse_args(argv)
    preset = {**PRESET_ALL, **PRESETS[args.preset]} if args.preset else {}
    if args.sae:  # they are what they are: nothing of the grid applies
        training = ("k", "seeds", "tokens", "expansion", "recipe", "sinks", "preset")
        if given := [f"--{name}" for name in training if getattr(args, name) is not None]:
            raise UserError(f"--sae evaluates SAEs that exist; {', '.join(given)} would train some")
        defaults = defaults | {"models": None, "k": "1", "seeds": "0", "tokens": "1", "expansion": 1}
    elif args.basis:
        raise UserError("--basis is about the SAEs of --sae")
    for name, value in {
        "data": "stdlib",
        "split": "train",
        "recipe": "base",
        "sinks": "keep",
        "seeds": "0",
        **defaults,
        **preset,
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.models = parse_models(args.models) if args.models else []
    args.sae = [printable(spec, "--sae") for spec in dict.fromkeys((args.sae or "").split(",")) if spec]
    for name in ("revision", "data", "split", "out", "cache", "from_dir", "verdict"):
        printable(str(getattr(args, name)), f"--{name.removesuffix('_dir')}")
    if not (args.models or args.sae):
        raise UserError("--sae: a path or a hub id, please")
    args.recipe = parse_choices(args.recipe, "--recipe", ("base", "saelens"))
    args.sinks = parse_choices(args.sinks, "--sinks", ("keep", "drop"))
    args.k = parse_ints(args.k, "--k", 1)
    args.seeds = parse_ints(args.seeds, "--seeds", 0)
    args.tokens = sorted({parse_count(part) for part in args.tokens.split(",")})
    for name, least in (("expansion", 1), ("eval_seqs", 2), ("ctx", 2)):
        setattr(args, name, parse_int(str(getattr(args, name)), f"--{name.replace('_', '-')}", least))
    return args


def parse_path(text: str) -> pathlib.Path:
    """An empty name would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; the current folder is .")
    return pathlib.Path(text)


def parse_choices(text: str, flag: str, choices: tuple) -> list[str]:
    """Names separated by commas, in the order given."""
    values = list(dict.fromkeys(text.split(",")))
    if unknown := [v for v in values if v not in choices]:
        raise UserError(f"{flag} {brief(','.join(unknown))}: choose from {', '.join(choices)}")
    return values


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
    if len(sys.argv) != 4 or sys.argv[1] != "diff":
        raise UserError("usage: python common.py diff FOLDER FOLDER")
    sys.exit(rerun.diff(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])))


if __name__ == "__main__":
    run_script(main)
