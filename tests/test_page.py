"""report.html: well formed and escaped, the same bytes from the same rows, and, where there is a Chromium,
opened from the disk: nothing is asked of a network, no error, and tables and charts do what they say.
"""

import base64
import hashlib
import html
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess

from helpers import ROOT
from transport_geometry.measuring.metrics import BY_NAME
from transport_geometry.records.tables import markdown
from transport_geometry.reporting import chart, glossary, page

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


def an_sae(**facts) -> dict:
    row = dict(model="s", layer=3, sae="topk-x4", recipe="base", k=8, seed=0, tokens=100_000)
    return row | dict(r2=0.8, swd_tok=0.5, ce_rec=0.9) | facts


def saes() -> list[dict]:
    return [
        an_sae(model=model, k=k, r2=1 - (1 + i / 9) / k, swd_tok=(1 + i / 9) / k, ce_rec=0.9 - i / k)
        for i, model in enumerate(("s", "l"))
        for k in (4, 8, 16)
    ]


def a_chart(rows: list[dict]) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    return chart.of_saes(rows, models, [BY_NAME["r2"], BY_NAME["swd_tok"]])


def a_picture(colour=(200, 30, 40)) -> bytes:
    from PIL import Image

    image, out = Image.new("RGB", (120, 80), "white"), io.BytesIO()
    image.paste(colour, (10, 20, 60, 70))
    image.save(out, format="PNG")
    return out.getvalue()


