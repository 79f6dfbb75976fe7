"""Real text: local files, and data sets streamed by the real client from a hub on the loopback that can be
told to fail.
"""

import gzip
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import types
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from unittest import mock

from helpers import ROOT, contents, small_grid, tiny_model
from hub import commit, serve
from transport_geometry.errors import UserError
from transport_geometry.records import store
from transport_geometry.running.grid import plan
from transport_geometry.saes import recipes, train
from transport_geometry.saes.sae import TrainingSpec
from transport_geometry.text import heldout, sources

import numpy as np
import pytest
import torch


class Letters:
    """A tokenizer of one letter each, 41 tokens in all."""

    eos_token_id = 0

    def __len__(self):
        return 41

    def __call__(self, text, add_special_tokens=False):
        return types.SimpleNamespace(input_ids=[ord(c) % 40 + 1 for c in text])


TEXTS = [f"{i} and {i % 7} make {i + i % 7}. " * (1 + i % 5) for i in range(300)]
TEXT_ROWS = [{"text": t} for t in TEXTS]
IDS = [[(i * j) % 41 for j in range(3 + i % 30)] for i in range(300)]
LONG = [[(i + j * j) % 41 for j in range(1000)] for i in range(300)]  # a file of several requests


def write(path: pathlib.Path, rows: list[dict]) -> str:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=40, compression="none", use_dictionary=False)
    else:
        new = pyarrow.ipc.new_stream if path.stem == "stream" else pyarrow.ipc.new_file
        with new(path, table.schema) as file:
            file.write_table(table, max_chunksize=40)
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    data = {
        "text.jsonl": TEXT_ROWS,
        "text.parquet": [{"id": i, "title": "x", "text": t} for i, t in enumerate(TEXTS)],
        "ids.parquet": [{"input_ids": ids} for ids in IDS],
    }
    for name, rows in data.items():
        stem, _, kind = name.partition(".")
        for i, (start, stop) in enumerate(((0, 110), (110, 147), (147, 300))):  # three shards
            write(folder / f"datasets/org/{stem}-{kind}/data/train-0000{i}-of-00003.{kind}", rows[start:stop])
        write(folder / f"datasets/org/{stem}-{kind}/data/test-00000-of-00001.{kind}", rows[:80])
    write(folder / "datasets/org/long/stream.arrow", [{"tokens": ids} for ids in LONG])
    write(folder / "datasets/org/pixels/train.parquet", [{"image": [1.5], "label": 3}] * 9)
    with serve(folder) as hub:
        environment = hub.environment(tmp_path_factory.mktemp("cache"))
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        multiprocessing.get_context("forkserver").set_forkserver_preload(["test_data", "datasets"])
        with mock.patch.dict(os.environ, environment, clear=True):
            forkserver.ensure_running()
        yield hub


@pytest.fixture
def hub(server):
    server.heal()
    server.requests.clear()
    return server


# ----------------------------------------------------------------------------- what runs in the other process
WAITED = []  # pauses between attempts


def hurry() -> None:
    """No pause is waited for; reads are small, so that a file takes many requests."""
    import datasets
    import huggingface_hub.hf_file_system
    import huggingface_hub.utils._http

    assert huggingface_hub.constants.ENDPOINT.startswith("http://127.0.0.1")  # never the true one
    huggingface_hub.utils._http.time = types.SimpleNamespace(sleep=lambda seconds: None)
    huggingface_hub.hf_file_system.HfFileSystemFile.DEFAULT_BLOCK_SIZE = 4096
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    sources.time = types.SimpleNamespace(sleep=WAITED.append)
    recipes.CHUNK = 1024


