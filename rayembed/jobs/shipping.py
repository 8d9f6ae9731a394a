"""What crosses to a Ray worker: the experiment as text, without anything that depends on this process's folder."""

import json
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from rayembed.config import Experiment
from rayembed.config.deepspeed import MICRO_BATCH, deepspeed_settings
from rayembed.config.uris import without_keys_within

_EXPERIMENT = TypeAdapter(Experiment)


def shipped(experiment: Experiment) -> str:
    """The experiment as JSON; folders of models become absolute, the DeepSpeed file its content.

    Keys in URIs are left out: Ray Train shows what it ships in its dashboard, and workers open no data by it.
    """
    train, score, lora = experiment.train, experiment.score, experiment.lora
    if train is not None:
        guide = train.guide_model and absolute(train.guide_model)
        settings = {**deepspeed_settings(experiment), MICRO_BATCH: "auto"}  # workers may become more or fewer
        train = replace(train, deepspeed=settings, guide_model=guide)
    if lora is not None:
        own = lora.from_peft and absolute(lora.from_peft)
        lora = replace(lora, from_peft=own, raw_peft=[absolute(folder) for folder in lora.raw_peft])
    sent = replace(
        experiment,
        model=replace(experiment.model, name_or_path=absolute(experiment.model.name_or_path)),
        train=train,
        lora=lora,
        score=score and replace(score, model=absolute(score.model)),
    )
    return json.dumps(without_keys_within(_EXPERIMENT.dump_python(sent, mode="json")))


def received(text: str) -> Experiment:
    """What `shipped` sent."""
    return _EXPERIMENT.validate_json(text)


def absolute(name_or_path: str) -> str:
    """A local folder by its absolute path; a hub id or package:// as it is."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path