REPORT = """\
# Is it?

**It is not.**

![a red box](box.png)

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


def a_page(report: str | None = None, rows: list[dict] | None = None, folder=None) -> str:
    report = REPORT.format(table=markdown(TABLE)) if report is None else report
    charts = [a_chart(saes() if rows is None else rows)]
    return page.page(report, {"box.png": a_picture()}, charts, folder).decode()


# ------------------------------------------------------------------------------------------------- the file
def test_the_page_is_well_formed_and_holds_all_of_the_report():
    document = Document(a_page())
    assert document.attributes("html") == [{"lang": "en"}] and document.text["title"][0] == "Is it?"
    assert document.text["h1"] == ["Is it?"] and document.text["strong"] == ["It is not."]
    assert document.text["h2"] == ["Table", "More", "Rest"]
    assert document.text["th"] == list(TABLE[0]) and len(document.text["td"]) == 5 * 4
    assert document.text["code"][-2:] == ["code", "python expa.py --k 1 < 2\n"]
    assert all(head == {"scope": "col"} for head in document.attributes("th"))
    (image,) = document.attributes("img")
    assert image["alt"] == "a red box" and (image["width"], image["height"]) == ("120", "80")
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
    assert a_page(rows=[an_sae(r2=0.8)]) != a_page(rows=[an_sae(r2=0.81)])


def test_names_are_text_wherever_they_stand():
    rows = [an_sae(model=EVIL, sae=EVIL, word=EVIL), an_sae(model="m", recipe=EVIL, r2=0.5)]
    named = [{"sae": EVIL, "r2": 0.5}]
    report = (
        f"# {EVIL}\n\n**{EVIL}**\n\n![{EVIL}](box.png)\n\n## {EVIL}\n\n{markdown(named)}\n\n## a\n\n## b\n"
    )
    document = Document(a_page(report, rows))
    assert [tag for tag, _ in document.elements].count("script") == 1  # ours
    assert "b" not in document.text and document.text["title"][0] == EVIL
    assert document.text["h1"] == document.text["h2"][:1] == document.text["strong"] == [EVIL]
    assert document.text["td"][0] == EVIL and document.attributes("img")[0]["alt"] == EVIL
    assert EVIL in document.text["li"]  # of the legend
    assert sum(EVIL in title for title in document.text["title"][1:]) == 2 * 2
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
        assert tag not in ("link", "iframe", "object", "embed", "base", "use", "image", "style src")
        assert not {"srcset", "action", "data", "poster", "background", "xlink:href"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:")
        assert not attributes.get("href", "").startswith(("javascript", "data"))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", text.split("<body>")[0])
    (policy,) = [a["content"] for a in document.attributes("meta") if "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(document.text["script"][0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"'sha256-{digest}'" in policy


def test_a_picture_keeps_its_look_in_fewer_bytes():
    from transport_geometry.reporting.figures import as_png, pyplot

    from PIL import Image

    figure, axes = pyplot().subplots(1, 3, figsize=(9, 3))
    for i, axis in enumerate(axes):
        axis.plot(range(9), [x**i for x in range(9)], f"C{i}", marker="o")
        axis.fill_between(range(9), 0, 5, alpha=0.3, color=f"C{i + 3}")
    whole = as_png(figure)
    small, width, height = page.fewer_inks(whole)
    before, after = (np.array(Image.open(io.BytesIO(png)).convert("RGB"), int) for png in (whole, small))
    far = abs(before - after).max(2)
    assert far.shape == (height, width) and len(small) < 0.6 * len(whole)
    assert far.mean() < 1 and np.quantile(far, 0.999) < 32


def test_a_link_to_a_report_leads_to_its_page_where_there_is_one(tmp_path):
    assert 'href="part/report.md"' in a_page(folder=tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "part/report.html").write_text("")
    assert 'href="part/report.html"' in a_page(folder=tmp_path)
    assert 'href="part/report.md"' in a_page("# a\n\n[report.md](part/report.md)\n", folder=tmp_path)


def test_a_report_without_sections_pictures_or_charts_is_a_page():
    document = Document(page.page("A line.\n", {}).decode())
    assert document.text["title"] == ["Report"] and document.text["p"] == ["A line."]


@pytest.mark.parametrize("path", sorted((ROOT / "outputs/reference").rglob(page.PAGE)), ids=str)
def test_the_pages_of_the_reference_runs(path):
    text = path.read_text(encoding="utf-8")
    document, report = Document(text), path.with_name(page.REPORT).read_text(encoding="utf-8")
    assert len(text) < 2**20 and document.text["title"][0] == report.splitlines()[0].removeprefix("# ")
    assert len(document.text.get("table", [])) == len(re.findall(r"^\|--", report, re.M))
    assert len(document.attributes("img")) == report.count("![")
    assert all(a["src"].startswith("data:") and a["alt"] for a in document.attributes("img"))
    if "conditions.csv" in os.listdir(path.parent):
        assert text.count('class="mark ') > 1


# ---------------------------------------------------------------------------------------------- the charts
def drawn(text: str) -> list[list[tuple[float, float, str]]]:
    """(x, y, what it says) of the marks of each panel."""
    form = r'class="mark [^"]*"\s+transform="translate\((\S+) (\S+)\)"[^>]*><title>([^<]*)'
    return [
        [(float(x), float(y), html.unescape(says)) for x, y, says in re.findall(form, svg)]
        for svg in re.findall(r'<svg class="chart".*?</svg>', text, re.S)
    ]


def test_marks_lie_where_their_numbers_are():
    rows = saes()
    of_r2, of_swd = drawn(a_chart(rows))
    for panel in (of_r2, of_swd):
        assert len(panel) == len(rows)
        heights = [
            (above[1] - y) / (a["ce_rec"] - b["ce_rec"]) for above, a, (_, y, _), b in two(panel, rows)
        ]
        assert max(heights) == pytest.approx(min(heights), rel=0.02) and max(heights) < 0  # up is more
    across = [(one[0] - x) / (a["r2"] - b["r2"]) for one, a, (x, _, _), b in two(of_r2, rows)]
    assert max(across) == pytest.approx(min(across), rel=0.02) and min(across) > 0
    logs = [
        (one[0] - x) / math.log(a["swd_tok"] / b["swd_tok"]) for one, a, (x, _, _), b in two(of_swd, rows)
    ]
    assert (
        max(logs) == pytest.approx(min(logs), rel=0.02) and max(logs) < 0
    )  # a distortion: less of it at the right
    assert of_r2[0][2] == "s, block 3: topk-x4, k 4, seed 0, 100k tokens\nR² 0.75\nswd_tok 0.25\nCE_rec 0.9"


def two(panel, rows):
    """Every mark and its row beside the first that differs in everything."""
    return [(panel[i], rows[i], panel[5], rows[5]) for i in range(4)]


def test_colours_are_of_models_and_of_words_where_there_is_one_model():
    def tones(rows):
        return re.findall(r'"mark (c\d)"', a_chart(rows)), re.findall(r"</svg>([^<]*)</li>", a_chart(rows))

    rows = saes()
    assert tones(rows) == (["c0"] * 3 + ["c1"] * 3 + ["c0"] * 3 + ["c1"] * 3, ["s", "l", *K])
    one = [row | {"word": word} for row, word in zip(rows, "bab")]
    assert tones(one) == (["c1", "c0", "c1"] * 2, ["a", "b", *K])


K = ["k = 4", "k = 8", "k = 16"]


def test_what_has_no_place_is_counted():
    rows = [*saes(), an_sae(model="s", swd_tok=math.nan), an_sae(model="s", swd_tok=-0.1, r2=math.nan)]
    text = a_chart(rows)
    assert [len(panel) for panel in drawn(text)] == [7, 6]
    assert ">R²; 1 not drawn<" in text and "at the right); 2 not drawn<" in text
    worse = a_chart([*saes(), an_sae(model="s", r2=-0.3, ce_rec=-2)])
    assert [len(panel) for panel in drawn(worse)] == [6, 6] and "Not drawn: 1 with an R² below 0" in worse
    assert len(drawn(a_chart([an_sae(r2=-0.3)]))[0]) == 1
    nothing = a_chart([an_sae(ce_rec=math.nan)])
    assert "nothing to draw, all 1 undefined" in nothing and not drawn(nothing)
    assert drawn(a_chart([an_sae()]))[0]  # one alone has a place


def test_gaps_over_budget_are_joined_and_have_their_intervals():
    rows = [
        dict(depth="0.50", k=k, tokens=tokens, n_seeds=3)
        | dict(delta_r2=gap, delta_r2_lo=gap - 0.1, delta_r2_hi=gap + 0.1)
        | dict(delta_ce_rec=-gap, delta_ce_rec_lo=math.nan, delta_ce_rec_hi=math.nan)
        for k in (4, 8)
        for tokens, gap in ((100_000, 0.1), (10_000, 0.3))
    ]
    text = chart.of_deltas(rows, "l minus s")
    Document(text)
    r2, ce_rec = re.findall(r'<svg class="chart".*?</svg>', text, re.S)
    assert (r2.count("polyline"), r2.count('"bar')) == (2, 4) and ce_rec.count('"bar') == 0
    assert 'class="grid zero"' in r2 and ">10k<" in r2 and ">100k<" in r2
    xs = [float(point.split(",")[0]) for point in re.search(r'points="([^"]*)"', r2)[1].split()]
    assert xs == sorted(xs)
    assert "k 4, 10k tokens, 3 seeds\nΔR² 0.3 [0.2, 0.4]\nΔCE_rec -0.3" in drawn(text)[0][0][2]


@pytest.mark.parametrize(
    "lo, hi", [(0, 1), (-0.37, 0.21), (0.998, 0.9991), (1e-7, 3e-7), (5, 5), (0, 40_000)]
)
def test_ticks_are_round_and_inside(lo, hi):
    axis = chart.Axis("")
    values = [value for value, _ in chart.ticks(axis, [lo, hi])]
    ends = chart.ends(axis, [lo, hi])
    assert 2 <= len(values) <= 7 and ends[0] <= values[0] and values[-1] <= ends[1]
    for value, text in chart.ticks(axis, [lo, hi]):
        assert float(text.replace("−", "-")) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("lo, hi", [(0.1, 10), (0.2, 0.5), (0.03, 4), (1e-6, 1e3), (0.201, 0.31), (2, 2)])
def test_ticks_of_a_log_axis_are_inside(lo, hi):
    axis = chart.Axis("", log=True)
    ends = chart.ends(axis, [lo, hi])
    values = [value for value, _ in chart.ticks(axis, [lo, hi])]
    assert 2 <= len(values) <= 12 and all(ends[0] <= math.log10(value) <= ends[1] for value in values)


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
        report = "# a\n\n**It is <i> not.**\n\n![a red box](box.png)\n\n## Table\n\n" + markdown(TABLE)
        path = tmp_path / "report.html"
        path.write_text(a_page(report, [*saes(), an_sae(model=EVIL)]), encoding="utf-8")
        dom, console = opened(path, tmp_path)
        assert not console
        document = Document(dom)
        assert document.text["strong"] == ["It is <i> not."] and len(document.text["td"]) == 5 * 4
        assert document.text["button"] == list(TABLE[0])
        marks = [a for a in document.attributes("path") if "mark" in a["class"]]
        assert len(marks) == 2 * 7 and sum(a["tabindex"] == "0" for a in marks) == 2
        assert marks[0]["aria-label"].startswith("s, block 3: topk-x4, k 4, seed 0")
        assert marks[6]["aria-label"].startswith(EVIL)

    def test_its_policy_stops_what_would_ask_a_network(self, tmp_path):
        """And so the console, which the test above reads, is seen to speak."""
        path = tmp_path / "report.html"
        ask = '<img src="http://127.0.0.1:9/x.png"><script>evil()</script></body>'
        path.write_text(a_page().replace("</body>", ask), encoding="utf-8")
        _, console = opened(path, tmp_path)
        refused = [line for line in console if "Content Security Policy" in line]
        assert len(refused) == 2 and not [line for line in console if "evil is not defined" in line]

    def test_tables_sort_and_marks_speak(self, tmp_path):
        path = tmp_path / "report.html"
        script = """
          const table = document.querySelector("table"), heads = [...table.querySelectorAll("th button")];
          const order = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent).join(" ");
          for (const head of heads) { head.click(); say(order()); head.click(); say(order()); }
          say([...table.querySelectorAll("[aria-sort]")].map(h => h.textContent + h.ariaSort));
          const tip = document.getElementById("tip"), marks = document.querySelectorAll("svg.chart .mark");
          say(tip.hidden);
          marks[0].focus(); say(tip.hidden, tip.textContent);
          const key = key => document.activeElement.dispatchEvent(
            new KeyboardEvent("keydown", {key, bubbles: true}));
          key("ArrowRight"); say(document.activeElement === marks[1], tip.textContent);
          key("ArrowLeft"); key("ArrowLeft"); say(document.activeElement === marks[5]);
          key("Escape"); say(tip.hidden);
          const box = marks[2].getBoundingClientRect();
          const to = (x, y) => marks[2].ownerSVGElement.dispatchEvent(
            new PointerEvent("pointermove", {clientX: x, clientY: y, bubbles: true}));
          to(box.left + box.width / 2 + 2, box.top + box.height / 2 - 1); say(tip.hidden, tip.textContent);
          const edge = tip.getBoundingClientRect(); say(edge.left >= 0 && edge.right <= innerWidth);
          to(-500, -500); say(tip.hidden);
          say(performance.getEntriesByType("resource").map(entry => entry.name));
        """
        path.write_text(tried(a_page(), script), encoding="utf-8")
        dom, console = opened(path, tmp_path)
        assert not console
        orders, (sorted_by,), rest = said(dom)[:10], said(dom)[10], said(dom)[11:]
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
        first, second, third = (f"s, block 3: topk-x4, k {k}, seed 0, 100k tokens" for k in (4, 8, 16))
        assert rest[0] == [True] and rest[1][0] is False and rest[1][1].startswith(first)
        assert rest[2][0] is True and rest[2][1].startswith(second)
        assert rest[3] == [True] and rest[4] == [True]
        assert rest[5][0] is False and rest[5][1].startswith(third)
        assert rest[6:] == [[True], [True], [[]]]

    def test_on_a_phone_only_boxes_scroll(self, tmp_path):
        """In a frame as wide as a phone, for a window of Chromium is not so narrow."""
        wide = [{f"a long column {i}": "+0.10 [+0.05, +0.15]" for i in range(20)}]
        report = f"# a\n\n## {'long' * 30}\n\n{markdown(wide)}\n\n    {'x' * 300}\n\n![a red box](box.png)\n"
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