def elsewhere(function, *args):
    """function(*args) in a process whose clients know the test's hub: they read its address when they are
    imported.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), hurry) as pool:
        return pool.submit(function, *args).result(60)


def packed(data: str, side: str, ctx: int, split: str = "train") -> list[int]:
    return [i for row in heldout.packed_rows(data, side, Letters(), ctx, split=split) for i in row.tolist()]


def read(data: str) -> tuple[list, list, str | None]:
    """(documents, pauses, the error they end in)."""
    documents = []
    try:
        documents += (document for document in sources.documents(data) if documents.append(document))
    except UserError as error:
        return documents, WAITED, str(error)
    return documents, WAITED, None


def spec(data: str, tokens: int, **more) -> TrainingSpec:
    names = dict(model="tiny", weights="w", tokenizer="t", data=data, data_content="c", device="cpu")
    size = dict(dtype="float32", layer=1, ctx=16, tokens=tokens, trunk=(), d_sae=32, k=4, version=1)
    return TrainingSpec(**names, **size | dict(recipe="base", sinks="keep", split="train", seed=0) | more)


def trained(model, specs: list[TrainingSpec], cache: pathlib.Path) -> None:
    train.train_missing(model, Letters(), specs, cache, heldout.find(specs[0].data))


def trained_on(data: str, cache: pathlib.Path) -> None:
    specs = [spec(data, 16_000, split="test"), spec(data, 9000, seed=1, split="test")]
    trained(tiny_model(dtype=torch.float32), specs, cache)


# ------------------------------------------------------------------------------------------- what is streamed
def expected(rows: list, side: str, ctx: int) -> list[int]:
    mine = [row for row in rows if heldout.in_heldout(row) == (side == "heldout")]
    whole = [i for row in mine for i in ([*Letters()(row).input_ids, 0] if isinstance(row, str) else row)]
    return whole[: len(whole) // ctx * ctx]


@pytest.mark.parametrize("name", ["text-jsonl", "ids-parquet"])
def test_a_data_set_of_the_hub_gives_every_token_once_in_order(hub, name):
    rows = TEXTS if name.startswith("text") else IDS
    for side, ctx in (("train", 16), ("heldout", 7)):
        assert elsewhere(packed, f"org/{name}", side, ctx) == expected(rows, side, ctx)
    assert elsewhere(packed, f"org/{name}", "train", 16, "test") == expected(rows[:80], "train", 16)


@pytest.mark.parametrize("name", ["pages.parquet", "stream.arrow", "file.arrow", "pages.jsonl"])
def test_local_files_give_the_same(tmp_path, name):
    for rows, column in ((TEXTS, "text"), (IDS, "tokens"), (TEXTS, "body")):
        write(tmp_path / name, [{"number": 1, column: row} for row in rows])
        assert packed(str(tmp_path / name), "train", 16) == expected(rows, "train", 16)
        assert packed(str(tmp_path), "heldout", 16) == expected(rows, "heldout", 16)


def test_sides_share_no_document_however_often_it_is_repeated(tmp_path):
    data = write(tmp_path / "echo.jsonl", [{"text": TEXTS[i % 100 * (i % 3)]} for i in range(300)])
    seen, held = (list(heldout.documents(data, side)) for side in ("train", "heldout"))
    assert not set(seen) & set(held) and len(seen) + len(held) == 300 and 0 < len(held) < 100


# ------------------------------------------------------------------------------- what is drawn to be measured
def essays(n: int, words: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join("".join(rng.choices("etaoinshr", k=rng.randint(2, 6))) for _ in range(words))
        for _ in range(n)
    ]


def test_rows_are_drawn_across_the_held_out_side_a_few_of_each_document(tmp_path):
    texts = essays(400, 60)
    path = write(tmp_path / "t.jsonl", [{"text": t} for t in texts])

    def spelled(ids):
        return " ".join(map(str, ids))

    held = [spelled(Letters()(t).input_ids) for t in texts if heldout.in_heldout(t)]
    n = len(held)
    found = heldout.heldout_rows(path, Letters(), ctx=16, n=n)
    rows = [spelled(row) for row in found.input_ids[:, :15].tolist()]
    origins = [next(i for i, whole in enumerate(held) if row in whole) for row in rows]
    # one of each, not the first few documents
    assert sorted(origins) == list(range(n)) and len(set(found.document)) == n
    more = heldout.heldout_rows(path, Letters(), ctx=16, n=3 * n)
    assert (np.bincount(more.document) == 3).all()
    assert len(set(map(tuple, more.input_ids.tolist()))) == 3 * n
    other = heldout.heldout_rows(path, Letters(), ctx=16, n=n, seed=1)
    assert set(map(tuple, other.input_ids.tolist())) != set(map(tuple, found.input_ids.tolist()))
    with pytest.raises(UserError, match=f"gives {4 * n} sequences of 16 tokens, at most 4 of a document"):
        heldout.heldout_rows(path, Letters(), ctx=16, n=10**4)


def test_a_document_is_drawn_in_proportion_to_its_length(monkeypatch):
    """One is 9 times as long as the others: first of 20 in 9 / 28 of the draws, within 4 standard errors."""
    rng, first = random.Random(1), 0
    long, *short = essays(1, 900, 1) + essays(19, 100, 2)
    for seed in range(300):
        documents = [long, *short]
        rng.shuffle(documents)
        monkeypatch.setattr(heldout, "documents", lambda *args, documents=documents: iter(documents))
        first += heldout.drawn("stdlib", "train", seed, 1, 16)[0] == long
    share = len(long) / (len(long) + sum(map(len, short)))
    assert abs(first / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5


def test_short_documents_are_joined_and_count_as_one(tmp_path):
    write(tmp_path / "t.jsonl", [{"text": t} for t in essays(900, 2)])
    found = heldout.heldout_rows(str(tmp_path / "t.jsonl"), Letters(), ctx=32, n=10)
    # an end of text in each
    assert (found.document == np.arange(10)).all() and (found.input_ids == 0).any(1).all()


@pytest.mark.parametrize("name", ["one.txt", "one.jsonl", "ids.jsonl", "line.txt"])
def test_a_text_of_few_documents_is_cut_and_held_out_by_piece(tmp_path, name):
    path, whole = tmp_path / name, "\n".join(essays(600, 100))
    if name == "line.txt":
        whole = whole.replace("\n", " ")
    if path.suffix == ".txt":
        path.write_text(whole)
    elif name == "one.jsonl":
        write(path, [{"text": whole}])
    else:
        whole = Letters()(whole).input_ids
        write(path, [{"tokens": whole}])
    pieces = list(sources.documents(str(path)))
    joined = list(itertools.chain(*pieces)) if name == "ids.jsonl" else "".join(pieces)
    assert sources.is_cut(str(path)) and joined == whole and len(pieces) > 25
    assert path.suffix != ".txt" or all(8000 <= len(piece) <= 9000 for piece in pieces[:-1])
    assert name != "one.txt" or all(piece.endswith("\n") for piece in pieces[:-1])
    sides = [list(heldout.documents(str(path), side)) for side in ("train", "heldout")]
    assert len(sides[0]) > len(sides[1]) > 0 and len(sides[0]) + len(sides[1]) == len(pieces)
    found = heldout.heldout_rows(str(path), Letters(), ctx=64, n=2 * len(sides[1]))
    assert len(set(found.document)) == len(sides[1])


def test_near_duplicates_stand_on_one_side():
    """Every tenth word of ten in a hundred changed: seven in ten windows are left (Jaccard .5); sides differ
    in .18 x (1 - J), by hash .18.
    """
    rng, apart, by_hash, n = random.Random(3), 0, 0, 1500
    for one in essays(n, 100, 4):
        words = one.split()
        words[rng.randrange(100)] = "changed"  # J = (93 - 8) / (93 + 8) = .84 and more
        other = " ".join(words).replace(" ", "\n  ").upper()
        apart += heldout.in_heldout(one) != heldout.in_heldout(other)
        by_hash += heldout.one_in_ten(one) != heldout.one_in_ten(other)
    assert apart / n < 0.18 * 0.16 + 4 * (0.03 / n) ** 0.5 and by_hash / n > 0.12


def test_held_out_files_of_the_standard_library_are_a_tenth_and_not_in_the_training_text():
    train, held = (dict(heldout.stdlib_documents(split)) for split in ("train", "heldout"))
    assert not train.keys() & held.keys() and 0.05 < len(held) / (len(train) + len(held)) < 0.2
    assert "argparse.py" in train | held and "pydoc_data/topics/assert" in train | held
    assert not any("/test" in name or "idlelib" in name or "site-packages" in name for name in train | held)
    seen: set[int] = set()
    for document in train.values():
        seen.update(heldout.windows(document).tolist())
    for name, document in held.items():
        hashes = heldout.windows(document).tolist()
        assert sum(one in seen for one in hashes) <= heldout.MAX_OVERLAP * len(hashes), name
    moved = [name for name in train if heldout.one_in_ten(name)]
    # of every Python from 3.11 to 3.14
    assert {"cProfile.py", "encodings/gb2312.py", "encodings/gbk.py"} <= set(moved) and len(moved) < len(held)


def test_a_budget_beyond_the_text_says_that_it_repeats(tmp_path, capsys):
    write(tmp_path / "t.jsonl", TEXT_ROWS)
    specs = [spec(str(tmp_path / "t.jsonl"), tokens) for tokens in (1000, 20_000)]
    trained(tiny_model(dtype=torch.float32), specs, tmp_path / "cache")
    one_pass = len(expected(TEXTS, "train", 16))
    assert 1000 < one_pass < 20_000
    assert f"holds {one_pass:,} tokens; from here it repeats" in "".join(capsys.readouterr())
    within, beyond = (store.load(one.folder(tmp_path / "cache") / store.PROVENANCE) for one in specs)
    assert "one_pass" not in within and beyond["one_pass"] == one_pass


# ------------------------------------------------------------------------------------------------- what fails
ROWS = {"text-jsonl": TEXTS, "text-parquet": TEXTS, "ids-parquet": IDS, "long": LONG}


@pytest.mark.parametrize(
    "name, file, answered, fault",
    [
        ("text-jsonl", "00000-of", 1, dict(after=100)),
        ("text-jsonl", "00002-of", 0, dict(status=500)),
        ("text-parquet", "00002-of", 0, dict(status=504)),
        ("ids-parquet", "00001-of", 0, dict(after=100)),
        ("long", "stream", 3, dict(status=500)),
        ("long", "stream", 7, dict(after=100)),
    ],
)
def test_a_stream_goes_on_at_the_row_where_it_broke(hub, name, file, answered, fault):
    hub.fail(f"*{file}*", times=answered)
    hub.fail(f"*{file}*", times=13, **fault)  # two attempts and a request: huggingface_hub asks six times
    documents, waited, error = elsewhere(read, f"org/{name}")
    assert error is None and documents == ROWS[name] and waited == [1, 2]


@pytest.mark.parametrize(
    "name, file, answered, row", [("ids-parquet", "00001-of", 0, 110), ("long", "stream", 5, 120)]
)
def test_a_network_that_stays_away_is_one_line_with_the_row(hub, name, file, answered, row):
    hub.fail(f"*{file}*", times=answered)
    hub.fail(f"*{file}*", after=100)
    documents, waited, error = elsewhere(read, f"org/{name}")
    assert documents == ROWS[name][:row] and waited == list(sources.PAUSES)
    assert error.startswith(f"--data org/{name}: ") and "\n" not in error
    assert f"row {row}" in error and "closed connection" in error
    assert sum(file in path for path in hub.requests) <= answered + 40


def test_every_row_that_comes_makes_the_count_begin_anew_and_the_commit_is_asked_for_again(hub):
    for shard in ("00001-of", "00002-of"):
        hub.fail(f"*{shard}*", times=24, status=500)  # four attempts: the fifth is the last
    documents, waited, error = elsewhere(read, "org/text-jsonl")
    assert error is None and documents == TEXTS and waited == 2 * list(sources.PAUSES)
    hub.fail("*", times=14, status=500)
    assert elsewhere(heldout.find, "org/text-jsonl").name == "org/text-jsonl"


@pytest.mark.parametrize(
    "name, rule, words, attempts",
    [
        ("org/nothing", {}, "doesn't exist on the Hub", 1),
        ("org/text-jsonl", dict(pattern="*/train-*", status=401, code="GatedRepo"), "gated", 1),
        ("org/text-jsonl", dict(pattern="*/train-*", status=403), "403", 1),
        ("org/text-jsonl", dict(pattern="*", status=500), "500", 5),
        ("org/text-jsonl", dict(pattern="/api/*", status=503), "503", 5),
        ("org/pixels", {}, r"no column of text or tokens (columns: image, label)", 1),
    ],
)
def test_what_cannot_be_had_is_one_line_and_a_no_is_taken_at_once(hub, name, rule, words, attempts):
    if rule:
        hub.fail(**rule)
    documents, waited, error = elsewhere(read, name)
    assert not documents and len(waited) == attempts - 1
    assert error.startswith(f"--data {name}: ") and words in error and "\n" not in error and len(error) < 400


def test_a_hub_data_set_is_held_to_its_commit(hub):
    """What is streamed is what was resolved, whatever is pushed meanwhile; a revision can be asked for."""
    folder = hub.folder / "datasets/org/moving"
    write(folder / "train.jsonl", TEXT_ROWS[:40])
    write(folder.with_name("moving@v1") / "train.jsonl", TEXT_ROWS[50:60])
    first, old = (elsewhere(heldout.find, name) for name in ("org/moving", "org/moving@v1"))
    assert first == heldout.Source(f"org/moving@{commit(folder)}", "org/moving", commit(folder))
    assert old.content == commit(folder.with_name("moving@v1"))
    assert elsewhere(read, first.data)[0] == TEXTS[:40]
    assert elsewhere(read, old.data)[0] == elsewhere(read, "org/moving@v1")[0] == TEXTS[50:60]
    write(folder / "train.jsonl", TEXT_ROWS[5:45])
    second = elsewhere(heldout.find, "org/moving")
    assert second.content == commit(folder) != first.content
    assert elsewhere(read, second.data)[0] == TEXTS[5:45]
    with pytest.raises(UserError, match="--data org/moving@v2: "):
        elsewhere(heldout.find, "org/moving@v2")
    for name in ("@v1", f"{ROOT}@v1"):  # a local path would be known by its time stamps only
        with pytest.raises(UserError, match=f"--data {name}: only hub data sets have revisions"):
            heldout.find(name)


def test_a_local_text_is_known_by_what_is_in_it(tmp_path):
    write(tmp_path / "a/t.jsonl", TEXT_ROWS)
    write(tmp_path / "b/texts/t.jsonl", TEXT_ROWS)
    paths = [str(tmp_path / "a/t.jsonl"), str(tmp_path / "b/texts")]
    one, two = map(heldout.find, paths)
    assert (one.name, two.name, one.content == two.content) == ("t.jsonl", "texts", True)
    write(tmp_path / "b/texts/u.jsonl", [{"text": "more"}])
    (tmp_path / "a/t.jsonl").write_text((tmp_path / "a/t.jsonl").read_text().replace("0 and", "1 and", 1))
    assert len({one.content, *(heldout.find(path).content for path in paths)}) == 3
    assert heldout.find("stdlib") == heldout.find("stdlib") and heldout.find("stdlib").data == "stdlib"


def test_token_ids_of_another_model_are_refused(tmp_path):
    for worst in (41, -1):
        rows = [[0, 40]] * 9 + [[1, worst, 2, j] for j in range(40)]
        data = write(tmp_path / "ids.jsonl", [{"input_ids": row} for row in rows])
        with pytest.raises(UserError, match=rf"ids.jsonl: token ids .*{worst}.* 41.*another model") as caught:
            packed(data, "train", 4)
        assert "\n" not in str(caught.value)


def odd(row: str):
    """Of a file of 800 rows: this in the place of a hundred later ones."""

    def spoil(good: bytes) -> bytes:
        lines = good.splitlines()
        return b"\n".join([*lines[:499], *[row.encode()] * 100, *lines[599:]])

    return spoil


def rowless(good: bytes) -> bytes:
    import pyarrow.parquet

    empty = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(io.BytesIO(good)).slice(0, 0), empty)
    return empty.getvalue()


WHOLE = {
    "truncated": lambda good: good[: len(good) // 2],
    "garbage": lambda good: bytes(i * i % 251 + 1 for i in range(5000)),
    "holed": lambda good: good[:3000] + b"\xff" * 800 + good[3800:],
}
SPOILT = {f"{how}.{kind}": spoil for how, spoil in WHOLE.items() for kind in ("parquet", "arrow", "jsonl")}
SPOILT |= {
    "rowless.parquet": rowless,
    "invalid.jsonl": odd('{"text": broken}'),
    "list.jsonl": odd('{"text": [1, 2]}'),
    "number.jsonl": odd('{"text": 3}'),
    "object.jsonl": odd('{"text": {"a": 1}}'),
    "words.jsonl": odd('{"text": ["a", "b"]}'),
    "halves.jsonl": lambda good: b'{"tokens": [1, 2]}\n' * 499 + b'{"tokens": [1.5, 2.5]}\n' * 301,
    "brace.jsonl": lambda good: b"{",
}
# of no rows, with a word of the one line
OTHERS = {"empty.txt": (b"", "empty"), "binary.txt": (b"abc\0\1\2", "binary"), "x.pdf": (b"x", "needs files")}
OTHERS |= {"latin.txt": (b"\xff\xfe\xfa" * 9, "decode"), "folder": (None, "")}


@pytest.mark.parametrize("name", [*SPOILT, *OTHERS])
def test_a_damaged_file_is_one_line_and_nothing_beside_it(name, tmp_path, capfd):
    path, (content, word) = tmp_path / name, OTHERS.get(name, (None, ""))
    if name in SPOILT:
        write(path, [{"text": f"document {i}. " * 20} for i in range(800)])
        content = SPOILT[name](path.read_bytes())
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        heldout.heldout_rows(str(path), Letters(), ctx=64, n=10**6)
    line = str(caught.value)
    assert line.startswith(f"--data {path}: ") and "\n" not in line and len(line) < len(str(path)) + 300
    assert "BatchSize" not in line and word in line
    assert capfd.readouterr() == ("", "")


def test_only_hub_data_sets_have_splits(hub, tmp_path):
    write(tmp_path / "t.jsonl", TEXT_ROWS)
    for data in ("stdlib", str(tmp_path)):
        with pytest.raises(UserError, match="--split test"):
            next(heldout.documents(data, "train", "test"))
    with pytest.raises(UserError, match="dev.*train"):
        elsewhere(packed, "org/text-jsonl", "train", 16, "dev")


# ---------------------------------------------------------------------------- what is read, and what is not
CODE = [{"hexsha": f"{i:040x}", "content": t, "stars": i} for i, t in enumerate(TEXTS)]


def refused(data: str, **chosen: str) -> str:
    with pytest.raises(UserError) as caught:
        list(sources.documents(heldout.find(data, **chosen).data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def given(data: str, **chosen: str) -> list:
    return list(sources.whole_documents(heldout.find(data, **chosen).data))


def test_of_several_columns_of_strings_one_is_to_be_named(tmp_path):
    path = write(tmp_path / "code.jsonl", CODE)
    assert refused(path) == f"--data {path}: which column? --column hexsha or content"
    assert given(path, column="content") == TEXTS
    assert "no such column" in refused(path, column="body")
    ids = write(tmp_path / "ids.jsonl", [{"input_ids": [1, 2], "text": t} for t in TEXTS])
    assert refused(ids).endswith("--column input_ids or text")
    assert "neither text, token ids nor chats" in refused(path, column="stars")
    assert heldout.find(path, column="content").content != heldout.find(path, column="hexsha").content
    (tmp_path / "t.txt").write_text("text " * 9000)
    assert "no columns" in refused(str(tmp_path / "t.txt"), column="text")
    with pytest.raises(UserError, match="stdlib has no columns"):
        heldout.find("stdlib", column="text")


def test_the_only_column_of_strings_is_read_and_named(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", [{"stars": 1, "body": t} for t in TEXTS])
    assert given(path) == TEXTS and sources.columns_read(path) == "body"
    assert f"--data {path}: column body is read, not stars\n" in capsys.readouterr().out
    write(tmp_path / "t.jsonl", [{"text": t, "source": "web"} for t in TEXTS])
    assert given(path) == TEXTS and sources.columns_read(path) == "text"
    assert "column text is read, not source" in capsys.readouterr().out
    assert sources.columns_read("stdlib") is None
    write(tmp_path / "t.jsonl", [{"tokens": t.split(), "sentence": t} for t in TEXTS])  # words are no ids
    assert given(path) == TEXTS


def test_rows_without_text_are_passed_over_and_counted(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", [{"text": t if i % 3 else None} for i, t in enumerate(TEXTS)])
    assert given(path) == [t for i, t in enumerate(TEXTS) if i % 3]
    assert f"--data {path}: 100 of 300 rows have no text and are not read\n" in capsys.readouterr().out
    late = [{"id": "x", "body": t if i > 9 else None} for i, t in enumerate(TEXTS)]
    assert refused(write(tmp_path / "t.jsonl", late)).endswith("--column id or body")


class Talker(Letters):
    """Letters with a template, that begins with the token it begins texts with."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        ids = [39 if c == "^" else ord(c) % 38 + 1 for c in text]
        return types.SimpleNamespace(input_ids=([39] if add_special_tokens else []) + ids)

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if messages[0]["role"] != "user":
            raise ValueError("roles must\nalternate")
        return "^" + "".join(f"<{one['role']}>{one['content']}" for one in messages)


