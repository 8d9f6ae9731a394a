"""The job `check`: reads all data of the experiment and says what is wrong, what is unusual, and how much there is.

Every other job makes the same reading before it starts a worker; it is cached, so it costs once.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.mine import MineConfig
from rayembed.config.uris import public_name
from rayembed.config.wording import counted
from rayembed.data.datasets import read_datasets
from rayembed.data.mixing import MixedPlan
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.prompts import passage_of_row, passage_text, query_of_row
from rayembed.data.storage import write_atomic
from rayembed.data.store import Store
from rayembed.data.tasks import OF_OWN_KIND
from rayembed.jobs.check_tasks import task_notes
from rayembed.jobs.connection import on_this_machine
from rayembed.jobs.dev_split import dev_split, notes
from rayembed.jobs.evaluate_tasks import read_tasks
from rayembed.jobs.inputs import check_rows, planned_batches
from rayembed.jobs.mine import check_window
from rayembed.jobs.passed_through import in_words, passed_through
from rayembed.jobs.rerank import base_of, check_rerankers, check_retriever
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.jobs.teacher import check_teacher
from rayembed.jobs.tokenize import longest_texts
from rayembed.jobs.train import check_model
from rayembed.models.loading import check_length, load_config, pooling_of, tokenizer_of
from rayembed.models.pairs import pair_layout
from rayembed.models.trained import build_tokenizer

logger = logging.getLogger(__name__)
PLURALS = {"query": "queries", "passage": "passages"}
WARNING = "warning: "  # begins a line that is one
SAMPLE = 2000  # texts whose tokens are counted; a corpus of millions is not tokenised for a warning


@in_run_folder
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
    _check_models(experiment)
    _check_sections(experiment)
    prepared = prepare(experiment)
    tasks = read_tasks(experiment, prepared.report)
    if experiment.mine is not None:
        prepared.report.warnings.drop("rows without negatives")  # that is what mine is for
    path = Path(experiment.output_dir) / "check.txt"
    found = prepared.report.summary() + "\n"
    write_atomic(path, found.encode())  # also when it lists errors: no all-clear of an earlier day stays
    prepared.report.raise_if_errors()
    lines = [
        prepared.report.listing(),
        f"model {experiment.model.name_or_path}, pooling {pooling_of(experiment.model)}",
        *_lengths(experiment, prepared),
        *task_notes(experiment, tasks, prepared.rows),
    ]
    for job in ("mine", "score"):
        if prepared.rows is not None and getattr(experiment, job) is not None:
            passed = in_words(passed_through(prepared.rows, job))
            lines += [f"{job}: {passed}"] if passed else []
    if prepared.rows is not None and prepared.corpus is not None and experiment.mine is not None:
        lines += _window(experiment.mine, prepared.rows, prepared.corpus)
    if prepared.rows is not None and experiment.mine is None:
        lines += _missing_negatives(experiment, prepared.rows)
    if prepared.rows is not None and experiment.train is not None:
        coming = tuple(job for job in ("mine", "score") if getattr(experiment, job) is not None)
        check_rows(experiment, prepared.rows, coming=coming)
        check_model(experiment)
        lines += _left_out(experiment, prepared.rows)
        dev = dev_split(experiment)
        lines += [] if dev is None else [f"dev split: {dev.words}", *notes(experiment, dev, prepared.rows)]
    warned = sum(line.startswith(WARNING) for line in lines)
    summary = "\n".join([*filter(None, lines), prepared.report.totals(other_warnings=warned)])
    for line in summary.splitlines():
        logger.info("check: %s", line)
    write_atomic(path, (summary + "\n").encode())
    return path


def _check_models(experiment: Experiment) -> None:
    """Refuses models that are not there."""
    load_config(experiment.model.name_or_path, trust_remote_code=experiment.model.trust_remote_code)
    if experiment.score is not None:
        load_config(experiment.score.model, trust_remote_code=experiment.score.trust_remote_code)
        check_teacher(experiment)
    if experiment.mine is not None and experiment.mine.model is not None:
        load_config(experiment.mine.model, trust_remote_code=experiment.model.trust_remote_code)
    if experiment.evaluate is not None and experiment.evaluate.retriever is not None:
        check_retriever(experiment)
        if experiment.trains_reranker():
            check_rerankers(experiment, [base_of(experiment)])


def _check_sections(experiment: Experiment) -> None:
    """Refuses sections whose data are not named, and lengths that the model cannot read."""
    if experiment.evaluate is not None and experiment.data.evaluation is None and not experiment.evaluate.tasks:
        raise ValueError(
            "the experiment has a section evaluate; set data.evaluation to a BEIR folder, or evaluate.tasks, or remove "
            "the section"
        )
    workers = experiment.ray.fewest_workers
    if experiment.ray.use_gpu and on_this_machine(experiment.ray) and torch.cuda.device_count() < workers:
        raise ValueError(
            f"ray.use_gpu with ray.num_workers {workers} needs as many GPUs; this machine has "
            f"{torch.cuda.device_count()}. Set ray.use_gpu: false, lower ray.num_workers, or give ray.address"
        )
    wanting = [job for job in ("mine", "score", "train") if getattr(experiment, job) is not None]
    if wanting and not experiment.data.train:
        raise ValueError(f"the experiment has a section {wanting[0]}; set data.train to files, folders or globs")
    for setting, length in (longest_texts if experiment.trains_reranker() else _limits)(experiment).items():
        check_length(
            experiment.model.name_or_path, length, setting, trust_remote_code=experiment.model.trust_remote_code
        )


def _limits(experiment: Experiment) -> dict[str, int]:
    """Tokens kept of a text, by the setting that says so: in training, and in encoding where it differs."""
    limits = {}
    for side in ("query", "passage"):
        limits[f"data.{side}_max_len"] = getattr(experiment.data, f"{side}_max_len")
        if experiment.max_len(side) != limits[f"data.{side}_max_len"]:
            limits[f"encode.{side}_max_len"] = experiment.max_len(side)
    return limits


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    sources = [*experiment.data.train, *experiment.data.corpus, *filter(None, [experiment.data.evaluation])]
    for task in experiment.evaluate.tasks if experiment.evaluate is not None else ():
        sources += [*task.train, *task.test]
    return f"check: reads {', '.join(dict.fromkeys(map(public_name, sources))) or 'nothing (data is empty)'}"


def _lengths(experiment: Experiment, prepared: Prepared) -> list[str]:
    """Token lengths of queries and passages, and the share that is cut."""
    samples = _samples(experiment, prepared)
    if experiment.trains_reranker():
        return _lengths_in_pairs(experiment, prepared, samples)
    tokenizer = tokenizer_of(experiment.model)
    lines = []
    for side, texts in samples.items():
        limits = {setting: limit for setting, limit in _limits(experiment).items() if side in setting}
        ids = tokenizer(texts, verbose=False)["input_ids"]
        lines.append(_length_line(PLURALS[side], [len(tokens) for tokens in ids], limits))
    return lines


def _lengths_in_pairs(experiment: Experiment, prepared: Prepared, samples: dict[str, list[str]]) -> list[str]:
    """The same of a reranker: its texts stand in pairs, which are cut by limits of their own."""
    tokenizer, data = build_tokenizer(experiment), experiment.data
    layout = pair_layout(tokenizer, experiment)
    limits = {
        "query": {"data.query_max_len and a quarter of data.passage_max_len": layout.query_max_len},
        "passage": {"data.passage_max_len and half of data.query_max_len": layout.passage_max_len},
    }

    def counted(texts: list[str]) -> NDArray[np.int64]:
        ids = tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"]
        return np.array([len(tokens) for tokens in ids], np.int64)

    lines = [_length_line(PLURALS[side], counted(texts).tolist(), limits[side]) for side, texts in samples.items()]
    pairs = [] if prepared.rows is None else _sampled_pairs(experiment, prepared.rows)
    if pairs:
        query, passage = (counted([pair[side] for pair in pairs]) for side in (0, 1))
        kept = np.minimum(query, layout.query_max_len) + np.minimum(passage, layout.passage_max_len)
        whole = kept + sum(map(len, layout.around))
        setting = f"data.query_max_len {data.query_max_len} and data.passage_max_len {data.passage_max_len} together"
        line = _length_line("pairs with what stands around their texts", whole.tolist(), {setting: layout.max_len})
        lines.append(line.replace("are cut", "lose the end of their passage"))
    return lines


def _length_line(what: str, lengths: list[int], limits: dict[str, int]) -> str:
    """Lengths of a sample in words; `limits` are by what sets them."""
    found = np.array(lengths)
    cuts = ", ".join(
        f"{100 * float((found > limit).mean()):.1f} % longer than {limit} ({setting}) are cut"
        for setting, limit in limits.items()
    )
    return (
        f"{what}: {found.mean():.0f} tokens on average, {int(np.percentile(found, 95))} at the 95th percentile; {cuts} "
        f"(of {len(found):,} sampled)"
    )


def _samples(experiment: Experiment, prepared: Prepared) -> dict[str, list[str]]:
    samples = {}
    if prepared.rows is not None and prepared.rows.num_rows:
        samples["query"] = [
            query_of_row(experiment.model, row["query"], row_type=row["type"], prompt=row["prompt"])
            for row in _sample(prepared.rows, ["query", "prompt", "type"])
        ]
    if prepared.corpus is not None and prepared.corpus.num_rows:
        rows = _sample(prepared.corpus, ["text"])
        samples["passage"] = [passage_text(experiment.model, row["text"]) for row in rows]
    return samples


def _sampled_pairs(experiment: Experiment, rows: Store) -> list[tuple[str, str]]:
    """Queries with their first positives, of rows that have some."""
    pairs = []
    for row in _sample(rows, ["query", "prompt", "type", "pos"]):
        told: dict[str, Any] = {"row_type": row["type"], "prompt": row["prompt"]}
        for text in row["pos"][:1]:
            query = query_of_row(experiment.model, row["query"], **told)
            pairs.append((query, passage_of_row(experiment.model, text, **told)))
    return pairs


def _sample(store: Store, columns: list[str]) -> list[dict[str, Any]]:
    count = min(SAMPLE, store.num_rows)
    rows = np.random.default_rng(0).choice(store.num_rows, count, replace=False)
    return list(store.take(np.sort(rows), columns).to_pylist())


def _window(config: MineConfig, rows: Store, corpus: Store) -> list[str]:
    """What mining will do that one may not expect: a window beyond the corpus, negatives of the rows replaced."""
    first, last = map(int, config.range_for_sampling.split("-"))
    lines = []
    check_window(config, corpus)
    if min(last, corpus.num_rows) - first < config.negative_number:
        filled = config.fill_up and last < corpus.num_rows  # with what ranks after the window
        lines.append(
            f"warning: mine.range_for_sampling {config.range_for_sampling} holds fewer than {config.negative_number} "
            f"of the {corpus.num_rows:,} passages: the other negatives are "
            + ("drawn at random (mine.fill_up)" if filled else "missing")
        )
    given = sum(pc.sum(pc.list_value_length(part.column("neg"))).as_py() or 0 for part in rows.iter_parts(["neg"]))
    if given:
        lines.append(
            f"warning: mine will replace {counted(given, 'negative')} that the rows bring; leave mine out to use them"
        )
    return lines


def _left_out(experiment: Experiment, rows: Store) -> list[str]:
    """Rows that fill no whole batch, where they are many."""
    plan = planned_batches(experiment, rows, read_datasets(rows, experiment))
    notes = plan.notes() if isinstance(plan, MixedPlan) else []
    if plan.rows_left_out < rows.num_rows / 20:
        return notes
    return [
        *notes,
        f"warning: {plan.rows_left_out:,} of {rows.num_rows:,} rows fill no whole batch of {plan.global_batch_size:,} "
        "queries and sit out each epoch, other ones each time; a smaller train.per_device_train_batch_size uses more",
    ]


def _missing_negatives(experiment: Experiment, rows: Store) -> list[str]:
    """Rows of retrieval with fewer negatives than the group of their dataset takes."""
    if experiment.train is None:
        return []
    datasets = read_datasets(rows, experiment)
    needed = np.array([0 if one.type in OF_OWN_KIND else one.group_size - 1 for one in datasets.items])
    given = np.concatenate(
        [pc.list_value_length(part.column("neg")).to_numpy() for part in rows.iter_parts(["neg"])] or [np.empty(0)]
    )
    wanted = np.where(datasets.dataset_of_row < 0, 0, needed[datasets.dataset_of_row])
    short = given < wanted
    if not short.any():
        return []
    sizes = " or ".join(map(str, np.unique(wanted[short]).tolist()))
    return [
        f"{int(short.sum()):,} of {rows.num_rows:,} rows have fewer than {sizes} negatives (train_group_size of their "
        "dataset - 1): theirs are used more than once in a group; rows without any are refused by train"
    ]
