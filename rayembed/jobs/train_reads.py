"""What a training depends on, as its record names it: a run goes on from what was made from the same."""

import re
from dataclasses import asdict

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.train import TrainConfig
from rayembed.data.store import Store
from rayembed.jobs.dev_split import OF_EVALUATIONS, DevSplit, evaluations_read
from rayembed.jobs.folders import Reads
from rayembed.models.loading import pooling_of, weights_fingerprint

OF_BATCHES = (  # settings of section data that decide what is in a batch
    *("train_group_size", "query_max_len", "passage_max_len", "pad_to_multiple_of", "shuffle_ratio", "datasets"),
    *("same_dataset_within_batch", "mixing", "mixing_temperature", "no_duplicates_within_batch", "length_grouping"),
    "batch_size_by_length",
)


def train_section(experiment: Experiment) -> TrainConfig:
    """The section train.

    Raises:
        ValueError: there is none.
    """
    if experiment.train is None:
        raise ValueError("the experiment has no section train; add one (train: {} takes every default)")
    return experiment.train


def training_reads(experiment: Experiment, rows: Store, dev: DevSplit | None = None) -> Reads:
    """All that the weights of a training depend on."""
    config, data = train_section(experiment), asdict(experiment.data)
    saving = {"save_steps", "save_minutes", "save_total_limit", "save_best"}
    not_the_result = {*saving, *OF_EVALUATIONS, "tokens_per_chunk", "logging_steps", "deepspeed", *_OF_A_WORKER}
    return {
        "rows": rows.fingerprint,
        "weights": weights_fingerprint(experiment.model.name_or_path),
        "model": {**asdict(experiment.model), "pooling": pooling_of(experiment.model), "name_or_path": None},
        "data": {key: data[key] for key in OF_BATCHES},
        "train": {key: value for key, value in asdict(config).items() if key not in not_the_result},
        **_sections(experiment),
        **read_beside(experiment),
        **({} if dev is None else evaluations_read(experiment, dev)),
        "seed": experiment.seed,
    }


def read_beside(experiment: Experiment) -> Reads:
    """What a training reads beside rows, base model and its sections: contents of files that they name, and workers."""
    settings = deepspeed_settings(experiment)
    return {
        "deepspeed": {key: value for key, value in settings.items() if key not in _OF_A_WORKER},
        **_adapters_and_guide(experiment),
        **_of_workers(experiment),
    }


_OF_A_WORKER = {"per_device_train_batch_size", "global_batch_size", "train_micro_batch_size_per_gpu"}


def _of_workers(experiment: Experiment) -> Reads:
    """What the number of workers changes: nothing, where it leaves batches and their negatives as they are."""
    config, data = train_section(experiment), experiment.data
    found: Reads = {"global_batch_size": experiment.global_batch_size()}
    if experiment.ray.elastic:
        return found
    own_sizes = bool(data.batch_size_by_length) or any(entry.batch_size is not None for entry in data.datasets)
    half = config.per_device_train_batch_size % 2 == 1  # symmetric types have half of a worker's batch, rounded
    alone = config.no_in_batch_neg or experiment.trains_reranker()  # no query is compared with another worker's
    across = config.negatives_cross_device or alone
    if not across or (config.global_batch_size is None and (own_sizes or half)):
        found["num_workers"] = experiment.ray.most_workers
    return found


def on_other_workers(message: str) -> str:
    """What to set to go on with another number of workers, where that is what was refused."""
    size = re.search(r"^ *global_batch_size: was (\d+), is \d+", message, re.MULTILINE)
    if size is not None:
        return f". To go on with another ray.num_workers, keep the batches: set train.global_batch_size to {size[1]}"
    if re.search(r"^ *num_workers: was", message, re.MULTILINE) is not None:
        return (
            ". A run goes on with another ray.num_workers where train.negatives_cross_device is true and batch sizes "
            "are those of all workers (train.global_batch_size is set)"
        )
    return ""


def _sections(experiment: Experiment) -> Reads:
    """Sections of the family as they are in force: a default that is written out changes nothing."""
    found = {name: asdict(section) for name, section in experiment.family_sections().items()}
    if "icl" in found:
        del found["icl"]["examples_for_task"]  # of mining and evaluation
    return found


def _adapters_and_guide(experiment: Experiment) -> Reads:
    """Contents of what is read beside the model."""
    lora, guide = experiment.lora, train_section(experiment).guide_model
    folders = [*lora.raw_peft, *filter(None, [lora.from_peft])] if lora is not None else []
    found = {
        "adapters": [weights_fingerprint(folder) for folder in folders],
        "guide": guide and weights_fingerprint(guide),
    }
    return {name: value for name, value in found.items() if value}