def chat(text: str, first: str = "user") -> list[dict]:
    return [{"role": first, "content": text}, {"role": "assistant", "content": text[::-1]}]


def test_chats_go_through_the_template(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": t, "prompt_id": "x", "messages": chat(t)} for t in TEXTS])
    documents = list(heldout.documents(path, "train"))
    assert documents == [c for c in map(json.dumps, map(chat, TEXTS)) if c in documents]
    assert 0 < len(list(heldout.documents(path, "heldout"))) < 60 and len(documents) > 240
    told = Talker()("".join(f"<{one['role']}>{one['content']}" for one in json.loads(documents[0])), False)
    assert heldout.as_ids(documents[0], Talker(), path) == told.input_ids  # no BOS: rows get theirs
    held = heldout.heldout_rows(path, Talker(), ctx=16, n=9, bos=39)
    assert (held.input_ids[:, 0] == 39).all() and (held.input_ids[:, 1:] != 39).all()
    with pytest.raises(UserError, match="rows are chats, and the tokenizer has no chat template") as caught:
        heldout.heldout_rows(path, Letters(), ctx=16, n=9)
    assert "\n" not in str(caught.value)
    write(tmp_path / "t.jsonl", [{"messages": chat(t, "system")} for t in TEXTS])
    with pytest.raises(UserError, match="chat template: roles must alternate"):
        heldout.heldout_rows(path, Talker(), ctx=16, n=9)
    write(tmp_path / "t.jsonl", [{"messages": chat(t)} for t in TEXTS[:9]])
    assert not sources.is_cut(path) and all(isinstance(one, sources.Chat) for one in sources.documents(path))


def test_padding_is_no_text(tmp_path):
    path = str(tmp_path / "t.jsonl")
    left = [[0] * (32 - len(ids)) for ids in IDS]
    padded = [{"input_ids": z + ids, "attention_mask": z + [1] * len(ids)} for z, ids in zip(left, IDS)]
    write(tmp_path / "t.jsonl", padded)
    assert given(path) == IDS
    for mask in ([1, 1], None, [0.5] * 32, [2] * 32):
        write(tmp_path / "t.jsonl", [*padded[:2], padded[2] | {"attention_mask": mask}])
        assert "attention_mask" in refused(path)


def test_runs_of_one_id_put_no_documents_on_one_side():
    rng = random.Random(0)
    ids = [[rng.randrange(1, 40) for _ in range(20)] for _ in range(1000)]
    for padding in (0, 7):
        assert 70 < sum(heldout.in_heldout([padding] * 12 + one + [padding] * 12) for one in ids) < 130
    assert len(heldout.windows([0] * 30)) and (heldout.windows(ids[0]) != 0).all()


def saved(folder: pathlib.Path):
    """A folder of 130 documents, filtered and mapped where it lies."""
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS[:130]}).save_to_disk(folder)
    there = datasets.load_from_disk(folder)
    there.map(lambda row: {"text": row["text"].upper()})
    there.filter(lambda row: "3" in row["text"])
    assert len(list(folder.glob("cache-*.arrow"))) == 2


