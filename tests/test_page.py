"""report.html: well formed and escaped, the same bytes from the same rows, and, where there is a Chromium,
opened from the disk: nothing is asked of a network, no error, and tables sort.
"""

import base64
import hashlib
import html
import html.parser
import json
import os
import re
import shutil
import subprocess

from helpers import ROOT
from transport_geometry.records.tables import markdown
from transport_geometry.reporting import figures, glossary, page

import numpy as np
import pytest

VOID = {"meta", "img", "br", "hr", "link", "input", "base", "col", "embed", "source"}
EVIL = "<script>evil()</script> & \"a\" 'b' <b>"  # what an SAE or a model may be called


class Document(html.parser.HTMLParser):
    """elements [(tag, attributes)] in order, text {tag: [what directly stands in it]}. Raises AssertionError
    for what is not closed, or closed that is not open.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice: {tag} {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):  # in SVG
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]][-1] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


ROWS = [
    dict(
        model=model,
        layer=3,
        sae="topk-x4",
        k=k,
        seed=0,
        tokens=100_000,
        r2=1 - (1 + i / 9) / k,
        ce_rec=0.9 - i / k,
    )
    for i, model in enumerate(("s", "l"))
    for k in (4, 8, 16)
]


def a_figure(rows=ROWS, x="r2"):
    figure, axis = figures.pyplot().subplots(figsize=(4, 3))
    models = list(dict.fromkeys(row["model"] for row in rows))
    values = [np.array([row[name] for row in rows], float) for name in (x, "ce_rec")]
    figures.points_by_model(axis, rows, *values, models)
    return figure


def svg(rows=ROWS) -> str:
    figure = a_figure(rows)
    text = figures.as_svg(figure, "box.png")
    figures.close(figure)
    return text


REPORT = """\
# Is it?

**It is not.**

![SAEs](box.png)

## Table

{table}

## More

A [part](part/report.md), `code`.

    python expa.py --k 1 < 2

## Rest

