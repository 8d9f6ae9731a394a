"""Rounds of mining and training: each mines with the model that the round before it trained, and trains that on.

The teacher of section score stays the same, so that what a stronger miner finds is filtered as before (ANCE, arXiv
2007.00808, mines anew from the model in training; RocketQA, arXiv 2010.08191, denoises by a fixed cross-encoder).
"""

from dataclasses import dataclass, replace
from pathlib import Path

from rayembed.config import Experiment

FOLDER = "rounds"


@dataclass(frozen=True)
class Round:
    """One round as experiments of their own."""

    number: int
    """Counted from 1."""

    trains: Experiment
    """For the jobs mine, score and train: the model is that of the round before."""

    compares: Experiment
    """For the jobs evaluate and export: the model is the one that the first round began with."""


def rounds_of(experiment: Experiment) -> list[Round]:
    """All rounds; the last one's run folder is OUTPUT_DIR, those of the others are in OUTPUT_DIR/rounds/.

    Raises:
        ValueError: the experiment has no section mine.
    """
    if experiment.mine is None:
        raise ValueError("rounds are of the section mine, and the experiment has none; add one")
    out, count = Path(experiment.output_dir), experiment.mine.rounds
    base, found, mine = experiment.model, list[Round](), replace(experiment.mine, rounds=1)
    for number in range(1, count + 1):
        folder = out if number == count else out / FOLDER / str(number)
        before = out / FOLDER / str(number - 1) / "model"
        compares = replace(
            experiment,
            output_dir=str(folder),
            cache_dir=experiment.cache(),
            mine=mine,
            harvest=None,
            export=experiment.export if number == count else None,
        )
        model = base if number == 1 else replace(base, name_or_path=str(before))
        lora = experiment.lora
        if lora is not None and number > 1:  # the model of the round before has these adapters in it
            lora = replace(lora, raw_peft=[], from_peft=None)
        found.append(Round(number, replace(compares, model=model, lora=lora), compares))
        mine = replace(
            mine,
            model=None,
            pooling=None,
            query_instruction_for_retrieval=None,
            passage_instruction_for_retrieval=None,
        )
    return found