def test_a_saved_folder_holds_what_was_saved_whatever_was_computed_there(tmp_path, capsys):
    saved(tmp_path / "all/saved")
    for data in (tmp_path / "all/saved", tmp_path / "all"):
        assert given(str(data)) == TEXTS[:130]
        assert "2 files are not read: " in capsys.readouterr().out
    before = heldout.find(str(tmp_path / "all"))
    for path in (tmp_path / "all/saved").glob("cache-*"):
        path.unlink()
    assert heldout.find(str(tmp_path / "all")).content == before.content


def test_what_map_left_is_no_data_without_the_saved_folders_list_either(tmp_path, capsys):
    write(tmp_path / "name-train.arrow", TEXT_ROWS)
    write(tmp_path / "cache-0123.arrow", [{"text": t.upper()} for t in TEXTS])
    (tmp_path / "dataset_info.json").write_text('{"description": "", "license": ""}')
    assert given(str(tmp_path)) == TEXTS
    assert "2 files are not read: cache-0123.arrow, dataset_info.json" in capsys.readouterr().out
    assert len(given(str(tmp_path / "cache-0123.arrow"))) == len(TEXTS)


def test_indices_that_are_not_obeyed_are_refused(tmp_path):
    saved(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    state |= {"_indices_data_files": [{"filename": "i.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert "saved with indices" in refused(str(tmp_path))
    (tmp_path / "state.json").write_text("{")
    assert refused(str(tmp_path)).startswith(f"--data {tmp_path}: ")


def test_of_saved_splits_one_is_read(tmp_path, capsys):
    import datasets

    parts = {"train": TEXTS[:200], "test": TEXTS[200:]}
    both = {name: datasets.Dataset.from_dict({"text": t}) for name, t in parts.items()}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    for split, texts in parts.items():
        assert packed(path, "train", 16, split) == expected(texts, "train", 16)
    assert f"--data {path}: split train is read, not test\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--split dev: {path} has train, test"):
        packed(path, "train", 16, "dev")


def zst(content: bytes) -> bytes:
    """In two frames, as pzstd writes it."""
    import pyarrow

    half = len(content) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))


@pytest.mark.parametrize("kind, pack", [("gz", gzip.compress), ("zst", zst)])
def test_packed_files_are_read_beside_others(tmp_path, kind, pack):
    write(tmp_path / "a.jsonl", TEXT_ROWS[:150])
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[150:])
    (tmp_path / f"b.jsonl.{kind}").write_bytes(pack(lines.encode()))
    assert given(str(tmp_path)) == TEXTS
    (tmp_path / f"one.txt.{kind}").write_bytes(pack(("ä line of text\n" * 9000).encode()))
    assert "".join(given(str(tmp_path / f"one.txt.{kind}"))) == "ä line of text\n" * 9000
    (tmp_path / f"b.jsonl.{kind}").write_bytes(pack(lines.encode())[:-900])
    assert refused(str(tmp_path)).startswith(f"--data {tmp_path}: ")
    (tmp_path / f"b.jsonl.{kind}").write_bytes(pack(b""))
    assert refused(str(tmp_path)).endswith(f"b.jsonl.{kind}: the file is empty")