- one
"""
TABLE = [
    {"name": "b", "value": 0.5, "interval": "+0.10 [+0.05, +0.15]", "budget": "300k", "k*": "> 32"},
    {"name": "a10", "value": None, "interval": "-0.20 [-0.30, -0.10]", "budget": "1M", "k*": "9.8"},
    {"name": "a9", "value": 1e-7, "interval": "undefined", "budget": "2k", "k*": "10"},
    {"name": "c", "value": 12, "interval": "+1.00 [undefined]", "budget": "10", "k*": "2"},
]


def a_page(report: str | None = None, rows=ROWS, folder=None) -> str:
    report = REPORT.format(table=markdown(TABLE)) if report is None else report
    return page.page(report, {"box.png": svg(rows)}, folder).decode()


# ------------------------------------------------------------------------------------------------- the file
def test_the_page_is_well_formed_and_holds_all_of_the_report():
    document = Document(a_page())
    assert document.attributes("html") == [{"lang": "en"}] and document.text["title"][0] == "Is it?"
    assert document.text["h1"] == ["Is it?"] and document.text["strong"] == ["It is not."]
    assert document.text["h2"] == ["Table", "More", "Rest"]
    assert document.text["th"] == list(TABLE[0]) and len(document.text["td"]) == 5 * 4
    assert document.text["code"][-2:] == ["code", "python expa.py --k 1 < 2\n"]
    assert all(head == {"scope": "col"} for head in document.attributes("th"))
    (drawing,) = document.attributes("svg")
    assert (
        drawing["aria-label"] == "SAEs" and drawing["class"] == "figure" and "SAEs" not in document.text["p"]
    )
    ids = [a["id"] for tag, a in document.elements if tag == "h2"]
    assert [a["href"] for a in document.attributes("a")][:3] == [f"#{name}" for name in ids]
    boxes = [a for a in document.attributes("div") if a.get("class") == "scroll"]
    assert boxes == [{"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Table: Table"}]


def test_sentences_in_a_table_wrap_and_numbers_do_not():
    rows = [{"says": "a sentence that is too long for one line", "r2": "+0.10 [+0.05, +0.15]"}]
    cells = Document(a_page(f"# a\n\n{markdown(rows)}\n")).attributes("td")
    assert cells == [{"class": "prose"}, {}]


def test_the_same_rows_give_the_same_bytes_and_others_others():
    assert a_page() == a_page()
    assert a_page(rows=ROWS[:4]) != a_page(rows=ROWS[:5])


def test_names_are_text_wherever_they_stand():
    rows = [row | {"model": EVIL, "sae": EVIL} for row in ROWS[:2]]
    named = [{"sae": EVIL, "r2": 0.5}]
    report = (
        f"# {EVIL}\n\n**{EVIL}**\n\n![{EVIL}](box.png)\n\n## {EVIL}\n\n{markdown(named)}\n\n## a\n\n## b\n"
    )
    document = Document(a_page(report, rows))
    assert [tag for tag, _ in document.elements].count("script") == 1  # ours
    assert "b" not in document.text and document.text["title"][0] == EVIL
    assert document.text["h1"] == document.text["h2"][:1] == document.text["strong"] == [EVIL]
    assert document.text["td"][0] == EVIL and document.attributes("svg")[0]["aria-label"] == EVIL
    assert sum(EVIL in title for title in document.text["title"][1:]) == 2
    assert not [a for _, a in document.elements if any(name.startswith("on") for name in a)]


def test_nothing_is_fetched_and_nothing_but_our_script_may_run():
    report = (
        "# a\n\n![x](http://evil.example/x.png) ![y](//evil.example/y.png) ![z](../z.png) "
        "![w](data:image/png;a)\n\n[j](javascript:evil()) <http://evil.example/> <img src=http://evil.example/q.png>\n"
    )
    text = a_page(report)
    document = Document(text)
    assert not document.attributes("img")
    for tag, attributes in document.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "image", "style src")
        assert not {"srcset", "action", "data", "poster", "background"} & attributes.keys()
        assert attributes.get("xlink:href", "#").startswith("#")
        assert "src" not in attributes
        assert not attributes.get("href", "").startswith(("javascript", "data"))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", text.split("<body>")[0])
    (policy,) = [a["content"] for a in document.attributes("meta") if "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(document.text["script"][0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; style-src") and f"'sha256-{digest}'" in policy


def test_every_mark_lies_where_its_numbers_are_and_says_whose_they_are():
    marks = re.findall(r'<use [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*><title>([^<]*)', svg())
    assert len(marks) == len(ROWS)
    found = {says: (float(x), float(y)) for x, y, says in marks}
    names = [f"{figures.sae_name(row)}: {row['r2']:.4g}, {row['ce_rec']:.4g}" for row in ROWS]
    assert names[0] == "s@3 topk-x4, k 4, 100,000 tokens, seed 0: 0.75, 0.9" and set(names) == found.keys()
    for of, at, sign in (("r2", 0, 1), ("ce_rec", 1, -1)):  # y grows downwards
        values, places = (
            np.array(v) for v in ([row[of] for row in ROWS], [found[name][at] for name in names])
        )
        slope, offset = np.polyfit(values, places, 1)
        assert slope * sign > 0 and abs(slope * values + offset - places).max() < 0.02
    assert svg([*ROWS, ROWS[0] | {"r2": np.nan}]).count("<title>") == len(ROWS)  # it has no place


def test_an_sae_trained_without_sinks_has_another_mark():
    """One shape, defined once, for each look: colour, size and arm."""
    shapes = [text.count("<path id=") for text in (svg(), svg([*ROWS, ROWS[0] | {"sae": "topk-x4-nosinks"}]))]
    assert shapes[1] == shapes[0] + 1


def test_scores_are_drawn_along_depth():
    """Of the middle k and the most tokens, seeds averaged, the arms of --sinks side by side."""
    rows = [
        ROWS[0] | {"layer": layer, "k": k, "seed": seed, "sae": sae, "tokens": tokens, "r2_nosink": 0.5}
        | {"r2": layer + seed / 10 + (k + len(sae)) * 100 + tokens, "recipe": "base"}
        for layer in (7, 2, 5) for k in (4, 8, 16) for seed in (0, 1)
        for sae in ("topk-x4", "topk-x4-nosinks") for tokens in (1000, 2000)
    ]  # fmt: skip
    figure = figures.along_depth(rows, ["s"])
    for axis, sae in zip(figure.axes, ("topk-x4", "topk-x4-nosinks"), strict=True):
        arm = "without sinks" if "nosinks" in sae else "on every position"
        assert axis.get_title() == f"s, base, k 8, trained {arm}"
        x, y = axis.lines[0].get_data()
        assert list(x) == [2, 5, 7] and np.allclose(y, x + 0.05 + (8 + len(sae)) * 100 + 2000)
        assert {tuple(line.get_ydata()) for line in axis.lines[1:]} == {(0.5,) * 3, (ROWS[0]["ce_rec"],) * 3}
    figures.close(figure)


def test_no_digit_of_a_figures_text_is_lost():
    figure, axis = figures.pyplot().subplots()
    axis.set_title("CE_rec -0.09876")
    assert ">CE_rec -0.09876<" in figures.as_svg(figure, "f.png")
    figures.close(figure)


def test_a_figure_is_drawn_once_and_a_page_gives_it_its_inks():
    files = page.with_page(ROOT, {"report.md": b"# a\n\n![SAEs](f.png)\n"}, {"f.png": a_figure()})
    assert files["f.png"].startswith(b"\x89PNG") and b'<svg class="figure"' in files["report.html"]
    drawing = re.search(r"<svg.*</svg>", files["report.html"].decode(), re.S)[0]
    assert "var(--paper)" in drawing and "#000000" not in drawing and "#ffffff" not in drawing


def test_a_link_to_a_report_leads_to_its_page_where_there_is_one(tmp_path):
    assert 'href="part/report.md"' in a_page(folder=tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "part/report.html").write_text("")
    assert 'href="part/report.html"' in a_page(folder=tmp_path)
    assert 'href="part/report.md"' in a_page("# a\n\n[report.md](part/report.md)\n", folder=tmp_path)


def test_a_report_without_sections_or_figures_is_a_page():
    document = Document(page.page("A line.\n", {}).decode())
    assert document.text["title"] == ["Report"] and document.text["p"] == ["A line."]


@pytest.mark.parametrize("path", sorted((ROOT / "outputs/reference").rglob(page.PAGE)), ids=str)
def test_the_pages_of_the_reference_runs(path):
    text = path.read_text(encoding="utf-8")
    document, report = Document(text), path.with_name(page.REPORT).read_text(encoding="utf-8")
    assert len(text) < 2**20 and document.text["title"][0] == report.splitlines()[0].removeprefix("# ")
    assert len(document.text.get("table", [])) == len(re.findall(r"^\|--", report, re.M))
    assert len(document.attributes("svg")) == report.count("![")
    assert all(a["aria-label"] for a in document.attributes("svg"))


# ---------------------------------------------------------------------------------------------- in a browser
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
in_chromium = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium on the path ({', '.join(NAMES)})"),
]


def opened(path, tmp_path) -> tuple[str, list[str]]:
    """(the document after its scripts ran, what the console said) of a file in headless Chromium."""
    quiet = "--disable-background-networking --disable-component-update --disable-sync --no-first-run".split()
    quiet += ["--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]  # no network for what it asks itself
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        quiet.append("--no-sandbox")
    how = ["--headless", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *quiet, *how, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def tried(text: str, script: str) -> str:
    """The page with a second script, which its policy must then allow; what `say(...)` says is in #said."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", text)
    own = "const said = []; const say = (...what) => said.push(what);"
    end = "const p = document.createElement('pre'); p.id = 'said'; p.textContent = JSON.stringify(said);"
    return text.replace(
        "</body>", f"<script>{{{own}\n{script}\n{end} document.body.append(p)}}</script></body>"
    )


