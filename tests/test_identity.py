"""What determines an SAE decides its name, and what determines a result decides whether its folder may go
on.
"""

import doctest
import json
import pathlib
import platform
import random
import re
import shutil

import helpers
import zygote
from helpers import ROOT, contents, process
from transport_geometry import FIXED_CODE
from transport_geometry.formats import contract
from transport_geometry.models.loading import readable_names
from transport_geometry.records import store
from transport_geometry.records.tables import read_table
from transport_geometry.saes import external_saes
from transport_geometry.saes.sae import save_sae, tied_init
from transport_geometry.text.heldout import in_heldout

import numpy as np
import pytest
import torch

SIZE = "--eval-seqs 6 --ctx 64".split()
GRID = ["--k", "4", "--tokens", "10k", *SIZE]


def script(name, *arguments, check=0):
    return helpers.script(name, *arguments, check=check, setup=zygote.UNDRAWN).stderr


def documents(seed: int, side: str, n: int, words: int = 60) -> list[str]:
    """Made-up documents of one side."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        made = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 6))) for _ in range(words)]
        text = f"def {made[0]}(self):\n    return " + " ".join(made)
        found += [text] * (in_heldout(text) == (side == "heldout"))
    return found


def write(path: pathlib.Path, train: int) -> pathlib.Path:
    """A text whose held-out side is always the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = documents(0, "heldout", 30) + documents(train, "train", 120)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def saes(cache: pathlib.Path) -> set[str]:
    return {path.name for path in cache.iterdir() if not path.name.startswith(".")}


def r2(out: pathlib.Path) -> float:
    return next(row["r2"] for row in read_table(out / "conditions.csv") if row["recipe"] == "base")


@pytest.fixture
def model(tmp_path):
    """A copy of stdlib-s that may be changed."""
    shutil.copytree(ROOT / "demo/stdlib-s", tmp_path / "a/model", symlinks=False)
    return tmp_path / "a/model"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86-64")
def test_code_fixed_for_every_processor_is_a_setting_and_names_its_saes(tmp_path):
    """Read when libraries are imported, so in a process of its own; run.json says what was in force, and on
    which processor.
    """
    command = ["--models", "stdlib-s", *GRID, "--device", "cpu", "--cache", tmp_path / "cache"]
    script("expb.py", *command, "--out", tmp_path / "0")
    process("expb.py", *command, "--out", tmp_path / "1", env={"ANY_X86": "1"})
    plain, fixed = (json.loads((tmp_path / value / "run.json").read_text()) for value in ("0", "1"))
    assert plain["processor"] == fixed["processor"] != "" and plain["instructions"]["torch"]
    assert fixed["instructions"] == {"torch": "AVX2", "ANY_X86": "1", **FIXED_CODE}
    assert fixed["settings"] == plain["settings"] | {"instructions": "any x86-64"} != plain["settings"]
    assert len(saes(tmp_path / "cache")) == 2


@pytest.mark.slow
def test_saes_of_two_processors_are_told_apart(tmp_path):
    """A run that goes on where another stopped, on another machine; said where it is two, and only there."""
    command = ["--models", "stdlib-s@1,stdlib-s@3", *GRID, "--device", "cpu", "--cache", tmp_path / "cache"]
    elsewhere = "\nfrom transport_geometry.saes import train\ntrain.processor = lambda _: 'Another CPU'\n"
    first = ["--models", "stdlib-s@1", *command[2:], "--out", tmp_path / "first"]
    helpers.script("expb.py", *first, setup=zygote.UNDRAWN + elsewhere)
    script("expb.py", *command, "--out", tmp_path / "both")
    here, there = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("both", "first"))
    sae = "topk-x4-base-256-4-0-10000"
    assert there["trained_on"] == {"Another CPU": [f"stdlib-s@1 {sae}"]}
    assert here["trained_on"] == there["trained_on"] | {here["processor"]: [f"stdlib-s@3 {sae}"]}
    said = "trained on several processors (1 on"
    assert said in (tmp_path / "both/report.md").read_text()
    assert said not in (tmp_path / "first/report.md").read_text()


@pytest.mark.slow
def test_another_training_text_is_another_sae(tmp_path):
    """The held-out side was all that the cache knew: with another training text it served the old SAE without
    a word.
    """
    data, cache = write(tmp_path / "d.jsonl", train=1), tmp_path / "cache"
    command = ["--models", "stdlib-s", *GRID, "--data", data, "--cache", cache]
    script("expb.py", *command, "--out", tmp_path / "1")
    write(data, train=2)
    script("expb.py", *command, "--out", tmp_path / "2")
    script("expb.py", *command, "--out", tmp_path / "3", "--cache", tmp_path / "another")
    assert len(saes(cache)) == 2 and r2(tmp_path / "1") != r2(tmp_path / "2") == r2(tmp_path / "3")
    assert "data_content: there" in script("expb.py", *command, "--out", tmp_path / "1", check=2)