def test_links_are_followed_once(tmp_path):
    write(tmp_path / "far/a.jsonl", TEXT_ROWS[:150])
    write(tmp_path / "blobs/b.jsonl", TEXT_ROWS[150:])
    (tmp_path / "blobs/b.jsonl").rename(tmp_path / "blobs/1234")
    here = tmp_path / "here"
    here.mkdir()
    (here / "1").symlink_to(tmp_path / "far")
    (here / "2.jsonl").symlink_to(tmp_path / "blobs/1234")
    (here / "3").symlink_to(here)
    (here / "4").symlink_to(tmp_path / "far")
    (here / "5.jsonl").symlink_to(here / "5.jsonl")
    (here / "0").symlink_to(tmp_path / "blobs/1234")  # no name of a format: not read, and hides nothing
    assert given(str(here)) == TEXTS
    (tmp_path / "all").symlink_to(here)
    assert given(str(tmp_path / "all")) == TEXTS


def test_files_of_several_kinds_are_all_read(tmp_path, capsys):
    write(tmp_path / "b.jsonl", TEXT_ROWS[:100])
    write(tmp_path / "c.parquet", [{"body": t} for t in TEXTS[100:200]])
    for i, t in enumerate(TEXTS[200:]):
        (tmp_path / f"a{i:03}.txt").write_text(t)
    assert sorted(given(str(tmp_path))) == sorted(TEXTS)
    counted = "100 of text, 1 of json, 1 of parquet"
    assert f": files of several kinds are read: {counted}\n" in capsys.readouterr().out
    assert not sources.is_cut(str(tmp_path))
    assert sources.columns_read(str(tmp_path)) == "body, text"
    write(tmp_path / "d.arrow", [{"tokens": ids} for ids in IDS])
    assert "token ids in some of its files, text in others" in refused(str(tmp_path))


