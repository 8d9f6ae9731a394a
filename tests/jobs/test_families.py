"""Every family from its rows to an exported model: trained on two workers, evaluated, and loaded by other libraries."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import decoders
from transformers import AutoModel, AutoTokenizer

from rayembed.config import Experiment
from rayembed.jobs import export, run
from rayembed.models.probe import read_probe
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.toy_data import read_texts, write_rows
from tests.jobs.without_ray import do_units_here
from tests.small_models import decoder_folder

pytestmark = pytest.mark.ray
ZERO = Path(__file__).parents[2] / "configs" / "deepspeed"
SETTINGS: dict[str, dict[str, Any]] = {
    "m3": {
        "stage": 3,
        "m3": {"colbert_dim": 16, "self_distill_start_step": 3},
        "train": {"num_train_epochs": 8},
    },
    "decoder": {
        "stage": 3,
        "lora": {"lora_rank": 4, "lora_dropout": 0.0},
        "train": {"learning_rate": 1e-2, "num_train_epochs": 8},
        "model": {"additional_special_tokens": ["<query>"], "query_instruction_for_retrieval": "<query> "},
    },
    "icl": {
        "stage": 1,
        "icl": {
            "icl_suffix_str": " b",
            "examples_max_len": 128,
            "max_examples": 1,  # so small a model needs long to learn what stands behind more
            "example_passage_max_len": 4,
            "examples_for_task": [{"query": "baba didi", "response": "didi lala"}],
        },
        "train": {"learning_rate": 3e-3, "num_train_epochs": 24, "gradient_checkpointing": True},
        "model": {"query_instruction_for_retrieval": "b "},
    },
    "reranker-encoder": {
        "stage": 1,
        "train": {"learning_rate": 3e-3, "num_train_epochs": 24, "adam_epsilon": 1e-8},
        "model": {"dropout": 0.0},  # with it, a model this small learns nothing of pairs, in plain torch either
    },
    "reranker-decoder": {
        "stage": 3,
        "reranker": {"prompt": "Is B about A?"},
        "train": {"learning_rate": 3e-3, "num_train_epochs": 8},
    },
}
PAIRS = [("baba didi", "didi lala"), ("momo", "baba"), ("lala", "lala momo didi")]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tiny_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model for each family; the tokenizer of the reranker gives types, as BERT's do."""
    reranker = with_decoder(shutil.copytree(tiny_reranker, tmp_path_factory.mktemp("reranker") / "model"))
    file = reranker / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    return {
        "reranker-encoder": reranker,
        "reranker-decoder": (llama := decoder_folder(tmp_path_factory.mktemp("llama") / "model", "llama", "[CLS]")),
        "decoder": llama,
        "icl": with_decoder(shutil.copytree(llama, tmp_path_factory.mktemp("icl") / "model")),
        "m3": tiny_model,
    }


def with_decoder(folder: Path) -> Path:
    """Lets other libraries make texts of tokens and tokens of these again, as they do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def done(
    request: pytest.FixtureRequest,
    local_ray: None,
    make_experiment: MakeExperiment,
    models: dict[str, Path],
    tiny_model: Path,
    beir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Experiment:
    """The run folder of a family, after what `rayembed run` does: trained, evaluated, exported and reported."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    settings = dict(SETTINGS[family])
    rows = write_rows(beir, folder / "rows.jsonl")
    pairs = family.startswith("reranker")
    deepspeed = json.loads((ZERO / f"zero{settings.pop('stage')}.json").read_text())
    if deepspeed["zero_optimization"]["stage"] == 3:  # else weights this small are kept whole on each worker
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    temperature = {"temperature": None} if pairs else {}
    experiment = make_experiment(
        folder / "run",
        data={"train": [str(rows)], "evaluation_split": "train"},  # from 80 rows little is learned but these
        model={"name_or_path": str(models[family]), "family": family, "pooling": None, **settings.pop("model", {})},
        train={**TRAIN, "deepspeed": deepspeed, **temperature, **settings.pop("train", {})},
        evaluate={"k_values": [10], **({"retriever": str(tiny_model), "rerank_top_k": 20} if pairs else {})},
        export={"probe_texts": 8},
        ray={"num_workers": 2},
        **settings,
    )
    with pytest.MonkeyPatch.context() as patch:
        do_units_here(patch)  # that Ray does units as well is shown elsewhere
        run.run(experiment)
    return experiment


