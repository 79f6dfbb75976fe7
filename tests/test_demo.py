"""The embedded models: what their folders promise, and a training run that survives an interruption."""

import json
import os
import re
import subprocess
import sys

from helpers import ROOT
from transport_geometry.models import lm, loading
from transport_geometry.text import heldout

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "demo"))
import train as demo  # noqa: E402


def test_folders_load_the_ordinary_way_in_float32():
    for name, folder in loading.EMBEDDED.items():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.float32 and model.config.hidden_size == demo.WIDTHS[name]
        text = "def forward(self, x):\n    return x  # naïve\n"
        assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.eos_token_id == 0
    assert (
        sum(
            p.stat().st_size
            for p in (ROOT / "demo").rglob("*")
            if p.is_file() and "checkpoints" not in p.parts
        )
        < 25e6
    )


@pytest.mark.slow
def test_held_out_loss_falls_with_scale():
    """On every 24th row of the held-out text of the Python at hand; differences paired by row, far outside
    their noise.
    """
    losses = []
    for name in demo.WIDTHS:
        model, tokenizer = loading.load_model(name, torch.device("cpu"))
        rows = torch.stack(list(heldout.packed_rows("stdlib", "heldout", tokenizer, 256))[::24])
        with torch.no_grad():
            losses.append(lm.cross_entropy(lm.log_probs(model(rows).logits), rows).mean(1).double())
    for small, large in zip(losses, losses[1:]):
        gap = small - large
        assert gap.mean() > 5 * gap.std() / len(gap) ** 0.5


def test_cards_say_what_was_measured():
    bits = []
    for name in demo.WIDTHS:
        card = (ROOT / "demo" / name / "README.md").read_text()
        mine, untrained, unigram = (
            float(re.search(pattern, card).group(1))
            for pattern in (r"\*\*([\d.]+)\*\* ±", r"untrained \| ([\d.]+)", r"frequencies \| ([\d.]+)")
        )
        assert mine < unigram < untrained and f"python demo/train.py {name}" in card
        bits.append(mine)
    assert bits == sorted(bits, reverse=True) and bits[-1] <= 1.4


def test_an_interrupted_training_run_ends_as_the_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BATCH", 2)
    monkeypatch.setattr(demo, "CTX", 32)
    monkeypatch.setattr(demo, "CHECKPOINT_EVERY", 3)
    stream = torch.randint(0, demo.VOCAB, (4000,), generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setattr(demo, "token_stream", lambda split: (stream, 12000))
    monkeypatch.setattr(demo, "HERE", tmp_path / "whole")
    whole = demo.train("stdlib-s", 8, "cpu").state_dict()
    monkeypatch.setattr(demo, "HERE", tmp_path / "broken")
    batch_at, seen = demo.batch_at, []

    def breaking(step, stream):
        seen.append(step)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return batch_at(step, stream)

    monkeypatch.setattr(demo, "batch_at", breaking)
    with pytest.raises(KeyboardInterrupt):
        demo.train("stdlib-s", 8, "cpu")
    broken = demo.train("stdlib-s", 8, "cpu").state_dict()
    assert seen == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_the_rate_ends_at_zero_and_shares_its_trunk():
    rates = [demo.learning_rate(step, 100) for step in range(100)]
    assert (
        rates[0] == pytest.approx(1 / demo.WARMUP)
        and rates[demo.WARMUP] == rates[59] == 1
        and rates[80] == pytest.approx(0.5)
    )
    assert 0 < rates[-1] < 0.03 and all(demo.learning_rate(step, 200) == rates[step] for step in range(60))


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_is_saved_in_it(tmp_path):
    """Its cells as a script print what is saved in the file, but for what another processor moves."""
    cells = json.loads((ROOT / "demo/audit.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    saved = "".join(
        "".join(output["text"]) for cell in cells for output in cell.get("outputs", []) if "text" in output
    )
    (tmp_path / "notebook.py").write_text("\n".join(code))
    environment = os.environ | {"MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, tmp_path / "notebook.py"], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "R² inverts (higher" in done.stdout and "R² is the sink's" in done.stdout
    pattern = r"^\| (r2|r2_nosink|ce_rec) +\| +(-?[\d.]+)"
    here, there = (re.findall(pattern, text, re.MULTILINE) for text in (done.stdout, saved))
    assert len(here) == 3 == len(there)
    for (name, value), (same, other) in zip(here, there):
        assert name == same and float(value) == pytest.approx(float(other), abs=0.03)
