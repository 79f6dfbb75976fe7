"""Existing SAEs, from a hub to the audit table: the script as its users run it, the real clients, a hub on
the loopback.
"""

import itertools
import json
import math
import pathlib
import re
import shutil

import zygote
from helpers import ROOT, contents, quick_sae, script
from hub import serve
from transport_geometry.formats import find_and_read
from transport_geometry.formats.computed_sae import fused
from transport_geometry.formats.saelens import write_saelens
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.records.tables import read_table
from transport_geometry.reporting.sae_words import WORDS
from transport_geometry.saes.sae import save_sae, tied_init
from transport_geometry.saes.train import activation_chunks
from transport_geometry.text.heldout import packed_rows

import pytest
import torch
from test_data import write
from test_formats import write_dictionary

MODEL, DATA = "EleutherAI/pythia-70m", "NeelNanda/pile-small-tokenized-2b"
SAES = "EleutherAI/sae-pythia-70m-32k"
pytestmark = pytest.mark.slow  # the hub's first SAEs and the clients' process take as long
SIZE = "--eval-seqs 8 --ctx 64".split()
MADE = {"model": "pythia-70m", "layer": 3, "ctx": 128, "data": "the Pile"}
OF_TOPK, OF_BATCH = (
    f"org/bench/{kind}_pythia-70m/resid_post_layer_3/trainer_0" for kind in ("TopK", "BatchTopK")
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """stdlib-s under pythia-70m's name, its training text as ids, and one SAE of its block 3 in every
    format.
    """
    folder = tmp_path_factory.mktemp("hub")
    models = folder / "models"
    shutil.copytree(ROOT / "demo/stdlib-s", models / MODEL)
    model, tokenizer = load_model("stdlib-s", torch.device("cpu"))
    rows = itertools.islice(packed_rows("stdlib", "train", tokenizer, 512), 150)
    write(folder / f"datasets/{DATA}/data/train.parquet", [{"tokens": row.tolist()} for row in rows])
    saes = {}
    for layer in (2, 3):
        h, sink = next(activation_chunks(Hook(model, layer), "stdlib", tokenizer, 128, 40_000, "keep"))
        saes[layer] = quick_sae(h, sink)
        save_sae(models / f"{SAES}/layers.{layer}", saes[layer], {})
        (models / f"{SAES}/layers.{layer}/provenance.json").unlink()  # theirs have none
    sae = saes[3]
    save_sae(models / f"{SAES}/layers.3.mlp", sae, {})
    (models / f"{SAES}/config.json").write_text("{}")
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.t()}
    tensors |= {"b_dec": sae.b_dec, "k": torch.tensor(sae.k)}
    says = dict(lm_name=MODEL, layer=3, submodule_name="resid_post_layer_3", dict_size=256)
    for name, kind, threshold in ((OF_TOPK, "AutoEncoderTopK", -1.0), (OF_BATCH, "BatchTopKSAE", 1.0)):
        (models / name).mkdir(parents=True)
        of_kind = tensors | {"threshold": torch.tensor(threshold)}
        write_dictionary(models / name, kind, of_kind, buffer={"ctx_len": 128}, **says)
    for name, settings in (
        ("lens", {}),
        ("lens-bos", {"prepend_bos": True, "context_size": 48}),
        ("lens-strange", {"turned_round": 2}),
    ):
        write_saelens(models / f"org/{name}", sae, MADE)
        edit(models / f"org/{name}/cfg.json", metadata=settings)
    write_saelens(models / "org/one-late", saes[2], MADE | {"layer": 4})
    save_sae(models / "org/wide/layers.3", tied_init(32, 512, 4, 0, torch.zeros(32)), {})
    with serve(folder) as server:
        server.here = server.environment(tmp_path_factory.mktemp("hf"))
        server.elsewhere = server.environment(tmp_path_factory.mktemp("empty"))  # nothing was loaded there
        yield server
        zygote.end(server.here)
        zygote.end(server.elsewhere)