def found(data: str, config: str | None):
    source = heldout.find(data, config=config)
    return source, list(sources.documents(source.data))


def test_a_configuration_of_a_hub_data_set_is_chosen(hub, tmp_path):
    folder = hub.folder / "datasets/org/several"
    for name, rows in (("en", TEXTS[:40]), ("de", TEXTS[40:90])):
        write(folder / f"{name}/train.jsonl", [{"text": t} for t in rows])
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    one, two = (elsewhere(found, "org/several", name) for name in ("en", "de"))
    assert (one[1], two[1]) == (TEXTS[:40], TEXTS[40:90]) and one[0].content != two[0].content
    for name, words in ((None, "--config"), ("fr", "fr")):
        with pytest.raises(UserError, match=words) as caught:
            elsewhere(found, "org/several", name)
        assert "en" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="only hub data sets have configurations"):
        heldout.find(str(tmp_path), config="en")


def planned(**more) -> dict:
    return plan(small_grid(eval_seqs=8, ctx=16, **more), torch.device("cpu"), "test")[0]


def test_the_column_is_a_setting(tmp_path):
    rows = [row | {"content": f"def f{i}(): return {i}\n" * 20} for i, row in enumerate(CODE)]
    path = write(tmp_path / "code.jsonl", rows)
    settings = planned(data=path, column="content")
    assert settings["column"] == "content" and settings["data_content"].endswith(" --column content")
    assert {"column", "config"}.isdisjoint(planned())