@pytest.mark.slow
def test_another_tokenizer_configuration_or_dtype_is_another_sae(tmp_path, model):
    cache, command = tmp_path / "cache", ["--models", model, *GRID, "--cache", tmp_path / "cache"]
    script("expb.py", *command, "--out", tmp_path / "1")
    before = {name: (model / name).read_text() for name in ("tokenizer.json", "config.json")}

    tokenizer = json.loads(before["tokenizer.json"])
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    configuration = json.loads(before["config.json"])
    configuration["use_parallel_residual"] = not configuration["use_parallel_residual"]
    for i, (name, content, word) in enumerate(
        (("tokenizer.json", tokenizer, "tokenizers"), ("config.json", configuration, "weights"))
    ):
        (model / name).write_text(json.dumps(content))
        refused = script("expb.py", *command, "--out", tmp_path / "1", check=2)
        assert re.search(rf"\({word}: (\w+: )?there", refused)
        script("expb.py", *command, "--out", tmp_path / name)
        assert len(saes(cache)) == 2 + i and r2(tmp_path / name) != r2(tmp_path / "1")
        (model / name).write_text(before[name])
    script("expb.py", *command, "--out", tmp_path / "1")
    assert len(saes(cache)) == 3
    script("expb.py", *command, "--dtype", "bfloat16", "--out", tmp_path / "bfloat16")
    assert len(saes(cache)) == 4
    # an audit of all of them on the model as it is now says which were trained on another
    rows = ["--eval-seqs", 4, "--ctx", 64, "--out", tmp_path / "audit"]
    script("audit.py", "--models", model, "--sae", f"{cache}/*", *rows)
    run = json.loads((tmp_path / "audit/run.json").read_text())["settings"]
    assert not run.get("refused")
    differs = [of.get("differs") for of in run["saes"].values()]
    assert sorted(map(str, differs)) == sorted(["None", "['tokenizer']", "['weights']", "['dtype']"])
    assert doctest.testmod(contract).attempted >= 2 and not doctest.testmod(contract).failed
    report = (tmp_path / "audit/report.md").read_text()
    assert report.count("trained on another language model than it is measured on") == 3


@pytest.mark.slow
def test_the_intervals_of_an_sae_are_its_own(tmp_path):
    """Beside another that is read on rows of other documents, they stay what they are alone."""
    data, cache = write(tmp_path / "d.jsonl", train=1), tmp_path / "cache"
    with data.open("a") as file:  # each gives up to four rows of 256 tokens, and others none by themselves
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents(2, "heldout", 4, words=500))
    for ctx in (16, 256):
        grid = "--models stdlib-s --k 4 --tokens 2k --expansion 4 --eval-seqs 4 --ctx".split()
        script("expb.py", *grid, ctx, "--data", data, "--cache", cache, "--out", tmp_path / str(ctx))
    how = ["--models", "stdlib-s", "--data", data, "--eval-seqs", 20, "--ctx", 256]
    (long,) = [one for one in saes(cache) if store.load(cache / one / store.PROVENANCE)["ctx"] == 256]
    rows = []
    for name, which in (("both", "*"), ("alone", long)):
        script("audit.py", *how, "--sae", f"{cache}/{which}", "--out", tmp_path / name)
        table = read_table(tmp_path / name / "audit.csv")
        rows += [row for row in table if long in row["sae"]]
    settings = json.loads((tmp_path / "both/run.json").read_text())["settings"]
    assert len(set(settings["documents"])) == 2
    both, alone = (
        {k: v for k, v in row.items() if k.startswith(("r2", "ce_rec_l", "ce_rec_h"))} for row in rows
    )
    assert both == pytest.approx(alone, nan_ok=True)


@pytest.mark.slow
def test_the_evaluation_is_no_part_of_an_sae(tmp_path):
    """expa, expb and expc, each with its own evaluation set, trained the same SAEs three times over."""
    cache = tmp_path / "cache"
    common = ["--models", "stdlib-s", "--k", "2,4", "--tokens", "10k", "--ctx", "64", "--cache", cache]
    script("expb.py", *common, "--eval-seqs", "6", "--out", tmp_path / "b")
    weights = {path: path.read_bytes() for path in cache.glob("*/sae.safetensors")}
    assert len(weights) == 2
    script("expb.py", *common, "--eval-seqs", "12", "--out", tmp_path / "b12")
    script("expc_fisher.py", *common, "--eval-seqs", "5", "--out", tmp_path / "c")
    script("expa.py", *common, "--eval-seqs", "20", "--seeds", "0", "--out", tmp_path / "a")
    assert {path: path.read_bytes() for path in cache.glob("*/sae.safetensors")} == weights


