"""report.html as a whole: complete with any file absent, self-contained, everything escaped."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rayembed.report import build_report
from rayembed.report.reading import JOB_OF, absence

VOID = {"meta", "br", "link", "img", "input", "hr"}
ATTACK = '<script>alert("x")</script><img src=x onerror=y>&amp;'


class Structure(HTMLParser):
    """Collects tags, attributes and visible text, and fails on a tag that is closed out of order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def build(folder: Path, title: str = "a title") -> str:
    path = build_report(folder, title)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_whole_run_shows_every_section(run_folder: Path) -> None:
    page = Structure(build(run_folder))
    for name in JOB_OF:
        assert absence(name) not in page.text
    for text in (
        "nDCG@10 rose from 0.5300 to 0.5691",
        "Recall@100",
        "Learning rate",
        "Padding",
        "18,934",  # tokens a second
        "0.931",  # AUC
        "Won most",
        "55,710",  # mined negatives
        "is positive",
        "package://some/teacher",
        "output_dir: runs/made_up",
    ):
        assert text in page.text


@pytest.mark.parametrize("name", JOB_OF)
def test_an_absent_file_is_a_sentence_that_names_its_job(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    text = Structure(build(run_folder)).text
    assert f"no {name} in the run folder yet: the job `rayembed {JOB_OF[name]} " in text
    assert sum(absence(other) in text for other in JOB_OF) == 1


def test_an_empty_run_folder_gives_a_whole_page(tmp_path: Path) -> None:
    text = Structure(build(tmp_path)).text
    assert all(absence(name) in text for name in JOB_OF)
    assert "not been evaluated" in text


def test_tasks_and_heads_have_tables_only_where_they_were_judged(run_folder: Path) -> None:
    without = Structure(build(run_folder)).text
    assert "Tasks" not in without
    assert "BGE-M3" not in without
    path = run_folder / "evaluate/metrics.json"
    pairs = {"kind": "sts", "metric": "spearman", "base": 0.7123, "tuned": 0.7234, "num_texts": 8}
    heads = {model: {"colbert": {"ndcg@10": value}} for model, value in (("base", 0.4321), ("tuned", 0.5432))}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tasks": {ATTACK: pairs}, "heads": heads, "metric": "ndcg@10"})
    )
    text = Structure(build(run_folder)).text
    for shown in (
        "Tasks",
        ATTACK,
        "0.7123",
        "0.7234",
        "By each head of BGE-M3",
        "colbert",
        "0.4321",
        "0.5432",
        "Recall@100",
    ):
        assert shown in text


def test_without_retrieval_the_page_says_so(run_folder: Path) -> None:
    pairs = {"kind": "sts", "metric": "spearman", "base": 0.7123, "tuned": 0.7234, "num_texts": 8}
    (run_folder / "evaluate/metrics.json").write_text(json.dumps({"tasks": {"pairs": pairs}}))
    for name in ("similarities.json", "per_query.jsonl"):
        (run_folder / "evaluate" / name).unlink()
    text = Structure(build(run_folder)).text
    assert text.count("this run judges tasks alone; set data.evaluation for retrieval") == 2
    assert "0.7234" in text
    assert "relative" not in text, "no empty table of metrics"


def test_harvest_has_a_section_only_if_it_ran(run_folder: Path) -> None:
    assert "Harvested data" not in build(run_folder)
    elsewhere = run_folder / "somewhere/else"
    config = run_folder / "config.yaml"
    config.write_text(f"{config.read_text()}harvest:\n  output: {elsewhere}\n")
    assert "Harvested data" not in build(run_folder), "no harvest in the folder yet"
    elsewhere.mkdir(parents=True)
    (elsewhere / "harvest.json").write_text('{"pairs": 6113, "fingerprint": {"versions": "1.2.3"}}')
    page = build(run_folder)
    assert "Harvested data" in page
    assert "6,113" in page
    assert "1.2.3" not in page


def test_page_loads_nothing_and_runs_nothing(run_folder: Path) -> None:
    page = build(run_folder)
    structure = Structure(page)
    assert not structure.tags & {"script", "link", "iframe", "object", "embed", "img", "base"}
    assert not [name for name, _ in structure.attributes if name.startswith("on") or name in {"src", "srcset"}]
    assert all(value.startswith("#") for name, value in structure.attributes if name.endswith("href"))
    assert "//" not in page.replace("package://", "")
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert ("name", "viewport") in structure.attributes
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in structure.attributes


def test_ids_are_unique_on_the_page(run_folder: Path) -> None:
    ids = [value for name, value in Structure(build(run_folder)).attributes if name == "id"]
    assert len(ids) > 100
    assert len(set(ids)) == len(ids)


def test_every_text_is_escaped(run_folder: Path) -> None:
    per_query = run_folder / "evaluate/per_query.jsonl"
    top = {"id": ATTACK, "text": ATTACK, "score": 0.5, "relevant": False}
    row = {
        "query_id": ATTACK,
        "query": ATTACK,
        "base": 0,
        "tuned": 1,
        "positives": [ATTACK],
        "base_top": top,
        "tuned_top": None,
    }
    per_query.write_text(json.dumps(row))
    (run_folder / "mine/stats.json").write_text(json.dumps({ATTACK: ATTACK, "nested": {ATTACK: 1}}))
    (run_folder / "config.yaml").write_text(f"output_dir: {ATTACK}\n# </pre>")
    metrics = json.loads((run_folder / "evaluate/metrics.json").read_text())
    metrics["base"][ATTACK] = 0.1
    (run_folder / "evaluate/metrics.json").write_text(json.dumps(metrics | {ATTACK: 1}))
    structure = Structure(build(run_folder, title=ATTACK))
    assert not structure.tags & {"script", "img"}
    assert structure.text.count(ATTACK) >= 11


def test_long_texts_are_cut(run_folder: Path) -> None:
    path = run_folder / "evaluate/per_query.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    long = {"query": "qq" * 200, "positives": ["pp" * 200], "base_top": row["base_top"] | {"text": "zz" * 200}}
    path.write_text(json.dumps(row | {"base": 0, "tuned": 1} | long))
    text = Structure(build(run_folder)).text
    for letter in "qpz":
        assert max(map(len, re.findall(f"{letter}+", text))) == 299


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine/stats.json", "{", r"stats\.json is not JSON"),
        ("evaluate/metrics.json", "[1]", r"metrics\.json holds list, not a JSON object"),
        ("config.yaml", "a: [", r"config\.yaml is not YAML"),
        ("config.yaml", "a", r"config\.yaml holds str, not settings"),
        ("train/metrics.jsonl", '{"step": 1}\n{"step": ', r"metrics\.jsonl:2 is not JSON"),
    ],
)
def test_a_broken_file_is_named_and_the_old_page_stays(run_folder: Path, name: str, text: str, message: str) -> None:
    before = build(run_folder)
    (run_folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        build_report(run_folder, "new")
    assert (run_folder / "report.html").read_text(encoding="utf-8") == before


def test_refuses_a_run_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no run folder .*output_dir"):
        build_report(tmp_path / "none", "a title")


def test_same_run_same_page(run_folder: Path) -> None:
    assert build(run_folder) == build(run_folder)