def edit(path, **changes):
    """A JSON file's named values changed."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def healed(hub):
    hub.heal()
    hub.requests.clear()


def run(hub, out, sae, *more, models=f"{MODEL}@3", environment=None, name="audit.py", **how):
    """out: None, the default folder. Nothing is drawn, unless setup="" says so."""
    named = ["--models", models] if models else []
    named += ["--out", out] if out else []
    command = ["--sae", sae, *named, "--data", DATA, *SIZE, "--device", "cpu", *more]
    how = {"setup": zygote.UNDRAWN, "environment": environment or hub.here} | how
    return script(name, *command, **how)


@pytest.fixture(scope="module")
def audit(hub, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "out"
    return out, run(hub, out, SAES, setup="")


def test_the_headline_command(audit, hub):
    out, done = audit
    for said in ("left out", f"{SAES}/layers.2 (layer 2)", f"{SAES}/layers.3.mlp (mlp, not resid_post)"):
        assert said in done.stdout
    (row,) = read_table(out / "audit.csv")
    known = dict(sae=f"{SAES}/layers.3", model=MODEL, layer=3, format="sparsify", basis="raw", k=8, l0=8)
    assert {name: row[name] for name in known} == known
    assert row["word"] in WORDS and row["kl_excess_lo"] < row["kl_excess"] < row["kl_excess_hi"]
    assert 0 < row["r2"] < min(row["r2_overcomplete"], row["r2_dictionary_learning"])
    assert row["ce_rec"] == pytest.approx(2 - row["ce_recon"] / row["ce_orig"], abs=1e-5)
    assert row["fvu_as_said"] < row["fvu_otherwise"] * 1.05
    report, asked = (out / "report.md").read_text(), "Can the R² of this SAE be read as it is"
    assert asked in report and asked in done.stdout and row["word"] in done.stdout
    assert row["says"] in report and "8 sequences of 64 tokens" in report
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["leaf"] == row["word"]
    nulls = {r["sae"]: r for r in read_table(out / "conditions.csv") if r["recipe"] == "null"}
    assert set(nulls) == {"null-identity", "null-mean", "null-random", "null-gaussian"}
    assert nulls["null-mean"]["r2_dictionary_learning"] == pytest.approx(0, abs=1e-6)
    assert nulls["null-mean"]["r2_overcomplete"] > 0.1


def test_running_again_measures_nothing_and_leaves_the_same_bytes(audit, hub):
    out, _ = audit
    before = contents(out)
    run(hub, out, SAES, setup="")
    assert contents(out) == before
    run(hub, out, SAES, "--from", out, setup="")
    assert contents(out) == before


def test_every_format_of_one_sae_gets_the_same_numbers(audit, hub, tmp_path):
    """As sparsify, dictionary_learning and SAELens write it; each on the tokens that its files say."""
    saes = [f"{SAES}/layers.3", "org/bench/TopK*", "org/bench/BatchTopK*", "org/lens", "org/lens-bos"]
    done = run(hub, tmp_path / "out", ",".join(saes))
    rows = {row["sae"]: row for row in read_table(tmp_path / "out/audit.csv")}
    assert len(rows) == 5 and "left out" not in done.stdout
    (one,) = read_table(audit[0] / "audit.csv")
    for name in (f"{SAES}/layers.3", OF_TOPK, "org/lens"):
        for column in ("r2", "r2_nosink", "ce_rec", "swd_tok", "fed_nosink", "l0", "r2_openai"):
            assert rows[name][column] == pytest.approx(one[column], rel=1e-5), (name, column)
    assert rows[OF_BATCH]["k"] == "none" and rows[OF_BATCH]["l0"] != 8
    bos = rows["org/lens-bos"]
    assert [(rows[name]["ctx"], rows[name]["bos"]) for name in ("org/lens-bos", "org/lens")] == [
        (48, "True"),
        (64, "False"),
    ]
    assert bos["ce_orig"] != one["ce_orig"]
    assert "48 tokens after a BOS" in (tmp_path / "out/report.md").read_text()
    pairs = {(row["sae_a"], row["sae_b"]): row["kind"] for row in read_table(tmp_path / "out/pairs.csv")}
    # lens-bos was measured on other tokens, and the threshold SAE has another L0
    alike = set(rows) - {bos["sae"], OF_BATCH}
    assert len(pairs) == 3 and {name for two in pairs for name in two} == alike
    same = {f"{SAES}/layers.3", "org/lens"}
    assert [kind for names, kind in pairs.items() if set(names) == same] == ["neither"]
    conditions = read_table(tmp_path / "out/conditions.csv")
    assert {row["n_tok"] for row in conditions} == {8 * 63, 8 * 47} and len(conditions) == 5 + 8


def test_an_edited_configuration_is_another_sae(hub, tmp_path):
    folder = tmp_path / "layers.3"
    shutil.copytree(hub.folder / f"models/{SAES}/layers.3", folder)
    run(hub, tmp_path / "out", str(folder))
    edit(folder / "cfg.json", k=4)
    assert "fingerprint" in refused(run(hub, tmp_path / "out", str(folder), check=2))


def test_exp_c_and_exp_e_take_them_too_and_say_what_is_odd(hub, tmp_path):
    """A threshold SAE, and one whose files name another model, by the number of a folder."""
    shutil.copytree(hub.folder / "models" / OF_BATCH, tmp_path / "16")
    edit(tmp_path / "16/config.json", trainer={"lm_name": f"{MODEL}-deduped"})
    command = "--sae 16 --models stdlib-s --eval-seqs 4 --ctx 32 --device cpu --out out --fresh".split()
    for name in ("expc_fisher.py", "expe_attention.py", "audit.py"):
        done = script(name, *command, environment=hub.here, folder=tmp_path, setup=zygote.UNDRAWN)
    (row,) = read_table(tmp_path / "out/audit.csv")
    assert row["sae"] == "16" and row["trained_on"] == f"{MODEL}-deduped"
    assert f"16: its files say {MODEL}-deduped; measured on stdlib-s" in done.stdout


def refused(done):
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("audit.py: ") and "Traceback" not in done.stderr
    return last


def test_an_sae_one_block_late_is_refused_with_both_numbers(hub, tmp_path):
    line = refused(run(hub, tmp_path / "out", "org/one-late", models=MODEL, check=2))
    assert re.search(r"layer 4, raw\) it leaves 0\.\d+ .* read as layer 3, raw 0\.\d+", line)
    assert not (tmp_path / "out").exists()
    run(hub, tmp_path / "out", "org/one-late", "--basis", "raw", models=MODEL)
    assert math.isnan(read_table(tmp_path / "out/audit.csv")[0]["fvu_as_said"])


def test_a_field_that_nobody_knows_is_let_pass_by_name_and_said(hub, tmp_path):
    out, flag = tmp_path / "out", ("--ignore-field", "turned_round")
    assert "metadata.turned_round (2)" in refused(run(hub, out, "org/lens-strange", check=2))
    assert "no SAE here" in refused(run(hub, out, "org/lens", *flag, check=2))
    assert not out.exists()
    done = run(hub, out, "org/lens,org/lens-strange", *flag, models=None)  # which their files name
    assert {(row["model"], row["layer"]) for row in read_table(out / "audit.csv")} == {(MODEL, 3)}
    saes = json.loads((out / "run.json").read_text())["settings"]["saes"]
    assert saes["org/lens-strange"]["ignored"] == ["metadata.turned_round"]
    assert "ignored" not in saes["org/lens"]
    report = (out / "report.md").read_text()
    assert "org/lens-strange: fields of its files that nobody here knows" in report
    assert "org/lens, org/lens-strange: fields of training and keeping, not computed with: d_in" in report
    assert "nobody here knows" in " ".join(done.stdout.split())


def test_a_basis_reaches_the_sae_that_it_names(hub, tmp_path):
    """Not those beside it, whose files are believed, and checked."""
    both = f"{SAES}/layers.3,org/lens"
    line = refused(run(hub, tmp_path / "out", both, "--basis", "centred", check=2))
    assert "of which of the 2 SAEs?" in line and "'*=centred'" in line
    assert "no SAE is called so" in refused(run(hub, tmp_path / "out", both, "--basis", "x=raw", check=2))
    assert "raw or centred" in refused(run(hub, tmp_path / "out", both, "--basis", "lens=rwa", check=2))
    run(hub, tmp_path / "out", both, "--basis", "lens=centred")
    lens, own = sorted(read_table(tmp_path / "out/audit.csv"), key=lambda row: row["sae"] != "org/lens")
    assert (lens["basis"], own["basis"]) == ("centred", "raw")
    assert math.isnan(lens["fvu_as_said"]) and own["fvu_as_said"] > 0
    assert lens["r2"] != own["r2"]  # the same weights


def test_one_refused_sae_is_a_row_and_does_not_stop_the_others(hub, tmp_path):
    broken = ["org/wide", "org/one-late", "org/nope", str(tmp_path / "nothing-here/at-all")]
    done = run(hub, tmp_path / "out", ",".join([f"{SAES}/layers.3", *broken]), models=MODEL)
    rows = {row["sae"]: row for row in read_table(tmp_path / "out/audit.csv")}
    why = {sae: row["refused"] for sae, row in rows.items() if row["word"] == "refused"}
    assert rows.keys() - why.keys() == {f"{SAES}/layers.3"} and rows[f"{SAES}/layers.3"]["refused"] == ""
    assert "reads 32 dimensions" in why["org/wide/layers.3"] and "layer 3, raw 0." in why["org/one-late"]
    assert "no repository of the hub" in why["org/nope"] and "no such file" in why["nothing-here/at-all"]
    report = (tmp_path / "out/report.md").read_text()
    for sae, text in why.items():
        assert f"refused: {sae}: " in done.stdout and text in report
    assert "4 others refused" in " ".join(done.stdout.split())
    for path in (tmp_path / "out").iterdir():
        assert path.name == "run.json" or str(tmp_path).encode() not in path.read_bytes(), path
    before = contents(tmp_path / "out")
    run(hub, tmp_path / "out", "", "--from", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    line = refused(run(hub, tmp_path / "none", ",".join(broken), models=MODEL, check=2))
    assert "and 3 more" in line and not (tmp_path / "none").exists()


def test_another_audit_goes_beside_the_first(hub, tmp_path):
    """Without --out no audit is in another's way, nor in Exp-B's; with it the refusal is one short line."""
    for name, sae, folder in (
        ("audit.py", "org/lens", "audit"),
        ("expb.py", f"{SAES}/layers.3", "audit-2"),
        ("audit.py", "org/bench/TopK*", "audit-3"),
        ("expb.py", f"{SAES}/layers.3", "audit-2"),
    ):
        done = run(hub, None, sae, name=name, folder=tmp_path)
        assert f"report: outputs/{folder}/report.md" in done.stdout
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["audit", "audit-2", "audit-3"]
    line = refused(run(hub, tmp_path / "outputs/audit", "org/bench/TopK*", check=2))
    said = line.partition(" holds ")[2]
    assert said.startswith("a run with other settings (saes: there org/lens, here org/bench/TopK_")
    assert len(said) < 200, said
    run(hub, None, "org/lens", "--fresh", folder=tmp_path)
    assert len([*(tmp_path / "outputs").iterdir()]) == 3


WRONG = {  # --sae -> what the hub does, what must be said
    "org/nope": (None, "no repository of the hub"),
    "org/bench": (dict(pattern="/api/models/org/bench*", status=401, code="GatedRepo"), "gated"),
    "org/one-late": (dict(pattern="/api/models/org/one-late*", status=500), "500"),
    "org/lens": (dict(pattern="*/sae_weights.safetensors", after=1000), "org/lens"),
    "org/wide": (None, "reads 32 dimensions, and EleutherAI/pythia-70m has 64"),
    f"{SAES}/layers.5": (None, "no SAE at layers.5"),
    f"{SAES}/layers.3.mlp": (None, "none of its 1 SAEs"),
    "org/lens-bos@nowhere": (None, "Revision Not Found"),
}


HURRIED = """
import types, huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(sleep=lambda seconds: None)  # the client waits before it tries again
"""


def test_what_a_hub_can_do_wrong_is_one_line(hub, tmp_path):
    for rule, _ in WRONG.values():
        if rule:
            hub.fail(**rule)
    for sae, (_, says) in WRONG.items():
        done = run(hub, tmp_path / "out", sae, check=2, environment=hub.elsewhere, setup=HURRIED)
        line = refused(done)
        assert says in line and sae.split("@")[0] in line
    assert not (tmp_path / "out").exists()
    # nothing half-written that looks whole
    assert not list(pathlib.Path(hub.elsewhere["HF_HOME"]).rglob("snapshots/**/sae_weights.safetensors"))


def test_dry_run_lists_them_and_downloads_no_weights(hub, tmp_path):
    done = run(hub, tmp_path / "out", SAES, "--dry-run", models=MODEL, environment=hub.elsewhere)
    for said in (f"{SAES}/layers.2", f"{SAES}/layers.3", "TFLOP", "256"):
        assert said in done.stdout
    assert not (tmp_path / "out").exists() and not any(path.endswith("safetensors") for path in hub.requests)


def test_the_two_commands_of_formats(hub, tmp_path):
    def run(*arguments, check=0):
        return script("formats.py", *arguments, check=check, environment=hub.here, folder=tmp_path)

    listed = run("list", SAES).stdout
    assert "layers.3.mlp" in listed and "resid_post" in listed
    assert "turned_round" in run("list", "org/lens-strange").stdout  # what will be refused
    for no_sae in (MODEL, ROOT / "demo/stdlib-s"):
        assert "it holds a language model, and no SAE" in run("list", no_sae, check=2).stderr
    shutil.copytree(ROOT / "demo/stdlib-s", tmp_path / "both/model")
    shutil.copytree(hub.folder / f"models/{SAES}/layers.3", tmp_path / "both/layers.3")
    of_both = run("list", "both").stdout
    assert "both/layers.3" in of_both and "both/model" not in of_both
    (file,) = find_and_read.find(str(hub.folder / f"models/{SAES}/layers.3"))
    save_sae(tmp_path / "mine", fused(find_and_read.read(file)), MADE | {"model": "stdlib-s", "ctx": 64})
    assert "load_from_disk" in run("export", "mine", "there").stdout
    assert find_and_read.describe(find_and_read.find(str(tmp_path / "there"))[0]).model == "stdlib-s"
    twice = run("export", "mine", "there", check=2)
    assert "holds cfg.json and sae_weights.safetensors already" in twice.stderr
    assert "not an SAE trained here" in run("export", tmp_path / "there", "again", check=2).stderr
