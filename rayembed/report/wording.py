"""Numbers and texts as a reader wants them: no more digits than mean something, no text longer than a glance."""

import json
import math

METRIC_LABELS = {
    "ndcg": "nDCG",
    "map": "MAP",
    "recall": "Recall",
    "precision": "Precision",
    "mrr": "MRR",
    "spearman": "Spearman's correlation",
    "v_measure": "v-measure",
}
TEXT_LIMIT = 300
ABSENT = "–"  # noqa: RUF001  an en dash, as tables are typeset


def metric_label(name: str) -> str:
    """`ndcg@10` as nDCG@10; a metric that is not in METRIC_LABELS keeps its name."""
    metric, at, k = name.partition("@")
    return f"{METRIC_LABELS.get(metric, metric)}{at}{k}"


def shorten(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text of at most `limit` characters, the last one an ellipsis where some were cut."""
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def decimal(value: float | None, digits: int = 4) -> str:
    """A value with a fixed number of digits; a dash for None and what is not finite."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign, a true minus included; zero has none."""
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text


def quantity(value: object) -> str:
    """Any JSON value of a stats file: counts with separators, measures with four digits, texts cut."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 10_000 else f"{value:.4g}"
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 4.2 s, 12 min 30 s, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def title_of(key: str) -> str:
    """A key of a JSON file as words: `num_queries` as num queries."""
    return key.replace("_", " ")
