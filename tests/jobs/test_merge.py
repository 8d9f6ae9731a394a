"""The job merge: its folder gives the vectors of base and adapters, wherever it is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from rayembed.config import Experiment
from rayembed.jobs import merge
from rayembed.jobs.folders import ChangedError
from tests.models.test_merging import save_random_adapter
from tests.models.tiny_decoders import qwen_tokenizer, save_decoder, tiny_decoder

IDS = torch.tensor([[1, 2, 63, 3], [4, 64, 5, 6]])
NEW = ["<query>", "<passage>"]
TEXTS = ["what is an adapter", "<query>a longer text than the one before it"]
Make = Callable[..., Experiment]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(base: Path, adapters: list[Path], family: str = "decoder", **model: Any) -> Experiment:  # noqa: ANN401
        return Experiment(
            output_dir=str(tmp_path / "run"),
            model={"name_or_path": str(base), "family": family, **model},  # type: ignore[arg-type]
            merge={"adapters": list(map(str, adapters))},  # type: ignore[arg-type]
        )

    return made


def outputs(model: Any) -> Tensor:  # noqa: ANN401 - of transformers or peft
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS)[0]
    return found


def with_adapters(backbone: Any, folders: list[Path]) -> Any:  # noqa: ANN401
    """All adapters at once, in force beside each other and none merged."""
    model: Any = peft.PeftModel.from_pretrained(backbone, str(folders[0]), adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(i))
    model.base_model.set_adapter([str(i) for i in range(len(folders))])
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_two_adapters_of_a_decoder(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sentence_transformers import SentenceTransformer

    base = save_decoder(tmp_path / "base", qwen_tokenizer())
    adapters = [
        save_random_adapter(tiny_decoder(), tmp_path / name, seed=seed, targets=targets)
        for name, seed, targets in (("a", 1, ["q_proj", "v_proj"]), ("b", 2, ["q_proj", "down_proj"]))
    ]
    experiment = make(base, adapters)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert merge.plan(experiment) == f"merge: {base} with {adapters[0]}, then {adapters[1]}; would be written"
    folder = merge.run(experiment)
    expected = with_adapters(AutoModel.from_pretrained(base), adapters)
    plain = AutoModel.from_pretrained(base)
    assert (outputs(expected) - outputs(plain)).abs().max() > 0.1, "the data must show what is tested"
    close(outputs(AutoModel.from_pretrained(folder)), outputs(expected))
    assert (tmp_path / "run" / "adapter").is_dir(), "what training left is not touched"
    assert not [path for path in folder.iterdir() if path.name.startswith(("adapter", "whole"))]
    found = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            last = expected(input_ids=ids).last_hidden_state[0, -1]
        close(vector, torch.nn.functional.normalize(last, dim=0))
    assert merge.plan(experiment).endswith("; is up to date")
    with pytest.raises(ChangedError, match="adapters: was"):
        merge.run(make(base, adapters[:1]))


def test_tokens_of_an_adapter_come_with_it(make: Make, tmp_path: Path) -> None:
    """Beyond the rows of the base, and without a word of them in the experiment."""
    tokenizer = qwen_tokenizer()
    rows = len(tokenizer)
    tiny_decoder(vocab_size=rows).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(NEW, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(NEW)
    model: Any = tiny_decoder(vocab_size=rows)
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids})
    adapted: Any = peft.get_peft_model(model, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    folder = merge.run(make(tmp_path / "base", [tmp_path / "adapter"]))
    found = AutoModel.from_pretrained(folder)
    assert found.config.vocab_size == rows + 2
    close(outputs(found), outputs(adapted))
    close(found.get_input_embeddings().weight[ids], adapted.get_input_embeddings()(torch.tensor(ids)).detach())
    assert AutoTokenizer.from_pretrained(folder).tokenize("<passage>a") == ["<passage>", "a"]


def test_a_decoder_that_reranks_keeps_its_answers(make: Make, tmp_path: Path) -> None:
    tiny_decoder(head="ForCausalLM").save_pretrained(tmp_path / "base")
    qwen_tokenizer().save_pretrained(tmp_path / "base")
    backbone = tiny_decoder(head="ForCausalLM")
    adapter = save_random_adapter(backbone, tmp_path / "a", seed=1, targets=["q_proj", "up_proj"])
    folder = merge.run(make(tmp_path / "base", [adapter], "reranker-decoder"))
    expected = with_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), [adapter])
    close(outputs(AutoModelForCausalLM.from_pretrained(folder)), outputs(expected))


def test_adapters_of_encoders_are_merged_too(make: Make, tmp_path: Path, tiny_model: Path) -> None:
    adapter = save_random_adapter(AutoModel.from_pretrained(tiny_model), tmp_path / "a", seed=1, targets=["query"])
    folder = merge.run(make(tiny_model, [adapter], "encoder", pooling="mean", dropout=0.0))
    found, base = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(tiny_model)
    assert found.config.hidden_dropout_prob == base.config.hidden_dropout_prob, "the checkpoint's stays its own"
    close(outputs(found), outputs(with_adapters(base, [adapter])))


def test_a_killed_run_is_begun_anew(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_decoder(tmp_path / "base", qwen_tokenizer())
    adapter = save_random_adapter(tiny_decoder(), tmp_path / "a", seed=1, targets=["q_proj"])
    experiment, own = make(base, [adapter]), merge.save_model

    def dying(model: Any, tokenizer: Any, experiment: Experiment, folder: Path) -> None:  # noqa: ANN401
        own(model, tokenizer, experiment, folder)
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(merge, "save_model", dying)
        with pytest.raises(OSError, match="disk is full"):
            merge.run(experiment)
    assert not (tmp_path / "run" / "merge").exists()
    folder = merge.run(experiment)
    assert not (folder / "whole").exists()
    assert (folder / "model.safetensors").is_file()


def test_what_cannot_be_merged_is_refused_before_weights_are_read(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_decoder(tmp_path / "base", qwen_tokenizer())
    adapter = save_random_adapter(tiny_decoder(), tmp_path / "a", seed=1, targets=["q_proj"])
    monkeypatch.setattr(merge, "build_model", lambda _: pytest.fail("weights are read"))
    whole = make(base, [adapter])
    nothing = type(whole)(**{**vars(whole), "merge": None})
    wrong = {
        r"no section merge; add one with the key adapters": nothing,
        r"merge\.adapters: .*base holds no adapter": make(base, [adapter, base]),
        r"a reranker-encoder takes no adapters": make(base, [adapter], "reranker-encoder"),
        r"no checkpoint found": make(tmp_path / "none", [adapter]),
    }
    for message, experiment in wrong.items():
        for job in (merge.run, merge.plan):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                job(experiment)
    assert not (tmp_path / "run").exists()
