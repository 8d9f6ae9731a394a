"""Time and memory of a job for --dry-run, from a sample of its texts."""

from collections.abc import Mapping

import numpy as np

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.data.store import Store
from rayembed.models.cost import Cost, encoding_cost, training_cost
from rayembed.models.encoding import tokenize
from rayembed.models.loading import tokenizer_of
from rayembed.tracking.progress import duration

SAMPLE = 256


def mean_tokens(experiment: Experiment, store: Store, column: str, max_len: int) -> float:
    """Tokens of a text on average, cut to `max_len`, of a sample of a store's column (texts, or lists of texts)."""
    model = experiment.model
    tokenizer = tokenizer_of(model)
    rows = np.random.default_rng(0).choice(store.num_rows, min(SAMPLE, store.num_rows), replace=False)
    values = store.take(np.sort(rows), [column]).column(column).to_pylist()
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])][: 4 * SAMPLE]
    return float(np.mean([len(ids) for ids in tokenize(tokenizer, texts, max_len)]))


def encoding(experiment: Experiment, queries: Store, query_column: str, corpus: Store) -> str:
    """Of encoding queries and a corpus."""
    tokens = queries.num_rows * mean_tokens(experiment, queries, query_column, experiment.max_len("query"))
    tokens += corpus.num_rows * mean_tokens(experiment, corpus, "text", experiment.max_len("passage"))
    device_tokens = experiment.encode.tokens_per_batch or (65536 if experiment.ray.use_gpu else 4096)
    cost = encoding_cost(
        experiment.model,
        tokens=tokens,
        dtype=experiment.encode.dtype,
        use_gpu=experiment.ray.use_gpu,
        tokens_per_batch=device_tokens,
    )
    return _words(cost)


def training(experiment: Experiment, rows: Store, batches: int) -> str:
    """Of training for a number of batches."""
    return _words(*_training_costs(experiment, rows, batches))


def training_seconds(experiment: Experiment, rows: Store, batches: int) -> float:
    """Of training for a number of batches, with as many workers as there can be."""
    return _training_costs(experiment, rows, batches)[-1].seconds


def evaluation_seconds(experiment: Experiment, texts: Mapping[str, tuple[Store, int]]) -> float:
    """Of one evaluation during training.

    Args:
        experiment: its model reads the texts.
        texts: stores by side, and how many of their texts are encoded.
    """
    tokens = sum(
        number * mean_tokens(experiment, store, "text", experiment.max_len(side))
        for side, (store, number) in texts.items()
    )
    config, use_gpu = experiment.encode, experiment.ray.use_gpu
    at_once = config.tokens_per_batch or (65536 if use_gpu else 4096)
    cost = encoding_cost(experiment.model, tokens=tokens, dtype=config.dtype, use_gpu=use_gpu, tokens_per_batch=at_once)
    return cost.seconds / experiment.ray.most_workers


def _training_costs(experiment: Experiment, rows: Store, batches: int) -> list[Cost]:
    """With the fewest workers and, where there may be more, with the most."""
    config, data = experiment.train, experiment.data
    assert config is not None
    query = mean_tokens(experiment, rows, "query", data.query_max_len)
    passage = mean_tokens(experiment, rows, "pos", data.passage_max_len)
    of_group = data.train_group_size * passage + query * (data.train_group_size if experiment.trains_reranker() else 1)
    a_batch = experiment.global_batch_size() * of_group
    stage = deepspeed_settings(experiment)["zero_optimization"]["stage"]
    costs = []
    for workers in sorted({experiment.ray.most_workers, experiment.ray.fewest_workers}):
        at_once = a_batch / workers
        if config.grad_cache:
            a_chunk = experiment.tokens_per_chunk() or (config.sub_batch_size or 1) * max(query, passage)
            at_once = min(at_once, a_chunk)
        costs.append(
            training_cost(
                experiment.model,
                tokens=batches * a_batch,
                tokens_a_worker_batch=at_once,
                bf16=config.bf16 or config.fp16,
                checkpointing=config.gradient_checkpointing,
                zero_stage=stage,
                num_workers=workers,
                use_gpu=experiment.ray.use_gpu,
                grad_cache=config.grad_cache,
            )
        )
    return costs


def _words(cost: Cost, with_most: Cost | None = None) -> str:
    """Of a cost, and of that with as many workers as there can be."""
    least = "" if with_most is None else f"{with_most.bytes_a_worker / 1e9:.1f} to "
    return (
        f"about {duration(cost.seconds)} and {least}{cost.bytes_a_worker / 1e9:.1f} GB a worker at this machine's speed"
    )
