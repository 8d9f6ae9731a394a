"""The dev split that training evaluates on: its queries, passages and judgements, chosen before a worker starts."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayembed.config import Experiment
from rayembed.config.uris import public_name
from rayembed.config.wording import counted
from rayembed.data import beir
from rayembed.data.mirror import here
from rayembed.data.prepare import Evaluation, prepare
from rayembed.data.storage import exists, fingerprint, write_changed
from rayembed.data.store import Int64s, Store, hash_texts
from rayembed.evaluation.ranking import judged_queries
from rayembed.jobs.units import Unit
from rayembed.jobs.vectors import PROMPTS, block_rows, check_lengths
from rayembed.mining.filters import same_text
from rayembed.models.in_context import icl_section
from rayembed.models.loading import load_config, tokenizer_fingerprint, weights_fingerprint
from rayembed.training.validation import FACTS, held_bytes

VERSION = 1  # raise it when the same data and settings give other tokens
TEXTS_PER_UNIT = 8192
QUERY, PASSAGE = "query", "passage"
OF_EVALUATIONS = (  # settings of section train
    *("eval_steps", "eval_passages", "eval_queries", "metric_for_best_model", "early_stopping_patience"),
    "load_best_model_at_end",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DevSplit:
    """What is read of the dev split, and where its tokens are."""

    evaluation: Evaluation
    rows: dict[str, Int64s | None]
    """By side: rows of its store, ascending. None: all."""

    judgements: dict[str, dict[str, int]]
    """Of the queries that count."""

    words: str
    """What figures are of, for people."""

    folder: Path
    """In the cache."""

    def store(self, side: str) -> Store:
        """Texts of a side."""
        return self.evaluation.queries if side == QUERY else self.evaluation.corpus

    def num_texts(self, side: str) -> int:
        """Texts that are encoded of a side."""
        rows = self.rows[side]
        return self.store(side).num_rows if rows is None else len(rows)

    def units(self) -> Iterator[Unit]:
        """The tokenising, a unit some texts."""
        for side in (QUERY, PASSAGE):
            rows, total = self.rows[side], self.num_texts(side)
            for first in range(0, total, TEXTS_PER_UNIT):
                last = min(first + TEXTS_PER_UNIT, total)
                spec = {"side": side, "range": [first, last]}
                if rows is not None:
                    spec = {"side": side, "rows": rows[first:last].tolist()}
                which = f"{side} texts {first} to {last - 1} of the dev split"
                yield Unit(f"{first:012d}", last - first, spec, which, self.folder / side)

    def write_facts(self, experiment: Experiment) -> None:
        """Writes what workers need beside the tokens."""
        use_gpu = experiment.ray.use_gpu
        facts = {
            "judgements": self.judgements,
            "words": self.words,
            "queries": len(self.judgements),
            "passages": self.num_texts(PASSAGE),
            "corpus": self.evaluation.corpus.num_rows,
            "block_rows": {side: block_rows(side, use_gpu=use_gpu) for side in (QUERY, PASSAGE)},
        }
        write_changed(self.folder / FACTS, json.dumps(facts).encode())


def dev_split(experiment: Experiment) -> DevSplit | None:
    """What train.eval_steps asks for; None where it asks for nothing.

    Raises:
        ValueError: the split is not there, its data have errors, or it is too small for what is asked.
    """
    train, data = experiment.train, experiment.data
    if train is None or train.eval_steps is None:
        return None
    assert data.evaluation is not None
    path = beir.qrels_path(data.evaluation, data.dev_split)
    if beir.is_beir(data.evaluation) and not exists(path):
        raise ValueError(
            f"evaluations in training (train.eval_steps, and every sweep) are on {public_name(path)}, which is not "
            "there; write it, or set data.dev_split to a split of data.evaluation that has judgements"
        )
    prepared = prepare(
        replace(experiment, data=replace(data, evaluation_split=data.dev_split)), rows=False, corpus=False
    )
    prepared.report.raise_if_errors()
    evaluation = prepared.evaluation
    assert evaluation is not None
    for side in (QUERY, PASSAGE):
        check_lengths(experiment, side, experiment.max_len(side), experiment.model.name_or_path)
    judgements = _drawn_queries(experiment, evaluation)
    rows = {QUERY: _rows_of_queries(experiment, evaluation, judgements)}
    rows[PASSAGE] = _rows_of_passages(experiment, evaluation, judgements)
    found = DevSplit(evaluation, rows, judgements, "", Path())
    _check_metric(train.metric_for_best_model, found)
    folder = Path(experiment.cache()) / f"dev-{fingerprint(_depends_on(experiment, found))}"
    return replace(found, words=_words(data.dev_split, found), folder=folder)


def told_workers(experiment: Experiment, dev: DevSplit | None) -> dict[str, Any]:
    """Where workers find the split and, kept with its tokens, the figures of the base model if they are known."""
    if dev is None:
        return {"dev": None, "base": None, "base_figures": None}
    path = dev.folder / f"base-{fingerprint(_base_depends_on(experiment))}.json"
    known = json.loads(here(path).read_text()) if path.is_file() else None
    return {"dev": str(dev.folder.resolve()), "base": str(path.resolve()), "base_figures": known}


def evaluations_read(experiment: Experiment, dev: DevSplit) -> dict[str, Any]:
    """What the job's record says of the evaluations: nothing, where the model that is written is the same without."""
    train = experiment.train
    assert train is not None
    if not train.evaluations_decide:
        return {}
    return {"evaluations": {name: getattr(train, name) for name in OF_EVALUATIONS} | {"dev": dev.folder.name}}


