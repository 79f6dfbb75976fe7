"""Rows of tokens: what is held out, how documents become rows, and text that cannot be used."""

import itertools
import json
import types

from transport_geometry.errors import UserError
from transport_geometry.models import text

import pytest
import torch


# ------------------------------------------------------------------------------------------------------- text
def test_held_out_files_are_disjoint_and_a_tenth():
    train, held = (dict(text.stdlib_documents(split)) for split in ("train", "heldout"))
    assert not train.keys() & held.keys()
    assert 0.05 < len(held) / (len(train) + len(held)) < 0.2
    assert "argparse.py" in train | held and "pydoc_data/topics/assert" in train | held
    assert not any("/test" in name or "idlelib" in name or "site-packages" in name for name in train | held)


class Letters:
    """A tokenizer of one letter each."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return types.SimpleNamespace(input_ids=[ord(c) % 40 + 1 for c in text])


def test_rows_are_documents_joined_by_the_end_mark(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"document number {i} " * 3 for i in range(60)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    rows = {
        split: torch.cat(list(text.packed_rows(str(path), split, Letters(), 10)))
        for split in ("train", "heldout")
    }
    for split, stream in rows.items():
        mine = [t for t in texts if text.in_heldout(t) == (split == "heldout")]
        whole = list(itertools.chain.from_iterable([ord(c) % 40 + 1 for c in t] + [0] for t in mine))
        assert stream.tolist() == whole[: len(whole) // 10 * 10]
    assert len(rows["heldout"]) > 0


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("e.txt", b"", "empty"),
        ("b.txt", b"abc\0\1\2", "binary"),
        ("s.txt", b"short", "gives 0 sequences"),
        ("x.pdf", b"x", "needs files"),
        ("l.txt", b"\xff\xfe\xfa" * 9, "decode"),
        ("j.jsonl", b"{", "--data"),
    ],
)
def test_bad_data_gets_one_line(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        text.heldout_rows(str(tmp_path / name), Letters(), 10, 2)
    assert "\n" not in str(caught.value)
