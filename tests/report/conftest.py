"""A run folder as the jobs leave it, with made-up content."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORDS = "return the sorted copy of an array along given axis tensor index frame column stream socket path value".split()
NUM_QUERIES, NUM_STEPS = 120, 900


def summary(positive: float, negative: float, generator: np.random.Generator) -> dict[str, Any]:
    """A similarity summary in the shape that evaluation/distributions.py gives."""
    sides = {
        "positives": generator.normal(positive, 0.12, size=500).clip(-1, 1),
        "negatives": generator.normal(negative, 0.15, size=5000).clip(-1, 1),
    }
    edges = np.histogram_bin_edges(np.concatenate(list(sides.values())), bins=60)
    shares = {name: np.histogram(values, bins=edges)[0] / values.size for name, values in sides.items()}
    described = {
        name: {
            "count": values.size,
            "mean": float(values.mean()),
            "std": float(values.std()),
            "histogram": shares[name].tolist(),
        }
        for name, values in sides.items()
    }
    overlap = float(np.minimum(*shares.values()).sum())
    return {"edges": edges.tolist(), **described, "overlap": overlap, "gap": positive - negative, "auc": 0.931}


def training_rows(generator: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": step / NUM_STEPS,
            "loss": 0.4 + 1.6 * math.exp(-step / 150) + abs(generator.normal(0, 0.12)),
            "learning_rate": 3e-5 * min(step / 90, (NUM_STEPS - step) / (NUM_STEPS - 90)),
            "grad_norm": 2 + 8 * math.exp(-step / 80) + abs(generator.normal(0, 0.8)),
            "seconds": 0.8,
            "queries_per_second": 78 + generator.normal(0, 4),
            "tokens_per_second": 19_000 + generator.normal(0, 900),
            "padding_share": 0.11 + abs(generator.normal(0, 0.02)),
            "negatives_per_query": 511,
        }
        for step in range(1, NUM_STEPS + 1)
    ]


def query_rows(generator: np.random.Generator) -> list[dict[str, Any]]:
    def sentence(length: int) -> str:
        return " ".join(generator.choice(WORDS, size=length))

    rows = []
    for number in range(NUM_QUERIES):
        base, tuned = generator.choice([0, 0.39, 0.5, 0.63, 1], size=2, p=[0.2, 0.1, 0.2, 0.2, 0.3]).tolist()
        tops = {
            model: {
                "id": f"package.module{number}.{model}",
                "text": sentence(30),
                "score": 0.71,
                "relevant": value == 1,
            }
            for model, value in (("base", base), ("tuned", tuned))
        }
        rows.append(
            {
                "query_id": f"package.module.Class.method_{number}",
                "query": sentence(9),
                "base": base,
                "tuned": tuned,
                "positives": [sentence(80)] * (1 + number % 2),
                "base_top": tops["base"],
                "tuned_top": tops["tuned"],
            }
        )
    return rows


def metrics() -> dict[str, Any]:
    kinds, k_values = ("ndcg", "map", "recall", "precision", "mrr"), (1, 10, 100)
    return {
        "base": {f"{kind}@{k}": 0.4 + 0.03 * len(kind) + k / 1000 for k in k_values for kind in kinds},
        "tuned": {f"{kind}@{k}": 0.44 + 0.03 * len(kind) + k / 1100 for k in k_values for kind in kinds},
        "significance": {
            "metric": "ndcg@10",
            "base": 0.53,
            "tuned": 0.5691,
            "difference": 0.0391,
            "p_value": 0.00019998,
            "ci95": [0.0301, 0.0655],
            "wins": 180,
            "ties": 230,
            "losses": 90,
            "num_queries": 500,
        },
        "num_queries": 500,
        "num_passages": 12345,
    }


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_run_folder(folder: Path) -> Path:
    """Everything that the page reads, under `folder`."""
    generator = np.random.default_rng(0)
    write_lines(folder / "evaluate/metrics.json", [metrics()])
    models = {"base": summary(0.55, 0.32, generator), "tuned": summary(0.68, 0.21, generator)}
    write_lines(folder / "evaluate/similarities.json", [models])
    write_lines(folder / "evaluate/per_query.jsonl", query_rows(generator))
    write_lines(folder / "train/metrics.jsonl", training_rows(generator))
    mined = {"num_queries": 3714, "negatives": 55710, "filled_up": 12, "dropped": {"is_positive": 3714, "is_query": 7}}
    write_lines(folder / "mine/stats.json", [mined])
    write_lines(
        folder / "score/stats.json", [{"num_pairs": 59424, "teacher": "package://some/teacher", "mean": 0.4321}]
    )
    (folder / "config.yaml").write_text("output_dir: runs/made_up\nseed: 42\nmodel:\n  name_or_path: package://m\n")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path)