def notes(experiment: Experiment, dev: DevSplit, rows: Store) -> list[str]:
    """What is to be known before the figures are believed."""
    asked = hash_texts(map(same_text, _texts(dev)))
    known = np.zeros(len(asked), np.bool_)
    for part in rows.iter_parts(["query"]):
        known |= np.isin(asked, hash_texts(map(same_text, part.column("query").to_pylist())))
    found = []
    if known.any():
        found.append(
            f"warning: {int(known.sum()):,} of the {len(asked):,} queries of qrels/{experiment.data.dev_split}.tsv are "
            "among the training rows too; figures on them say less of new queries"
        )
    if experiment.data.dev_split == experiment.data.evaluation_split:
        found.append(
            f"warning: data.dev_split and data.evaluation_split are both {experiment.data.dev_split!r}: what training "
            "is steered by says little of new queries; set data.dev_split to another one"
        )
    return found


def plan_in_words(experiment: Experiment, dev: DevSplit, total_steps: int) -> str:
    """For --dry-run: what is evaluated, how often, and what it holds."""
    train, model = experiment.train, experiment.model
    assert train is not None
    assert train.eval_steps is not None
    dimension = int(load_config(model.name_or_path, trust_remote_code=model.trust_remote_code).hidden_size)
    workers = experiment.ray.fewest_workers
    held = held_bytes(
        dev.num_texts(QUERY),
        dev.num_texts(PASSAGE),
        dimension=dimension,
        k=int(train.metric_for_best_model.split("@")[1]),
        workers=workers,
    )
    times = 1 + -(-total_steps // train.eval_steps)
    most = "at most " if train.early_stopping_patience is not None else ""
    often = f"evaluated {most}{counted(times, 'time')} by {train.metric_for_best_model}"
    return f"{often}, {dev.words}, with {held / 1e6:,.1f} MB a worker"


def _drawn_queries(experiment: Experiment, evaluation: Evaluation) -> dict[str, dict[str, int]]:
    """Judgements of the queries that count: those with a positive, of which some are drawn."""
    train = experiment.train
    assert train is not None
    names, most = judged_queries(evaluation.qrels), train.eval_queries
    if most is not None and most < len(names):
        by_row = [names[i] for i in np.argsort(evaluation.queries.find_ids(names))]
        drawn = np.random.default_rng([experiment.seed, 0]).choice(len(names), most, replace=False)
        chosen = {by_row[i] for i in drawn}
        names = [name for name in names if name in chosen]
    return {name: evaluation.qrels[name] for name in names}


def _rows_of_queries(
    experiment: Experiment, evaluation: Evaluation, judgements: dict[str, dict[str, int]]
) -> Int64s | None:
    assert experiment.train is not None
    if experiment.train.eval_queries is None:
        return None
    return np.sort(evaluation.queries.find_ids(list(judgements)))


def _rows_of_passages(
    experiment: Experiment, evaluation: Evaluation, judgements: dict[str, dict[str, int]]
) -> Int64s | None:
    """The judged passages and, up to train.eval_passages, others."""
    train, total = experiment.train, evaluation.corpus.num_rows
    assert train is not None
    wanted = train.eval_passages
    if wanted is None or wanted >= total:
        return None
    judged = np.unique(evaluation.corpus.find_ids([name for own in judgements.values() for name in own]))
    if len(judged) > wanted:
        raise ValueError(
            f"train.eval_passages is {wanted}, and {len(judged)} passages are judged for the {len(judgements)} queries "
            f"of qrels/{experiment.data.dev_split}.tsv; set it to at least that, or train.eval_queries to fewer"
        )
    draw = np.random.default_rng([experiment.seed, 1])
    others = np.sort(draw.choice(total - len(judged), wanted - len(judged), replace=False))
    others += np.searchsorted(judged - np.arange(len(judged)), others, side="right")  # as rows among all
    return np.sort(np.concatenate([judged, others]))


def _check_metric(metric: str, dev: DevSplit) -> None:
    k, passages = int(metric.split("@")[1]), dev.num_texts(PASSAGE)
    if k > passages:
        raise ValueError(
            f"train.metric_for_best_model is {metric}, and there are {passages} passages to rank; choose at most "
            f"@{passages}, or raise train.eval_passages"
        )


def _base_depends_on(experiment: Experiment) -> dict[str, Any]:
    """What the figures of the model before training depend on, beside its texts; adapters begin as nothing."""
    train, lora, model = experiment.train, experiment.lora, experiment.model
    assert train is not None
    folders = [*lora.raw_peft, *filter(None, [lora.from_peft])] if lora is not None else []
    sections = {name: asdict(own) for name, own in experiment.family_sections().items() if name != "lora"}
    return {
        "weights": [weights_fingerprint(folder) for folder in (model.name_or_path, *folders)],
        "model": {**asdict(model), "name_or_path": None, "dropout": None},
        "sections": sections,
        "arithmetic": [train.bf16, train.fp16, train.torch_compile, experiment.encode.tokens_per_batch],
        "deepspeed": train.deepspeed,
        "in_4bit": lora is not None and lora.load_in_4bit,
        "metric": train.metric_for_best_model,
        "new_weights": experiment.seed,
    }


def _depends_on(experiment: Experiment, dev: DevSplit) -> dict[str, Any]:
    model, icl = experiment.model, icl_section(experiment)
    return {
        "version": VERSION,
        "texts": [dev.store(side).fingerprint for side in (QUERY, PASSAGE)],
        "rows": [None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest() for rows in dev.rows.values()],
        "judgements": fingerprint(dev.judgements),
        "tokenizer": tokenizer_fingerprint(model.name_or_path),
        "new_tokens": model.additional_special_tokens,
        "model": [model.family, *(getattr(model, key) for key in PROMPTS)],
        "max_len": [experiment.max_len(side) for side in (QUERY, PASSAGE)],
        "icl": None if icl is None else [icl.icl_suffix_str, [vars(example) for example in icl.examples_for_task]],
        "use_gpu": experiment.ray.use_gpu,
    }


def _words(split: str, dev: DevSplit) -> str:
    total, number = len(judged_queries(dev.evaluation.qrels)), len(dev.judgements)
    queries = counted(total, "query") if number == total else f"{number:,} of {counted(total, 'query')}"
    corpus, passages = dev.evaluation.corpus.num_rows, dev.num_texts(PASSAGE)
    against = f"all {counted(corpus, 'passage')}"
    if passages < corpus:
        against = f"{passages:,} of {corpus:,} passages (the judged ones and others drawn: higher than on all)"
    return f"{queries} of split {split} against {against}"


def _texts(dev: DevSplit) -> list[str]:
    rows = dev.rows[QUERY]
    store = dev.store(QUERY)
    found = store.take(np.arange(store.num_rows) if rows is None else rows, ["text"])
    return [str(text) for text in found.column("text").to_pylist()]
