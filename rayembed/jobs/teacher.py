"""The teacher of section score: what it is, how texts are put to it, and what its scores depend on."""

from dataclasses import asdict, replace
from typing import Any

from rayembed.config import Experiment
from rayembed.config.score import ScoreConfig
from rayembed.config.wording import counted
from rayembed.jobs.miner import with_embedder
from rayembed.jobs.vectors import PROMPTS, batching_reads
from rayembed.jobs.wording import Wording
from rayembed.models.families import FAMILIES
from rayembed.models.loading import check_length, load_config, pooling_of, teacher_kind, weights_fingerprint
from rayembed.models.pairs import PairReading
from rayembed.models.rerankers import check_pair_length, teacher_reading
from rayembed.models.settings_file import embedder_config, read_settings

SIDES = ("query", "passage")


def teacher_section(experiment: Experiment) -> ScoreConfig:
    """The section score.

    Raises:
        ValueError: there is none.
    """
    if experiment.score is None:
        raise ValueError("the experiment has no section score; add one with score.model, the teacher")
    return experiment.score


def kind_of_teacher(experiment: Experiment) -> str:
    """The kind of teacher: reranker, decoder-reranker or embedder."""
    config = teacher_section(experiment)
    if config.kind != "auto":
        return config.kind
    return teacher_kind(config.model, trust_remote_code=config.trust_remote_code)


def check_teacher(experiment: Experiment, reading: PairReading | None = None) -> None:
    """Refuses a teacher that cannot score with these settings, by its configuration alone.

    Args:
        experiment: section score.
        reading: how a reranker reads pairs. None: as section score and the model's rayembed.json say.

    Raises:
        ValueError: it has no positions for score.max_len, or more than one label.
        FileNotFoundError: there is no checkpoint under its name.
    """
    config, kind = teacher_section(experiment), kind_of_teacher(experiment)
    remote = config.trust_remote_code
    if kind == "embedder":
        check_length(config.model, passage_length(experiment), "score.max_len", trust_remote_code=remote)
        return
    name = "score.max_len" if reading is None else "data.query_max_len + data.passage_max_len"
    check_pair_length(config, kind, name, reading=reading)
    labels = load_config(config.model, trust_remote_code=remote).num_labels
    if kind == "reranker" and labels != 1:
        raise ValueError(
            f"{config.model} has {counted(labels, 'label')}, and a reranker has one score; set "
            + ("model.name_or_path" if reading is not None else "score.model")
            + " to another model"
        )


def teacher_wording(experiment: Experiment) -> Wording | None:
    """What the teacher wants before texts of training rows; None where it was not trained here.

    The pairs of such a teacher are put as training puts them, with the rows' prompts, and it reads them as they are. A
    foreign teacher knows no prompts of rows: it is told its own instruction before every text.
    """
    config, kind = teacher_section(experiment), kind_of_teacher(experiment)
    told = read_settings(config.model)
    if told is None or FAMILIES[told["family"]].reads != ("texts" if kind == "embedder" else "pairs"):
        return None
    if kind == "embedder":
        model = embedding_teacher(experiment).model
        own = {f"{side}_instruction": getattr(model, f"{side}_instruction_for_retrieval") for side in SIDES}
        own |= {f"{side}_instruction_format": getattr(model, f"{side}_instruction_format") for side in SIDES}
    else:
        reading = teacher_reading(config)
        names = [f"{side}_instruction{end}" for side in SIDES for end in ("", "_format")]
        own = {name: getattr(reading, name) for name in names}
    return Wording(**own, prompt_format=told["query_instruction_format"])


def worded_reading(reading: PairReading) -> PairReading:
    """How a reranker reads pairs that have their instructions already."""
    return replace(reading, query_instruction=None, passage_instruction=None)


def passage_length(experiment: Experiment) -> int:
    """Tokens that an embedder that teaches keeps of a passage: score.max_len, else as in its training, else 512."""
    config = teacher_section(experiment)
    told = (read_settings(config.model) or {}) if config.max_len is None else {}
    return int(told.get("passage_max_len") or config.longest())


def teacher_reads(experiment: Experiment, reading: PairReading | None = None, *, worded: bool = True) -> dict[str, Any]:
    """What a teacher's scores depend on beside the pairs, for the record of a job and the cache's name.

    Args:
        experiment: section score.
        reading: how a reranker reads pairs. None: as section score and the model's rayembed.json say.
        worded: pairs are of RowTexts with `teacher_wording`; it is not asked where `reading` is given.
    """
    config, kind = teacher_section(experiment), kind_of_teacher(experiment)
    wording = teacher_wording(experiment) if worded and reading is None else None
    reads: dict[str, Any] = {
        "kind": kind,
        "weights": weights_fingerprint(config.model),
        "max_len": passage_length(experiment),
        "dtype": experiment.encode.dtype,
        **batching_reads(experiment),
        **({} if wording is None else {"wording": asdict(wording)}),
    }
    if kind == "embedder":
        teacher = embedding_teacher(experiment)
        model, settings = teacher.model, asdict(teacher.model)
        own = {key: settings[key] for key in PROMPTS}
        family: dict[str, Any] = {} if model.family == "encoder" else {"family": [model.family, model.bidirectional]}
        if teacher.icl is not None:
            family["icl"] = asdict(teacher.icl)
        return {
            **reads,
            "query_max_len": teacher.max_len("query"),
            "pooling": pooling_of(model),
            "model": own,
            **family,
        }
    found = reading or teacher_reading(config)
    reads["max_len"] = found.max_len
    reads |= {f"{side}_instruction_for_rerank": getattr(found, f"{side}_instruction") or "" for side in SIDES}
    if found.trained is not None:
        reads["trained"] = list(found.trained)
    forms = [getattr(found, f"{side}_instruction_format") for side in SIDES]
    if forms != ["{}{}", "{}{}"]:
        reads["formats"] = forms
    return reads if kind == "reranker" else {**reads, "prompt": found.prompt}


def embedding_teacher(experiment: Experiment, *, worded: bool = False) -> Experiment:
    """The experiment with the embedder that teaches in the place of the model: its weights, pooling and prompts.

    Args:
        experiment: section score.
        worded: it reads texts that have their instructions already.
    """
    config = teacher_section(experiment)
    model = embedder_config(
        config.model,
        pooling=config.pooling,
        query_instruction=config.query_instruction_for_retrieval,
        passage_instruction=config.passage_instruction_for_retrieval,
        trust_remote_code=config.trust_remote_code,
    )
    found = with_embedder(replace(experiment, mine=None), model)
    if not worded:
        return found
    icl = found.icl
    if icl is not None:  # its examples are put here, not by RowTexts
        before = model.query_instruction_for_retrieval
        examples = [replace(one, instruct=one.instruct or before) for one in icl.examples_for_task]
        icl = replace(icl, examples_for_task=examples)
    bare = replace(model, query_instruction_for_retrieval=None, passage_instruction_for_retrieval=None)
    return replace(found, model=bare, icl=icl)
