"""rayembed.json of a model's folder: how the model was trained to read texts, for those who use it afterwards."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.models.families import FAMILIES
from rayembed.models.loading import load_config, pooling_of, stored_json
from rayembed.models.pairs import PROMPT

FILE = "rayembed.json"


def write_settings(experiment: Experiment, folder: Path) -> None:
    """Writes the file into a folder that is there."""
    (folder / FILE).write_text(json.dumps(settings_of(experiment), indent=2, ensure_ascii=False) + "\n")


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """What the file holds: nothing of this machine, since caches are named by its contents."""
    model, data = experiment.model, experiment.data
    own = (
        {"pooling": pooling_of(model), "normalize_embeddings": model.normalize_embeddings}
        if FAMILIES[model.family].reads == "texts"
        else {}
    )
    return {
        "family": model.family,
        "query_instruction": model.query_instruction_for_retrieval,
        "query_instruction_format": model.query_instruction_format,
        "passage_instruction": model.passage_instruction_for_retrieval,
        "passage_instruction_format": model.passage_instruction_format,
        "query_max_len": data.query_max_len,
        "passage_max_len": data.passage_max_len,
        **own,
        **(OF_FAMILIES[model.family](experiment) if model.family in OF_FAMILIES else {}),
    }


OF_FAMILIES: dict[str, Callable[[Experiment], dict[str, Any]]] = {
    "decoder": lambda experiment: {"bidirectional": experiment.model.bidirectional},
    "icl": lambda experiment: {
        "bidirectional": experiment.model.bidirectional,
        "icl": asdict(experiment.family_sections()["icl"]),
    },
    "reranker-decoder": lambda experiment: {"prompt": experiment.family_sections()["reranker"].prompt or PROMPT},
}
"""What only some families have."""


def read_settings(name_or_path: str) -> dict[str, Any] | None:
    """What the file says, also of a hub id; None where there is none: the model was not trained here.

    Raises:
        ValueError: it is of a family that this version does not know.
    """
    found: dict[str, Any] | None = stored_json(name_or_path, FILE)
    if found is not None and found.get("family") not in FAMILIES:
        raise ValueError(
            f"{name_or_path}: its {FILE} says family {found.get('family')!r}; allowed: {', '.join(FAMILIES)}. Was it "
            "written by a later version of rayembed?"
        )
    return found


def embedder_config(
    name_or_path: str,
    *,
    pooling: str | None = None,
    query_instruction: str | None = None,
    passage_instruction: str | None = None,
    trust_remote_code: bool = False,
) -> ModelConfig:
    """An embedder that is used as it is: to mine, to teach, or to find passages for a reranker.

    Args:
        name_or_path: of its checkpoint.
        pooling: None: as its files say, else its family's.
        query_instruction: put before every query; empty: nothing is put. None: as its rayembed.json says, else nothing.
        passage_instruction: as query_instruction.
        trust_remote_code: run Python code that comes with it.

    Raises:
        ValueError: it is a reranker that was trained here.
        FileNotFoundError: there is no checkpoint under its name.
    """
    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    told = read_settings(name_or_path) or {}
    if told and FAMILIES[told["family"]].reads == "pairs":
        raise ValueError(f"{name_or_path} is a reranker, by its {FILE}; choose an embedder instead")
    given = {"query": query_instruction, "passage": passage_instruction}
    texts: dict[str, Any] = {}
    for side, own in given.items():
        texts[f"{side}_instruction_for_retrieval"] = told.get(f"{side}_instruction") if own is None else own
        if own is None and told:
            texts[f"{side}_instruction_format"] = told[f"{side}_instruction_format"]
    pooling = pooling or told.get("pooling")
    family: Any = told.get("family") or (
        "decoder" if is_causal(config) and _takes_last(name_or_path, pooling) else "encoder"
    )
    return ModelConfig(
        name_or_path=name_or_path,
        family="encoder" if family == "m3" else family,  # its dense vectors
        pooling=pooling,  # type: ignore[arg-type] # checked by pydantic
        normalize_embeddings=told.get("normalize_embeddings", True),
        bidirectional=told.get("bidirectional", False),
        trust_remote_code=trust_remote_code,
        **texts,
    )


def _takes_last(name_or_path: str, pooling: str | None) -> bool:
    """Whether a causal model's last token is the text's: always without sentence-transformers files.

    With such files and another pooling it is read as an encoder is, since those libraries end no text with a token.
    """
    if stored_json(name_or_path, "modules.json") is None:
        return True
    return (pooling or pooling_of(ModelConfig(name_or_path=name_or_path))) == "last_token"


def is_causal(config: Any) -> bool:  # noqa: ANN401 - one class a backbone
    """Whether tokens see only those before them, by the tables of transformers; of other models by their class's name.

    A model type that has a class with masked language modelling too (BERT) is an encoder.
    """
    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        return False
    named = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or named
