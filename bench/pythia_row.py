"""The 70M row of `--preset fast3` at Pythia-70m's true shape with random weights, from a hub on the loopback.
Run by hand:

    timeout -s INT 600 python bench/pythia_row.py     # ten minutes of its training, at its own step size
    python bench/pythia_row.py --tokens 4096          # hardly any training, all of its evaluation

Takes the flags of expb.py, and one of its own: --small, a toy shape, vocabulary and text, to see whether it
runs. What it cannot say: anything about R^2 or CE of the real model. What it does: wall time, peak memory,
tokens a second in training and in evaluation, and what of it is the language model. The tokenizer is a
byte-level BPE of 50k entries trained on the standard library.

Hugging Face's clients read the environment when they are imported, so what imports them is imported late.
"""

import collections
import contextlib
import functools
import os
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench
import hub

MODEL, DATA, END_OF_TEXT = "EleutherAI/pythia-70m", "NeelNanda/pile-small-tokenized-2b", "<|endoftext|>"
ROW, FILES = 1024, 4  # ids of a row of the data set, and its files


@dataclass(frozen=True)
class Size:
    shape: tuple[int, int, int]  # width, blocks, heads
    entries: int  # that the tokenizer learns
    vocabulary: int  # of the model
    documents: int | None = None  # of the standard library; None: all of its training side


TRUE, SMALL = Size((512, 6, 8), 50_000, 50_304), Size((32, 2, 2), 500, 512, 100)
HUB = "hub: {model} {d} x {blocks}, {entries} entries; {data} {rows} rows of {row} ids"
WHOLE = """
{threads} threads, tokens {tokens}, k {k}, evaluation {seqs} x {ctx}: {wall:.0f} s, peak {peak:.1f} GB"""
PART = "{what:28s} {seconds:8.1f} s  {share:5.1%}"
TRAINED = "training: {n} SAE-tokens, {rate:.0f} a second ({saes} SAEs on one stream)"
EVALUATED = "evaluation: {rate:.0f} tokens/s for {saes} SAEs and {nulls} null rows"


def make_hub(folder: pathlib.Path, size: Size) -> None:
    """The model, its tokenizer and the data set, as files of a hub."""
    from transport_geometry.models.text import packed_rows, stdlib_documents

    import pyarrow
    import pyarrow.parquet
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        (text for _, text in stdlib_documents("train")[: size.documents]),
        trainers.BpeTrainer(vocab_size=size.entries, special_tokens=[END_OF_TEXT], show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )
    torch.manual_seed(0)
    d, blocks, heads = size.shape
    config = transformers.GPTNeoXConfig(
        hidden_size=d,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * d,
        vocab_size=size.vocabulary,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )
    # float16, as Pythia's file is
    transformers.GPTNeoXForCausalLM(config).half().save_pretrained(folder / f"models/{MODEL}")
    tokenizer.save_pretrained(folder / f"models/{MODEL}")
    packed = packed_rows("stdlib", "train", tokenizer, ROW)
    rows = [{"tokens": row.tolist()} for _, row in zip(range(size.documents or sys.maxsize), packed)]
    data = folder / f"datasets/{DATA}/data"
    data.mkdir(parents=True)
    for i in range(FILES):
        path = data / f"train-{i:05}-of-{FILES:05}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[i::FILES]), path)
    print(
        HUB.format(
            model=MODEL, d=d, blocks=blocks, entries=len(tokenizer), data=DATA, rows=len(rows), row=ROW
        )
    )


class Clock:
    """Seconds by what they are spent on; of calls within calls of one kind the outer ones count."""

    def __init__(self) -> None:
        self.spent: collections.Counter[str] = collections.Counter()
        self.depth: collections.Counter[str] = collections.Counter()
        self.trained = 0  # tokens, of all SAEs

    def phase(self) -> str:
        return next((what for what in ("training", "evaluation") if self.depth[what]), "loading")

    def watch(self, owner: Any, name: str, kind: Callable[[], str]) -> None:
        """Count the seconds in owner.name as kind()."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def around(*args: Any, **kwargs: Any) -> Any:
            what = kind()
            self.depth[what] += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth[what] -= 1
                if not self.depth[what]:
                    self.spent[what] += time.perf_counter() - start  # type: ignore[assignment]

        setattr(owner, name, around)

    def watch_run(self) -> None:
        """Loading, training and evaluation, and what of each is the language model."""
        from transport_geometry.models.lm import Hook
        from transport_geometry.running import run
        from transport_geometry.saes.recipes import Training

        self.watch(run, "plan", lambda: "loading")
        self.watch(run, "train", lambda: "training")
        self.watch(run, "measure", lambda: "evaluation")
        for name in ("head", "tail", "clean_pass"):
            self.watch(Hook, name, lambda: f"{self.phase()}: language model")
        step = Training.one_step

        def counted(training: Training, h: Any) -> Any:
            self.trained += len(h)
            return step(training, h)

        Training.one_step = counted  # type: ignore[method-assign, assignment]


def measure(served: hub.Hub, folder: pathlib.Path, size: Size, flags: list[str]) -> None:
    """expb.py on the hub, and where its time goes."""
    import common
    import expb
    from transport_geometry.records.condition import NULLS

    import torch

    make_hub(folder / "hub", size)
    clock = Clock()
    clock.watch_run()
    preset = f"--preset fast3 --models {MODEL} --device cpu".split()
    places = ["--out", str(folder / "out"), "--cache", str(folder / "cache")]
    sys.argv = ["expb.py", *preset, *places, *flags]
    grid = common.parse_args("", expb.GRID).grid
    start = time.perf_counter()
    with contextlib.suppress(SystemExit):  # of an interrupt: what was measured is printed
        common.run_script(expb.main)
    wall = time.perf_counter() - start
    for suffix in ("model.safetensors", ".parquet"):
        assert any(path.endswith(suffix) for path in served.requests), f"no {suffix} was asked for"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        WHOLE.format(
            threads=torch.get_num_threads(),
            tokens=list(grid.tokens),
            k=list(grid.k),
            seqs=grid.eval_seqs,
            ctx=grid.ctx,
            wall=wall,
            peak=peak,
        )
    )
    for what, seconds in sorted(clock.spent.items()):
        print(PART.format(what=what, seconds=seconds, share=seconds / wall))
    saes, training, evaluation = len(grid.k), clock.spent["training"], clock.spent["evaluation"]
    if training:
        print(TRAINED.format(n=clock.trained, rate=clock.trained / training, saes=saes))
    if evaluation:
        rate = grid.eval_seqs * (grid.ctx - 1) / evaluation
        print(EVALUATED.format(rate=rate, saes=saes, nulls=len(NULLS)))


def main() -> None:
    flags = sys.argv[1:]
    size = SMALL if "--small" in flags else TRUE
    if {"-h", "--help"} & set(flags):
        bench.parser_of(__doc__).parse_args(flags)
    with tempfile.TemporaryDirectory() as folder, hub.serve(pathlib.Path(folder) / "hub") as served:
        environment = served.environment(pathlib.Path(folder) / "hf")
        os.environ.clear()  # of HF_HUB_OFFLINE, too
        os.environ.update(environment)
        measure(served, pathlib.Path(folder), size, [flag for flag in flags if flag != "--small"])


if __name__ == "__main__":
    main()
