"""The rounds of a run, side by side: in the order of their numbers, the run folder last."""

import json
from pathlib import Path

from rayembed.report.rounds import rounds_section
from tests.report.conftest import write_lines
from tests.report.test_page import ATTACK, Structure, build


def write_round(folder: Path, number: int, *, metric: str = "ndcg@10") -> None:
    """A round whose every figure holds its number."""
    folder.mkdir(parents=True, exist_ok=True)
    mined = {
        "negatives": 15_000 + number,
        "mean_negative_score": 0.5 + number / 1000,
        "median_margin": 0.2 + number / 1000,
        "suspected_false_negatives": 40 + number,
        "dropped": {"denoised": 2000 + number, "positive_id": 9},
    }
    write_lines(folder / "mine/stats.json", [mined])
    (folder / "mine/audit.html").write_text("a page")
    steps = [{"step": step, "loss": step + number / 10} for step in (1, 2, 3, 2, 3)]
    write_lines(folder / "train/metrics.jsonl", [*steps[:3], *({**row, "loss": row["loss"] / 2} for row in steps[3:])])
    values = {"base": {metric: 0.25, "map@10": 0.9}, "tuned": {metric: 0.5 + number / 1000}}
    write_lines(folder / "evaluate/metrics.json", [values])


def ask_for(folder: Path, rounds: int) -> None:
    """What the run leaves of its settings."""
    (folder / "config.yaml").write_text(f"seed: 42\nmine:\n  rounds: {rounds}\n")


def write_rounds(folder: Path, count: int) -> None:
    ask_for(folder, count)
    for number in range(1, count):
        write_round(folder / "rounds" / str(number), number)
    write_round(folder, count)


def test_every_round_is_a_row_and_the_run_folder_the_last(tmp_path: Path) -> None:
    write_rounds(tmp_path, 11)
    (tmp_path / "rounds/.partial").mkdir()
    write_round(tmp_path / "rounds/11", 11)  # of a run that asked for more
    write_round(tmp_path / "rounds/12", 12)
    found = rounds_section(tmp_path)
    assert found is not None
    assert found.columns[-2:] == ["nDCG@10, base", "nDCG@10, tuned"]
    assert [row.number for row in found.rows] == list(range(1, 12))
    for row in found.rows:
        n = row.number
        last_loss = (3 + n / 10) / 2
        expected = [f"15,0{n:02}", f"{0.5 + n / 1000:.4f}", f"{0.2 + n / 1000:.4f}", f"{40 + n}", f"2,0{n:02}"]
        assert row.cells == [*expected, "3", f"{last_loss:.4f}", "0.2500", f"{0.5 + n / 1000:.4f}"]
        assert row.audit == ("mine/audit.html" if n == 11 else f"rounds/{n}/mine/audit.html")
        assert len(row.cells) == len(found.columns)
    assert [path.exists() for row in found.rows if row.audit for path in [tmp_path / row.audit]] == [True] * 11


def test_one_round_has_no_section(tmp_path: Path) -> None:
    write_rounds(tmp_path, 2)
    assert rounds_section(tmp_path) is not None
    ask_for(tmp_path, 1)
    assert rounds_section(tmp_path) is None
    for settings in ("seed: 42\n", "mine: null\n", "mine: {}\n", ""):
        (tmp_path / "config.yaml").write_text(settings)
        assert rounds_section(tmp_path) is None
    (tmp_path / "config.yaml").unlink()
    assert rounds_section(tmp_path) is None


def test_what_is_not_there_yet_is_a_dash(tmp_path: Path) -> None:
    ask_for(tmp_path, 2)
    found = rounds_section(tmp_path)
    assert found is not None
    assert [(row.number, set(row.cells)) for row in found.rows] == [(1, {"–"}), (2, {"–"})]  # noqa: RUF001
    write_round(tmp_path / "rounds/1", 1)
    (tmp_path / "rounds/1/mine/audit.html").unlink()
    found = rounds_section(tmp_path)
    assert found is not None
    assert [row.audit for row in found.rows] == [None, None]
    assert found.rows[1].cells == ["–"] * 9  # noqa: RUF001
    (tmp_path / "rounds/1/mine/stats.json").write_text(json.dumps({"negatives": 3}))
    found = rounds_section(tmp_path)
    assert found is not None
    assert found.rows[0].cells[:6] == ["3", "–", "–", "–", "–", "3"]  # noqa: RUF001


def test_the_metric_is_the_one_that_was_tested(tmp_path: Path) -> None:
    write_rounds(tmp_path, 2)
    path = tmp_path / "evaluate/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"significance": {"metric": "map@10"}}))
    found = rounds_section(tmp_path)
    assert found is not None
    assert found.columns[-2:] == ["MAP@10, base", "MAP@10, tuned"]
    assert found.rows[0].cells[-2:] == ["0.9000", "–"]  # noqa: RUF001


def test_the_report_shows_rounds_with_links_of_its_own_folder(run_folder: Path) -> None:
    assert "Rounds" not in Structure(build(run_folder)).text
    write_round(run_folder / "rounds/1", 1)
    with (run_folder / "config.yaml").open("a") as file:
        file.write("mine:\n  rounds: 2\n")
    (run_folder / "mine/audit.html").write_text("a page")
    stats = json.loads((run_folder / "mine/stats.json").read_text())
    (run_folder / "mine/stats.json").write_text(json.dumps(stats | {"negatives": ATTACK}))
    page = Structure(build(run_folder))
    links = [value for name, value in page.attributes if name == "href" and not value.startswith("#")]
    assert links == ["rounds/1/mine/audit.html", "mine/audit.html"]
    shown = page.text[page.text.index("Rounds") : page.text.index("Mined negatives")]
    for found in ("15,001", "0.5691", "nDCG@10, tuned", ATTACK):
        assert found in shown
    assert not page.tags & {"script", "img"}