@pytest.mark.slow
def test_results_do_not_say_where_things_lie(tmp_path, model):
    """They say a name and what was in it; run.json says where. Moved elsewhere, the same run goes on."""
    data = write(tmp_path / "a/texts/d.jsonl", train=1).parent

    def run(name: str, place: str, out: str) -> None:
        command = ["--models", tmp_path / place / "model", "--data", tmp_path / place / "texts", *GRID]
        script(name, *command, "--save-tokens", "--out", tmp_path / out, "--cache", tmp_path / "cache")

    run("expb.py", "a", "out")
    run("expc_fisher.py", "a", "c")
    script("expb.py", "--from", tmp_path / "out")
    for folder in ("out", "c", "cache"):
        for name, content in contents(tmp_path / folder).items():
            if name.endswith(".npz"):  # packed
                content = repr(dict(np.load(tmp_path / folder / name))).encode()
            assert str(tmp_path).encode() not in content, name
    settings, record = (json.loads((tmp_path / f"out/{n}.json").read_text()) for n in ("verdict", "run"))
    assert settings["settings"]["models"] == ["model"] and settings["settings"]["data"] == "texts"
    assert record["paths"] == {str(model): str(model), str(data): str(data)}
    before = (tmp_path / "out/conditions.csv").read_bytes()
    (tmp_path / "a").rename(tmp_path / "b")
    run("expb.py", "b", "out")
    assert len(saes(tmp_path / "cache")) == 1 and (tmp_path / "out/conditions.csv").read_bytes() == before


def test_an_sae_trained_here_finds_its_folder_among_several_models(tmp_path, model):
    """Its file names the folder as results do, and --models as it was typed."""
    folder = tmp_path / "saes/layers.3"
    sae = tied_init(64, 256, 4, 0, torch.zeros(64))
    save_sae(folder, sae, {"model": "model", "layer": 3, "ctx": 32, "data": "stdlib"})
    taken, refused = external_saes.choose([str(folder)], [(str(model), 3), ("stdlib-m", 3)])
    assert [(one.model, one.layer) for one in taken] == [(str(model), 3)] and not refused


def test_nor_do_they_where_an_sae_says_so_itself(tmp_path, model):
    """SAELens writes the path of a local model into an SAE's configuration."""
    script("expb.py", "--models", model, *GRID, "--out", tmp_path / "1", "--cache", tmp_path / "cache")
    script("formats.py", "export", next((tmp_path / "cache").iterdir()), tmp_path / "lens")
    config = json.loads((tmp_path / "lens/cfg.json").read_text())
    config["metadata"]["model_name"] = str(model)
    (tmp_path / "lens/cfg.json").write_text(json.dumps(config))
    script("expb.py", "--models", f"{model}@3", "--sae", tmp_path / "lens", *SIZE, "--out", tmp_path / "2")
    for path in (tmp_path / "2").iterdir():
        assert path.name == "run.json" or str(tmp_path).encode() not in path.read_bytes(), path
    assert read_table(tmp_path / "2/audit.csv")[0]["trained_on"] == "model"


@pytest.mark.slow
def test_other_models_of_a_grid_are_no_part_of_an_sae(tmp_path, model):
    """Nor is how the text is called."""
    other = pathlib.Path(shutil.copytree(model, tmp_path / "b/model"))
    data = write(tmp_path / "d.jsonl", train=1)
    command = [*GRID, "--cache", tmp_path / "cache"]
    script("expb.py", "--models", model, *command, "--data", data, "--out", tmp_path / "1")
    data = data.rename(tmp_path / "e.jsonl")
    script("expb.py", "--models", f"{model},{other}@2", *command, "--data", data, "--out", tmp_path / "2")
    assert len(saes(tmp_path / "cache")) == 2
    assert {row["model"] for row in read_table(tmp_path / "2/conditions.csv")} == {"a/model", "b/model"}


def test_paths_of_one_name_are_told_apart(tmp_path):
    for name in ("x/model", "y/model", "y/other"):
        (tmp_path / name).mkdir(parents=True)
    names = [str(tmp_path / name) for name in ("x/model", "y/model", "y/other")]
    assert list(readable_names(names).values()) == ["x/model", "y/model", "other"]
    names = ["stdlib-s", "org/model", names[0]]
    assert list(readable_names(names).values()) == ["stdlib-s", "org/model", "model"]


@pytest.mark.slow
def test_the_order_of_the_arguments_leaves_no_trace(tmp_path, model):
    def run(name: str, models: list[str], k: str) -> None:
        command = ["--models", ",".join(models), "--k", k, "--tokens", "10k", *SIZE]
        script("expb.py", *command, "--out", tmp_path / name, "--cache", tmp_path / f"c{name}")

    models = ["stdlib-s", str(model), f"{model}@1"]  # two of one size
    run("1", models, "2,4")
    run("2", models[::-1], "4,2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    run("2", models, "4,2")  # the same run


def test_a_long_name_is_no_obstacle(tmp_path, model):
    long = model.rename(model.parent / ("m" * 240))
    script("expb.py", "--models", long, *GRID, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert len(saes(tmp_path / "cache")) == 1
