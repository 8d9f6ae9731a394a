"""Rounds of mining and training side by side, for the page: what each mined, how it trained, what it scored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayembed.report import reading, wording

FOLDER = "rounds"  # holds 1, 2, ...; the last round is the run folder itself
METRIC = "ndcg@10"  # where the evaluation tested none
BY_TEACHER = "denoised"  # of the drops in stats.json
AUDIT = "mine/audit.html"


@dataclass(frozen=True)
class Round:
    """A row of the table; `audit` is the path of its page, seen from the report. None: it is not there."""

    number: int
    cells: list[str]
    audit: str | None


@dataclass(frozen=True)
class Rounds:
    """The table: names of the columns between the round's number and the link, and a row a round."""

    columns: list[str]
    rows: list[Round]


def rounds_section(run_folder: Path) -> Rounds | None:
    """The rounds that config.yaml asks for in their order, the run folder last; None where it asks for one.

    What is not there yet is a dash; what another number of rounds left is not shown.

    Raises:
        ValueError: a file is broken; names it.
    """
    mine = reading.read_settings(run_folder, "config.yaml").get("mine")
    count = mine.get("rounds", 1) if isinstance(mine, dict) else 1
    if count == 1:
        return None
    places = [*((number, f"{FOLDER}/{number}/") for number in range(1, count)), (count, "")]
    metrics = [reading.read_json(run_folder, f"{place}evaluate/metrics.json") or {} for _, place in places]
    tested = [own["significance"]["metric"] for own in metrics if own.get("significance")]
    metric = tested[-1] if tested else METRIC
    rows = [
        Round(number, _cells(run_folder, place, own, metric), _audit(run_folder, place))
        for (number, place), own in zip(places, metrics, strict=True)
    ]
    label = wording.metric_label(metric)
    columns = ["negatives", "mean score", "median margin", "suspected false negatives", "dropped by the teacher"]
    return Rounds([*columns, "steps", "last loss", f"{label}, base", f"{label}, tuned"], rows)


def _cells(run_folder: Path, place: str, metrics: dict[str, Any], metric: str) -> list[str]:
    mined = reading.read_json(run_folder, f"{place}mine/stats.json") or {}
    last: dict[str, Any] = {}
    steps: int | None = None
    for row in reading.read_rows(run_folder, f"{place}train/metrics.jsonl"):
        if steps is None or row["step"] >= steps:  # of a step that ran again, the line that came last
            steps, last = row["step"], row
    return [
        wording.quantity(mined.get("negatives")),
        wording.decimal(mined.get("mean_negative_score")),
        wording.decimal(mined.get("median_margin")),
        wording.quantity(mined.get("suspected_false_negatives")),
        wording.quantity(mined.get("dropped", {}).get(BY_TEACHER)),
        wording.quantity(steps),
        wording.decimal(last.get("loss")),
        *(wording.decimal(metrics.get(model, {}).get(metric)) for model in ("base", "tuned")),
    ]


def _audit(run_folder: Path, place: str) -> str | None:
    return f"{place}{AUDIT}" if (run_folder / f"{place}{AUDIT}").exists() else None
