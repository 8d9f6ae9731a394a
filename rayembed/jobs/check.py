"""The job `check`: reads all data of the experiment and says what is wrong, what is unusual, and how much there is.

Every other job makes the same reading before it starts a worker; it is cached, so it costs once.
"""

import logging
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from rayembed.config import Experiment
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.prompts import passage_text, query_text
from rayembed.data.storage import write_atomic
from rayembed.data.store import Store
from rayembed.jobs.inputs import check_rows
from rayembed.models.families import FAMILIES
from rayembed.models.loading import load_config, load_tokenizer, pooling_of

logger = logging.getLogger(__name__)
SAMPLE = 2000  # texts whose tokens are counted; a corpus of millions is not tokenised for a warning


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Checks data and model.

    Args:
        experiment: all sections.
        overwrite: has no meaning here; every job takes it.

    Returns:
        OUTPUT_DIR/check.txt: what was logged.

    Raises:
        DataError: the data have errors; the message lists them by file, line and field.
        ValueError: the rows cannot be trained on with these settings.
        FileNotFoundError: a file or the model is not there.
    """
    load_config(experiment.model.name_or_path, trust_remote_code=experiment.model.trust_remote_code)
    if experiment.score is not None:
        load_config(experiment.score.model, trust_remote_code=experiment.score.trust_remote_code)
    prepared = prepare(experiment)
    if experiment.mine is not None:
        prepared.report.warnings.drop("rows without negatives")  # that is what mine is for
    text = prepared.report.summary()
    prepared.report.raise_if_errors()
    lines = [
        text,
        f"model {experiment.model.name_or_path}, pooling {pooling_of(experiment.model)}",
        *_lengths(experiment, prepared),
    ]
    if prepared.rows is not None and experiment.mine is None:
        lines += _missing_negatives(experiment, prepared.rows)
    if prepared.rows is not None and experiment.train is not None:
        coming = tuple(job for job in ("mine", "score") if getattr(experiment, job) is not None)
        check_rows(experiment, prepared.rows, coming=coming)
    summary = "\n".join(line for line in lines if line)
    for line in summary.splitlines():
        logger.info("check: %s", line)
    path = Path(experiment.output_dir) / "check.txt"
    write_atomic(path, (summary + "\n").encode())
    return path


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    sources = [*experiment.data.train, *experiment.data.corpus, *filter(None, [experiment.data.evaluation])]
    return f"check: reads {', '.join(dict.fromkeys(sources)) or 'nothing (data is empty)'}"


def _lengths(experiment: Experiment, prepared: Prepared) -> list[str]:
    """Token lengths of queries and passages, and the share that is cut."""
    model = experiment.model
    tokenizer = load_tokenizer(
        model.name_or_path,
        padding_side=FAMILIES[model.family].padding_side,
        trust_remote_code=model.trust_remote_code,
    )
    lines = []
    for side, texts in _samples(experiment, prepared).items():
        limit = experiment.max_len(side)
        ids = tokenizer(texts, verbose=False)["input_ids"]
        lengths = np.array([len(tokens) for tokens in ids])
        cut = float((lengths > limit).mean())
        plural = {"query": "queries", "passage": "passages"}[side]
        lines.append(
            f"{plural}: {lengths.mean():.0f} tokens on average, {int(np.percentile(lengths, 95))} at the 95th "
            f"percentile; {100 * cut:.1f} % longer than {limit} ({side}_max_len) are cut (of {len(texts):,} sampled)"
        )
    return lines


def _samples(experiment: Experiment, prepared: Prepared) -> dict[str, list[str]]:
    samples = {}
    if prepared.rows is not None and prepared.rows.num_rows:
        rows = _sample(prepared.rows, ["query", "prompt"])
        samples["query"] = [query_text(experiment.model, row["query"], row["prompt"]) for row in rows]
    if prepared.corpus is not None and prepared.corpus.num_rows:
        rows = _sample(prepared.corpus, ["text"])
        samples["passage"] = [passage_text(experiment.model, row["text"]) for row in rows]
    return samples


def _sample(store: Store, columns: list[str]) -> list[dict[str, str]]:
    count = min(SAMPLE, store.num_rows)
    rows = np.random.default_rng(0).choice(store.num_rows, count, replace=False)
    return list(store.take(np.sort(rows), columns).to_pylist())


def _missing_negatives(experiment: Experiment, rows: Store) -> list[str]:
    needed = experiment.data.train_group_size - 1
    short = sum(
        pc.sum(pc.less(pc.list_value_length(part.column("neg")), needed)).as_py() or 0
        for part in rows.iter_parts(["neg"])
    )
    if experiment.train is None or not short:
        return []
    return [
        f"{short:,} of {rows.num_rows:,} rows have fewer than {needed} negatives (data.train_group_size - 1): theirs "
        "are used more than once in a group; rows without any are refused by train"
    ]
