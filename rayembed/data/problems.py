"""What is wrong or unusual in the data, collected over whole files so that one run shows every kind of mistake."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NoReturn

from rayembed.config.wording import counted

KEPT = 20  # of each kind; the rest is counted, so that a report of a bad billion-line file stays readable


class DataError(ValueError):
    """The data cannot be used; the text lists what is wrong, one problem a line."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    `line` counts from 1; in parquet files it is the row. None: the finding concerns the whole file.
    """

    file: str
    line: int | None
    field: str
    message: str

    def __str__(self) -> str:
        """As `file:line: field: message`."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.field, self.message) if part)


class Findings:
    """Problems by kind: the first 20 of each, and how many there were."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Problem]] = {}
        self.counts: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Number of problems, those not kept included."""
        return sum(self.counts.values())

    def add(self, kind: str, problems: list[Problem], count: int) -> None:
        """Count `count` problems of a kind and keep those of `problems` that there is room for."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        kept = self.kept.setdefault(kind, [])
        kept.extend(problems[: KEPT - len(kept)])

    def drop(self, kind: str) -> None:
        """Forget a kind."""
        self.counts.pop(kind, None)
        self.kept.pop(kind, None)

    def lines(self) -> Iterator[str]:
        """Every kept problem, one a line, and how many more of its kind there are."""
        for kind, problems in self.kept.items():
            yield from map(str, problems)
            if self.counts[kind] > len(problems):
                yield f"... and {self.counts[kind] - len(problems):,} more: {kind}"


class Report:
    """Errors (the data is refused), warnings (worth a look) and counts of everything that was read."""

    def __init__(self) -> None:
        self.errors = Findings()
        self.warnings = Findings()
        self.counts: dict[str, int] = {}
        self._merged: set[str] = set()

    def error(self, kind: str, problem: Problem) -> None:
        """Note something that makes the data unusable; `kind` is a few words under which it is counted."""
        self.errors.add(kind, [problem], 1)

    def warn(self, kind: str, problem: Problem) -> None:
        """Note something unusual."""
        self.warnings.add(kind, [problem], 1)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count; a number of 0 makes it appear."""
        self.counts[name] = self.counts.get(name, 0) + number

    def merge(self, other: "Report", name: str) -> None:
        """Take over another report, once for each name: a store that is used twice was read once."""
        if name in self._merged:
            return
        self._merged.add(name)
        for mine, theirs in ((self.errors, other.errors), (self.warnings, other.warnings)):
            for kind, number in theirs.counts.items():
                mine.add(kind, theirs.kept[kind], number)
        for count, number in other.counts.items():
            self.count(count, number)

    def took(self, name: str) -> bool:
        """Whether a report was merged under this name."""
        return name in self._merged

    def raise_if_errors(self) -> None:
        """Refuse the data if there are errors.

        Raises:
            DataError: lists the errors as `file:line: field: message`.
        """
        if self.errors.total:
            self._refuse()

    def _refuse(self) -> NoReturn:
        number = self.errors.total
        listed = "\n".join(f"  {line}" for line in self.errors.lines())
        raise DataError(
            f"{counted(number, 'error')} in the data, so nothing was started:\n{listed}\n"
            "Correct or remove these lines, or change the paths in the experiment file; "
            "`rayembed check` shows them again."
        )

    def summary(self) -> str:
        """Counts, warnings with their first place, and all kept errors, as text for people; the totals come last."""
        return "\n".join(filter(None, [self.listing(), self.totals()]))

    def totals(self, *, other_warnings: int = 0) -> str:
        """How many errors and warnings there are, in a line.

        Args:
            other_warnings: of what is beside the data.
        """
        return f"{counted(self.errors.total, 'error')}, {counted(self.warnings.total + other_warnings, 'warning')}"

    def listing(self) -> str:
        """The summary without the totals; empty where nothing was read."""
        sections = []
        if self.counts:
            sections.append(("counts", [(name, number, "") for name, number in self.counts.items()]))
        if self.warnings.counts:
            rows = [(kind, n, f"first: {self.warnings.kept[kind][0]}") for kind, n in self.warnings.counts.items()]
            sections.append(("warnings", rows))
        if self.errors.counts:
            sections.append(("errors", [(kind, number, "") for kind, number in self.errors.counts.items()]))
        width = max((len(name) for _, rows in sections for name, _, _ in rows), default=0)
        lines = []
        for title, rows in sections:
            lines.append(title)
            lines += [f"  {name:<{width}}  {number:>13,}  {note}".rstrip() for name, number, note in rows]
        lines += [f"  {line}" for line in self.errors.lines()]
        return "\n".join(lines)

    def to_json(self) -> bytes:
        """The report as bytes that from_json reads."""
        value = {
            name: [[kind, n, [asdict(p) for p in findings.kept[kind]]] for kind, n in findings.counts.items()]
            for name, findings in (("errors", self.errors), ("warnings", self.warnings))
        }
        return json.dumps(value | {"counts": self.counts}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Report":
        """Inverse of to_json."""
        value = json.loads(data)
        report = cls()
        for name, findings in (("errors", report.errors), ("warnings", report.warnings)):
            for kind, number, problems in value[name]:
                findings.add(kind, [Problem(**problem) for problem in problems], number)
        report.counts = value["counts"]
        return report