def test_text_on_which_the_model_is_worse_than_guessing_is_said(tmp_path, capsys):
    rng = random.Random(0)
    write(tmp_path / "t.jsonl", [{"tokens": [rng.randrange(1000) for _ in range(40)]} for _ in range(300)])
    assert planned(data=str(tmp_path / "t.jsonl"))["column"] == "tokens"
    said = capsys.readouterr().out
    assert said.startswith(f"--data {tmp_path}/t.jsonl: stdlib-s predicts it worse than guessing would (CE ")
    planned()
    assert not capsys.readouterr().out


# -------------------------------------------------------------------------------------- what is trained on it
def kept(folder: pathlib.Path) -> list[int]:
    """The chunks that each checkpoint has."""
    return sorted(torch.load(path)["chunks"] for path in folder.rglob("checkpoint.pt"))


@pytest.mark.slow
def test_a_training_run_that_lost_the_network_ends_as_the_unbroken_one(hub, tmp_path):
    for i in range(3):
        write(
            hub.folder / f"datasets/org/runs/data/test-0000{i}-of-00003.jsonl",
            TEXT_ROWS[60 * i : 60 * i + 60],
        )
    elsewhere(trained_on, "org/runs", tmp_path / "whole")
    for answered, chunks in ((0, [4, 4]), (1, [12])):  # the third shard is lost on the first pass, the second
        hub.heal()
        hub.fail("*test-00002-of*", times=answered)
        hub.fail("*test-00002-of*", after=50)
        with pytest.raises(UserError, match="--data org/runs@.*row 120"):
            elsewhere(trained_on, "org/runs", tmp_path / "broken")
        assert kept(tmp_path / "broken") == chunks
    hub.heal()
    elsewhere(trained_on, "org/runs", tmp_path / "broken")
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")
    assert len(contents(tmp_path / "whole")) == 6