def said(dom: str) -> list:
    return json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', dom, re.S)[1]))


class TestInChromium:
    pytestmark = in_chromium

    def test_it_opens_from_the_disk_without_an_error(self, tmp_path):
        report = "# a\n\n**It is <i> not.**\n\n![SAEs](box.png)\n\n## Table\n\n" + markdown(TABLE)
        path = tmp_path / "report.html"
        path.write_text(a_page(report, [*ROWS, ROWS[0] | {"model": EVIL}]), encoding="utf-8")
        dom, console = opened(path, tmp_path)
        assert not console
        document = Document(dom)
        assert document.text["strong"] == ["It is <i> not."] and len(document.text["td"]) == 5 * 4
        assert document.text["button"] == list(TABLE[0])
        assert sum(title.startswith(EVIL) for title in document.text["title"]) == 1

    def test_its_policy_stops_what_would_ask_a_network(self, tmp_path):
        """And so the console, which the test above reads, is seen to speak."""
        path = tmp_path / "report.html"
        ask = '<img src="http://127.0.0.1:9/x.png"><script>evil()</script></body>'
        path.write_text(a_page().replace("</body>", ask), encoding="utf-8")
        _, console = opened(path, tmp_path)
        refused = [line for line in console if "Content Security Policy" in line]
        assert len(refused) == 2 and not [line for line in console if "evil is not defined" in line]

    def test_tables_sort(self, tmp_path):
        path = tmp_path / "report.html"
        script = """
          const table = document.querySelector("table"), heads = [...table.querySelectorAll("th button")];
          const order = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent).join(" ");
          for (const head of heads) { head.click(); say(order()); head.click(); say(order()); }
          say([...table.querySelectorAll("[aria-sort]")].map(h => h.textContent + h.ariaSort));
          say(performance.getEntriesByType("resource").map(entry => entry.name));
        """
        path.write_text(tried(a_page(), script), encoding="utf-8")
        dom, console = opened(path, tmp_path)
        assert not console
        *orders, (sorted_by,), fetched = said(dom)
        assert [order for (order,) in orders] == [
            "a9 a10 b c",  # text, numbers in it as numbers
            "c b a10 a9",
            "a9 b c a10",  # 1e-07, 0.5, 12, and what is missing last
            "c b a9 a10",
            "a10 b c a9",  # intervals by their value
            "c b a10 a9",
            "c a9 b a10",  # 10, 2k, 300k, 1M
            "a10 b a9 c",
            "c a10 a9 b",  # 2, 9.8, 10, > 32
            "b a9 a10 c",
        ]
        assert sorted_by == ["k*descending"]
        assert fetched == [[]]

    def test_on_a_phone_only_boxes_scroll(self, tmp_path):
        """In a frame as wide as a phone, for a window of Chromium is not so narrow."""
        wide = [{f"a long column {i}": "+0.10 [+0.05, +0.15]" for i in range(20)}]
        report = f"# a\n\n## {'long' * 30}\n\n{markdown(wide)}\n\n    {'x' * 300}\n\n![SAEs](box.png)\n"
        inner, outer = tmp_path / "report.html", tmp_path / "frame.html"
        inner.write_text(a_page(report), encoding="utf-8")
        sizes = (
            "parent.postMessage([root.scrollWidth, root.clientWidth, box.scrollWidth, box.clientWidth], '*')"
        )
        script = f"const root = document.documentElement, box = document.querySelector('.scroll'); {sizes};"
        inner.write_text(tried(a_page(report), script), encoding="utf-8")
        outer.write_text(
            "<!DOCTYPE html><pre id=said></pre><script>onmessage = event => "
            "document.getElementById('said').textContent = JSON.stringify(event.data)</script>"
            f"<iframe src='{inner.as_uri()}' style='width:390px;height:800px;border:0'></iframe>"
        )
        dom, console = opened(outer, tmp_path)
        (page_needs, page_has, box_needs, box_has) = said(dom)
        assert not console and page_needs == page_has and page_has <= 390 and box_needs > 2 * box_has


def test_every_column_of_the_reports_people_read_first_has_a_meaning():
    """Of Exp-B's: as a tooltip of the page, and in the report's last section."""
    folder = ROOT / "outputs/reference/expb"
    report = glossary.with_glossary((folder / "report.md").read_text().partition("## Glossary")[0])
    assert set(glossary.columns(report)) - glossary.TERMS.keys() <= {
        "proxy",
        "model",
        "sae",
        "seed",
        "hook",
    } | {
        *"position dCE text next".split(),
        *(name for name in glossary.columns(report) if re.fullmatch(r"\d+( to \d+)?", name)),
    }
    said = page.page(report, {}).decode()
    meaning = html.escape(glossary.TERMS["kl_excess"])
    assert f'<th scope="col" title="{meaning}">kl_excess</th>' in said
    assert f"`kl_excess`: {glossary.TERMS['kl_excess']}" in report.partition("## Glossary")[2]
