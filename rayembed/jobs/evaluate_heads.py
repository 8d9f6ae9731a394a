"""What each of BGE-M3's representations is worth: the dense ranking's best passages, ordered by each of them."""

from collections.abc import Mapping, Sequence

import numpy as np

from rayembed.config import Experiment
from rayembed.config.families import M3Config
from rayembed.config.jobs import EvaluateConfig
from rayembed.data.prepare import Evaluation
from rayembed.evaluation.ranking import evaluate_rankings
from rayembed.jobs.m3_scores import head_scores
from rayembed.models.m3 import has_m3_heads

WEIGHTED = "weighted_sum"


def heads_of(experiment: Experiment, model: str) -> bool:
    """Whether a model has all heads; a base model without them would be judged by heads that are drawn at random."""
    m3: M3Config | None = experiment.family_sections().get("m3")
    unified = m3 is not None and m3.unified_finetuning
    return unified and has_m3_heads(model)


def evaluate_heads(
    experiment: Experiment,
    config: EvaluateConfig,
    evaluation: Evaluation,
    rankings: Mapping[str, Sequence[tuple[str, float]]],
    model: str,
    cut_offs: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Means of the ranking metrics by dense, sparse, colbert and their weighted sum (as in training: 1, w, 1).

    All of them order the same passages, the evaluate.rerank_top_k best by the dense vectors.
    """
    queries = [str(i) for table in evaluation.queries.iter_parts(["id"]) for i in table.column("id").to_pylist()]
    found = [[name for name, _ in rankings[query][: config.rerank_top_k]] for query in queries]
    candidates = [evaluation.corpus.find_ids(names) for names in found]
    scores = head_scores(experiment, model, evaluation.queries, evaluation.corpus, candidates)
    weight = experiment.family_sections()["m3"].sparse_score_weight
    means = {}
    for head in (*scores[0], WEIGHTED):
        ranked = {}
        for query, names, own in zip(queries, found, scores, strict=True):
            values = own["dense"] + weight * own["sparse"] + own["colbert"] if head == WEIGHTED else own[head]
            ranked[query] = [names[place] for place in np.argsort(-values, kind="stable")]
        means[head], _ = evaluate_rankings(ranked, evaluation.qrels, list(cut_offs))
    return means