def test_an_interrupt_keeps_every_run_at_its_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "CHUNK", 1024)
    write(tmp_path / "t.jsonl", TEXT_ROWS)
    model = tiny_model(dtype=torch.float32)
    specs = [spec(str(tmp_path / "t.jsonl"), 9000, seed=seed) for seed in (0, 1)]
    trained(model, specs, tmp_path / "whole")
    batches = itertools.count(1)

    def interrupt(*_):
        if next(batches) == 3:
            raise KeyboardInterrupt

    first = model.gpt_neox.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(model, specs, tmp_path / "broken")
    first.remove()
    assert kept(tmp_path / "broken") == [8, 8]
    trained(model, specs, tmp_path / "broken")
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")
    assert len(contents(tmp_path / "whole")) == 6


def test_another_way_of_reading_is_another_text_to_train_on(tmp_path, monkeypatch):
    """The cache would serve an SAE of documents that are no longer read so. The standard library's stay."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} of some words"}) + "\n" for i in range(120)))
    stdlib, before = heldout.find("stdlib"), heldout.find(str(path))
    monkeypatch.setattr(heldout, "READING_VERSION", heldout.READING_VERSION + 1)
    after = heldout.find(str(path))
    assert after.content == before.content and stdlib.for_training == stdlib.content
    assert after.for_training == f"{before.content} read {heldout.READING_VERSION}" != before.content
