"""Which embedder mines: the model of the experiment, or mine.model with settings of its own."""

from pathlib import Path

from rayembed.config.mine import MineConfig
from rayembed.config.model import ModelConfig
from rayembed.jobs.miner import miner
from rayembed.jobs.vectors import encoding_reads
from tests.jobs.conftest import TRAIN, MakeExperiment

INSTRUCTIONS = {"query_instruction_for_retrieval": "q: ", "passage_instruction_for_retrieval": "p: "}


def test_the_model_mines_where_no_other_is_named(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    without = make_experiment(tmp_path / "run", model=INSTRUCTIONS)
    assert miner(without) is without
    unnamed = make_experiment(tmp_path / "run", model=INSTRUCTIONS, mine={"negative_number": 3})
    assert miner(unnamed) is unnamed


def test_another_miner_comes_with_its_own_pooling_and_instructions(
    make_experiment: MakeExperiment, tiny_reranker: Path, tmp_path: Path
) -> None:
    own = {"model": str(tiny_reranker), "pooling": "cls", "query_instruction_for_retrieval": "find: ", "rounds": 3}
    experiment = make_experiment(
        tmp_path / "run",
        model={**INSTRUCTIONS, "query_instruction_format": "{}\n{}", "normalize_embeddings": False, "dropout": 0.5},
        mine=own,
        train=TRAIN,
    )
    found = miner(experiment)
    assert found.model == ModelConfig(
        name_or_path=str(tiny_reranker), pooling="cls", query_instruction_for_retrieval="find: "
    )
    assert found.train is None
    assert found.mine == MineConfig(**{**own, "rounds": 1})  # type: ignore[arg-type] # settings as YAML has them
    assert (found.data, found.encode, found.cache()) == (experiment.data, experiment.encode, experiment.cache())
    reads = encoding_reads(found)
    assert reads["weights"] != encoding_reads(experiment)["weights"]
    assert reads["pooling"] == "cls"
    assert reads["model"]["query_instruction_for_retrieval"] == "find: "
    assert reads["model"]["passage_instruction_for_retrieval"] is None
