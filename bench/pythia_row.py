"""The 70M row of `--preset fast3` at Pythia-70m's true shape with random weights, from a hub on the loopback.
Run by hand:

    timeout -s INT 600 python bench/pythia_row.py            # ten minutes of its training, at its own step size
    python bench/pythia_row.py --tokens 4096                 # hardly any training, all of its evaluation; any flag of expb.py

What it cannot say: anything about R^2 or CE of the real model. What it does: wall time, peak memory, tokens a
second in training and in evaluation, and what of it is the language model. The tokenizer is a byte-level BPE
of 50k entries trained on the standard library.
"""

import atexit
import collections
import contextlib
import functools
import os
import pathlib
import resource
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub import serve  # noqa: E402

temporary = tempfile.TemporaryDirectory()
FOLDER = pathlib.Path(temporary.name)
server = serve(FOLDER / "hub")
hub = server.__enter__()
atexit.register(server.__exit__, None, None, None)
os.environ.update(hub.environment(FOLDER / "hf"))  # the clients read it when they are imported

import common
import expb  # noqa: E402
from transport_geometry import evaluate as evaluation
from transport_geometry import grid, train
from transport_geometry import run as running
from transport_geometry.text import packed_rows, stdlib_documents

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

MODEL, DATA = "EleutherAI/pythia-70m", "NeelNanda/pile-small-tokenized-2b"


def make_hub(folder: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        (text for _, text in stdlib_documents("train")),
        trainers.BpeTrainer(vocab_size=50_000, special_tokens=["<|endoftext|>"], show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=50304,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )
    # float16, as Pythia's file is
    transformers.GPTNeoXForCausalLM(config).half().save_pretrained(folder / f"models/{MODEL}")
    tokenizer.save_pretrained(folder / f"models/{MODEL}")
    rows = [{"tokens": row.tolist()} for row in packed_rows("stdlib", "train", tokenizer, 1024)]
    (folder / f"datasets/{DATA}/data").mkdir(parents=True)
    for i in range(4):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows[i::4]),
            folder / f"datasets/{DATA}/data/train-0000{i}-of-00004.parquet",
        )
    print(
        f"hub: {MODEL} {config.hidden_size} x {config.num_hidden_layers}, {len(tokenizer)} entries; {DATA} {len(rows)} rows of 1024 ids"
    )


spent, depth = collections.Counter(), collections.Counter()


def timed(module, name: str, what: str) -> None:
    """Count the seconds in module.name as `what`, nested calls once."""
    function = getattr(module, name)

    @functools.wraps(function)
    def around(*args, **kwargs):
        depth[what] += 1
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            depth[what] -= 1
            spent[what] += 0 if depth[what] else time.perf_counter() - start

    setattr(module, name, around)


make_hub(FOLDER / "hub")
timed(train, "head", "training: language model")
for name in ("head", "tail", "clean_pass"):
    timed(evaluation, name, "evaluation: language model")
step, trained = train.Training.one_step, collections.Counter()
train.Training.one_step = lambda self, h: trained.update({self.sae.k: len(h)}) or step(self, h)
timed(running, "train", "training")
timed(running, "run_hook", "evaluation")
timed(running, "plan", "loading, held-out rows")
sys.argv = [
    "expb.py",
    "--preset",
    "fast3",
    "--models",
    MODEL,
    "--device",
    "cpu",
    "--out",
    str(FOLDER / "out"),
    "--cache",
    str(FOLDER / "cache"),
    *sys.argv[1:],
]
args = common.parse_args("", **expb.GRID)
start = time.perf_counter()
with contextlib.suppress(SystemExit):  # of an interrupt: what was measured is printed
    common.run_script(expb.main)
wall = time.perf_counter() - start
assert any(path.endswith("model.safetensors") for path in hub.requests) and any(
    path.endswith(".parquet") for path in hub.requests
)

print(
    f"\n{torch.get_num_threads()} threads, tokens {args.tokens}, k {args.k}, evaluation {args.eval_seqs} x {args.ctx}: {wall:.0f} s, "
    f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
)
for what, seconds in sorted(spent.items()):
    print(f"{what:28s} {seconds:8.1f} s  {seconds / wall:5.1%}")
print(
    f"training: {sum(trained.values())} SAE-tokens, {sum(trained.values()) / spent['training']:.0f} a second ({len(args.k)} SAEs on one stream)"
)
if spent["evaluation"]:
    print(
        f"evaluation: {args.eval_seqs * (args.ctx - 1) / spent['evaluation']:.0f} tokens/s for {len(args.k)} SAEs and {len(grid.NULLS)} null rows"
    )