def test_it_learns(done: Experiment) -> None:
    assert (Path(done.output_dir) / "report.html").is_file()
    lines = [json.loads(line) for line in (Path(done.output_dir) / "train" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    if done.model.family != "m3":  # whose loss is of several heads
        of_chance = np.log(3 if done.trains_reranker() else 16 * 3)  # the first losses are worse
        assert np.mean(losses[-3:]) < 0.75 * of_chance
    metrics = json.loads((Path(done.output_dir) / "evaluate" / "metrics.json").read_text())
    assert metrics["tuned"]["ndcg@10"] > metrics["base"]["ndcg@10"]
    assert {line["negatives_per_query"] for line in lines} == {2 if done.trains_reranker() else 16 * 3 - 1}


def test_each_of_m3s_heads_is_evaluated(done: Experiment) -> None:
    metrics = json.loads((Path(done.output_dir) / "evaluate" / "metrics.json").read_text())
    if done.model.family != "m3":
        assert "heads" not in metrics
        return
    assert {*metrics["heads"]} == {"tuned"}, "the base model has none"
    heads = metrics["heads"]["tuned"]
    assert {*heads} == {"dense", "sparse", "colbert", "weighted_sum"}
    assert heads["dense"]["ndcg@10"] == pytest.approx(metrics["tuned"]["ndcg@10"], abs=1e-6)
    assert len({means["ndcg@10"] for means in heads.values()}) > 1


@pytest.mark.parametrize("done", ["reranker-encoder", "reranker-decoder"], indirect=True)
def test_rankings_of_a_reranker_are_its_scores_of_what_the_retriever_found(
    done: Experiment, tiny_model: Path, beir: Path
) -> None:
    out = Path(done.output_dir) / "evaluate"
    ranked = [line.split() for line in (out / "tuned.trec").read_text().splitlines()]
    first = [(query, passage, float(score)) for query, _, passage, _, score, _ in ranked if query == ranked[0][0]]
    assert len(first) == 20
    queries, passages = (read_texts(beir / f"{name}.jsonl") for name in ("queries", "corpus"))
    pairs = [(queries[query], passages[passage]) for query, passage, _ in first]
    letters = [len("".join(pair).replace(" ", "")) for pair in pairs]
    whole = [i for i, tokens in enumerate(letters) if tokens < 24 + 48 - 4]  # these are not cut
    assert len(whole) > 3
    found = [score for *_, score in first]
    np.testing.assert_allclose([found[i] for i in whole], scores(done, [pairs[i] for i in whole]), atol=2e-4)


def scores(done: Experiment, pairs: list[tuple[str, str]]) -> list[float]:
    """By transformers, pair by pair."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(done.output_dir) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if done.model.family == "reranker-encoder":
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for query, passage in pairs:
        parts = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (query, "\n", passage, "\n", "Is B about A?")
        ]
        ids = torch.tensor([[tokenizer.bos_token_id, *(token for part in parts for token in part)]])
        answer = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
        found.append(model(ids).logits[0, -1, answer].item())
    return found


@pytest.mark.parity
def test_other_libraries_give_what_was_trained(done: Experiment) -> None:
    folder, family = str(Path(done.output_dir) / "model"), done.model.family
    if done.trains_reranker():
        for theirs, expected in of_rerankers(folder, done):
            np.testing.assert_allclose(theirs, expected, atol=1e-4)
        return
    from FlagEmbedding import BGEM3FlagModel, FlagLLMModel

    pairs, trained = read_probe(Path(done.output_dir) / "train")
    texts = [text for pair in pairs for text in pair]
    if family == "m3":
        found = BGEM3FlagModel(folder, use_fp16=False, devices="cpu", colbert_dim=16).encode(texts)["dense_vecs"]
    else:
        found = FlagLLMModel(folder, use_fp16=False, devices="cpu").encode(texts)
    np.testing.assert_allclose(found, trained, atol=1e-5)


def of_rerankers(folder: str, done: Experiment) -> Iterator[tuple[Any, list[float]]]:
    """Scores by other libraries, and by transformers."""
    from FlagEmbedding import FlagLLMReranker, FlagReranker
    from sentence_transformers import CrossEncoder

    told: dict[str, Any] = {"use_fp16": False, "devices": "cpu"}
    if done.model.family == "reranker-encoder":
        expected = scores(done, PAIRS)
        yield CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Identity()).predict(PAIRS), expected
        yield FlagReranker(folder, **told).compute_score(PAIRS), expected
    else:
        theirs = FlagLLMReranker(folder, prompt="Is B about A?", **told)
        yield theirs.compute_score(PAIRS), scores(done, [(f"A: {query}", f"B: {passage}") for query, passage in PAIRS])


@pytest.mark.parity
@pytest.mark.parametrize("done", ["icl"], indirect=True)
def test_the_card_of_an_icl_model_gives_the_queries_that_were_evaluated(done: Experiment, beir: Path) -> None:
    folder = Path(done.output_dir)
    assert done.icl is not None
    without = replace(done, icl=replace(done.icl, examples_for_task=[]))
    assert "examples_for_task=None," in export.card(without, folder, ""), "its class reads [] as an empty example"
    snippet = (folder / "model" / "README.md").read_text().split("```python\n")[2].split("queries = ")[0]
    told = snippet.replace("PATH_OF_THIS_FOLDER", str(folder / "model")).replace(
        "\n)", '\n    use_fp16=False, devices="cpu")'
    )
    names: dict[str, Any] = {}
    exec(told, names)
    model = names["model"]
    counted = sum(len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("<s>", "</s>"))
    length = 24 - 2 + counted  # it takes its special tokens for <s> and </s>, which this tokenizer has not
    queries, passages = (read_texts(beir / f"{name}.jsonl") for name in ("queries", "corpus"))
    ranked = [line.split() for line in (folder / "evaluate" / "tuned.trec").read_text().splitlines()]
    found = [(query, passage, float(score)) for query, _, passage, _, score, _ in ranked[:10]]
    theirs = model.encode_corpus([passages[passage] for _, passage, _ in found])
    own = model.encode_queries([queries[query] for query, *_ in found], max_length=length)
    np.testing.assert_allclose((own * theirs).sum(axis=1), [score for *_, score in found], atol=1e-4)


@pytest.mark.parametrize("done", ["decoder"], indirect=True)
def test_new_tokens_are_read_in_training_and_learned(done: Experiment, models: dict[str, Path]) -> None:
    folder = Path(done.output_dir) / "model"
    (token,) = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(done.model.additional_special_tokens)
    trained = AutoModel.from_pretrained(folder).get_input_embeddings().weight[token]
    before = AutoModel.from_pretrained(models[done.model.family]).get_input_embeddings().weight.mean(dim=0)
    assert (trained - before).abs().max() > 1e-3, "the row is where it began"
