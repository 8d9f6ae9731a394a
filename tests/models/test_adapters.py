"""Adapters train what they are to train, and a merged or loaded model has the vectors of the trained one."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rayembed.config.families import LoraConfig
from rayembed.models.adapters import (
    TARGETS,
    MergeError,
    add_tokens,
    check_adapter,
    check_folders,
    merge_folders,
    merged,
    save_adapter,
    with_adapter,
)
from rayembed.models.chunks import Chunk
from rayembed.models.decoders import append_eos
from tests.models.tiny_decoders import qwen_tokenizer, tiny_decoder

NEW = ["<query>", "<passage>"]
KNOWN = len(qwen_tokenizer())  # tokens before new ones
BATCH = Chunk(torch.tensor([[1, 2, KNOWN, 3], [4, KNOWN + 1, 5, 6]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]))
CONFIG = LoraConfig(lora_rank=4, lora_dropout=0.0)
TOKEN_ROWS = "embed_tokens.token_adapter.trainable_tokens_delta"


def base_with_tokens(**kind: Any) -> tuple[Any, PreTrainedTokenizerBase, list[int]]:  # noqa: ANN401
    model, tokenizer = tiny_decoder(**kind), append_eos(qwen_tokenizer())
    return model, tokenizer, add_tokens(tokenizer, model, NEW)


def trained(config: LoraConfig = CONFIG, *, seed: int = 5, **kind: Any) -> Any:  # noqa: ANN401
    """An adapter that changes vectors a lot: a new one changes none."""
    backbone, _, new = base_with_tokens(**kind)
    model = with_adapter(backbone, config, new_tokens=new)
    draw(model, seed)
    return model.eval()


def draw(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def outputs(model: Any) -> Tensor:  # noqa: ANN401
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=BATCH.ids, attention_mask=BATCH.mask)[0][BATCH.mask.bool()]
    return found


def assert_alike(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_the_mean_row_and_known_ones_are_left(tied: bool) -> None:
    for rows in (120, KNOWN + 1, KNOWN):  # with rows to spare, as in Qwen, with one too few, and without
        model, tokenizer = tiny_decoder(head="ForCausalLM", tie_word_embeddings=tied, vocab_size=rows), qwen_tokenizer()
        count = len(tokenizer)
        before = [matrix.weight.detach().clone() for matrix in (model.get_input_embeddings(), model.lm_head)]
        ids = add_tokens(tokenizer, model, [NEW[0], "<|im_end|>", *NEW])
        assert ids == tokenizer.convert_tokens_to_ids(NEW) == [count, count + 1]
        assert tokenizer.tokenize("a<passage>b") == ["a", "<passage>", "b"]
        for old, matrix in zip(before, (model.get_input_embeddings(), model.lm_head), strict=True):
            assert len(matrix.weight) == model.config.vocab_size == max(rows, count + 2)
            torch.testing.assert_close(matrix.weight[:count], old[:count], rtol=0, atol=0)
            torch.testing.assert_close(matrix.weight[ids], old[:count].mean(dim=0).expand(2, -1))
        assert add_tokens(tokenizer, model, NEW) == []
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", [{}, {"tie_word_embeddings": True}, {"head": "ForCausalLM"}])
@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma2"])
def test_one_step_changes_the_adapter_and_the_new_rows_and_nothing_else(
    architecture: str, kind: dict[str, Any]
) -> None:
    backbone, _, new = base_with_tokens(architecture=architecture, **kind)
    plain = outputs(backbone)
    embeddings = backbone.get_input_embeddings().weight.detach().clone()
    model: Any = with_adapter(backbone, CONFIG, new_tokens=new).train()
    assert_alike(outputs(model), plain)
    wanted = {name for name, _ in model.named_parameters() if ".lora_" in name or TOKEN_ROWS in name}
    assert len(wanted) == 2 * len(TARGETS) * 2 + 1  # matrices, layers; the rows
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:  # zero in a new adapter, whose lora_A then gets no gradient
            nn.init.normal_(parameter, std=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(input_ids=BATCH.ids, attention_mask=BATCH.mask)[0].square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    places = {after[name].data_ptr() for name in wanted}  # tied, the rows go by a second name too
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in after.items() if value.data_ptr() in places} >= wanted
    rows = model.get_input_embeddings().weight
    assert ((rows != embeddings).any(dim=1).nonzero()[:, 0].tolist()) == new


def test_without_new_tokens_no_embedding_is_trained() -> None:
    model = with_adapter(tiny_decoder(), CONFIG, new_tokens=[])
    assert not [name for name, _ in model.named_parameters() if "token_adapter" in name]
    assert not model.get_input_embeddings().weight.requires_grad  # type: ignore[operator, union-attr]


def test_settings_arrive() -> None:
    config = LoraConfig(
        lora_rank=3, lora_alpha=7.5, lora_dropout=0.25, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    model: Any = with_adapter(tiny_decoder(), config, new_tokens=[])
    found = model.peft_config["default"]
    assert (found.r, found.lora_alpha, found.lora_dropout) == (3, 7.5, 0.25)
    assert found.task_type == "FEATURE_EXTRACTION"
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable if ".lora_" in name} == {"q_proj"}
    assert [name for name in trainable if ".lora_" not in name] == [
        "base_model.model.embed_tokens.modules_to_save.default.weight"
    ]
    assert model.base_model.model.layers[0].self_attn.q_proj.scaling == {"default": 2.5}


def test_embeddings_that_are_saved_whole_have_no_rows_besides() -> None:
    backbone, _, new = base_with_tokens()
    config = LoraConfig(lora_rank=2, modules_to_save=["embed_tokens"])
    model = with_adapter(backbone, config, new_tokens=new)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trainable if "embed" in name] == [
        "base_model.model.embed_tokens.modules_to_save.default.weight"
    ]


@pytest.mark.parametrize(
    ("setting", "names"), [("target_modules", ["q_proj", "query"]), ("modules_to_save", ["score"])]
)
def test_names_of_no_module_are_refused_with_those_there_are(setting: str, names: list[str]) -> None:
    config = LoraConfig(**{setting: names})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"lora\.{setting}: Qwen2Model has no module named {names[-1]};.*down_proj, "):
        with_adapter(tiny_decoder(), config, new_tokens=[])


def test_an_architecture_of_other_names_is_refused_and_not_adapted_in_part() -> None:
    config = transformers.Phi3Config(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=0
    )
    with pytest.raises(ValueError, match=r"no module named q_proj, k_proj, v_proj, gate_proj, up_proj; .* qkv_proj"):
        with_adapter(transformers.Phi3Model(config), CONFIG, new_tokens=[])


@pytest.mark.parametrize("kind", [{}, {"head": "ForCausalLM", "tie_word_embeddings": True}])
def test_weights_go_into_a_model_built_anew(kind: dict[str, Any]) -> None:
    model = trained(**kind)
    fresh = trained(seed=6, **kind)
    assert (outputs(fresh) - outputs(model)).abs().max() > 0.1
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh), outputs(model))


@pytest.mark.parametrize(
    "kind",
    [{}, {"tie_word_embeddings": True}, {"head": "ForCausalLM", "tie_word_embeddings": True}, {"head": "ForCausalLM"}],
)
@pytest.mark.parametrize("architecture", ["Qwen3", "Gemma2"])
def test_a_merged_model_is_plain_and_has_the_same_vectors(architecture: str, kind: dict[str, Any]) -> None:
    model = trained(architecture=architecture, **kind)
    expected = outputs(model)
    plain = merged(model, BATCH)
    assert not isinstance(plain, peft.PeftModel)
    assert set(plain.state_dict()) == set(tiny_decoder(architecture, **kind).state_dict())
    assert_alike(outputs(plain), expected)


@pytest.mark.parametrize(("added", "change"), [(0.1, r"0\.\d+ of their length \(cosine 0\.\d+\)"), (torch.nan, "inf")])
def test_a_merge_that_changed_vectors_is_refused(monkeypatch: pytest.MonkeyPatch, added: float, change: str) -> None:
    def forgetful(model: Any, safe_merge: bool, merge: Any = peft.LoraModel.merge_and_unload) -> Any:  # noqa: ANN401
        plain = merge(model, safe_merge=safe_merge)
        with torch.no_grad():  # as if the rows of new tokens had not been written
            plain.get_input_embeddings().weight[KNOWN] += added
        return plain

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", forgetful)
    with pytest.raises(MergeError, match=f"changed vectors by up to {change}"):
        merged(trained(), BATCH)


def test_a_saved_adapter_loads_in_peft_and_goes_on_in_training(tmp_path: Path) -> None:
    model = trained()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "kept.json").write_text("{}")
    save_adapter(model, tmp_path / "adapter", base="some/base")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_base.json", "adapter_model.safetensors", "kept.json"}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/base"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith(TOKEN_ROWS) for name in tensors) == 1
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    loaded = peft.PeftModel.from_pretrained(base_with_tokens()[0], str(tmp_path / "adapter"))
    assert torch.equal(outputs(loaded), outputs(model))
    backbone, _, new = base_with_tokens()
    further = with_adapter(backbone, LoraConfig(from_peft=str(tmp_path / "adapter")), new_tokens=new)
    assert torch.equal(outputs(further), outputs(model))
    assert [name for name, parameter in further.named_parameters() if parameter.requires_grad] == [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ]


def test_further_training_must_know_the_new_tokens(tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_decoder(), CONFIG, new_tokens=[]), tmp_path, base="base")
    backbone, _, new = base_with_tokens()
    with pytest.raises(ValueError, match=rf"lora\.from_peft: .* of tokens \[\], and not of \[{KNOWN}, {KNOWN + 1}\]"):
        with_adapter(backbone, LoraConfig(from_peft=str(tmp_path)), new_tokens=new)


def test_raw_adapters_are_merged_in_order_before_the_new_one(tmp_path: Path) -> None:
    expected: Any = base_with_tokens()[0]
    for number in (1, 2):
        adapter = trained(seed=number)
        save_adapter(adapter, tmp_path / str(number), base="base")
        for name, matrix in expected.named_modules():  # the definition: W + B A alpha / rank
            if name.rpartition(".")[2] in TARGETS:
                layer = adapter.get_base_model().get_submodule(name)
                change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                matrix.weight.data += change * CONFIG.lora_alpha / CONFIG.lora_rank
        rows = adapter.get_base_model().embed_tokens.weight[KNOWN : KNOWN + 2].detach()
        expected.embed_tokens.weight.data[KNOWN : KNOWN + 2] = rows  # the last one's stay
    backbone, _, new = base_with_tokens()
    config = LoraConfig(lora_rank=4, raw_peft=[str(tmp_path / "1"), str(tmp_path / "2")])
    model: Any = with_adapter(backbone, config, new_tokens=new)
    assert_alike(outputs(model), outputs(expected))
    assert list(model.peft_config) == ["default"]
    assert not any("lora" in name and not parameter.requires_grad for name, parameter in model.named_parameters())


def test_a_merge_without_effect_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = with_adapter(tiny_decoder(), CONFIG, new_tokens=[])
    draw(adapted, 4)
    save_adapter(adapted, tmp_path / "adapter", base="base")
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", lambda model, safe_merge: model.unload())
    with pytest.raises(MergeError, match="changed vectors"):
        merge_folders(tiny_decoder(), [str(tmp_path / "adapter")])


def test_a_broken_adapter_is_not_merged(tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_decoder(), CONFIG, new_tokens=[]), tmp_path / "adapter", base="base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value + torch.nan for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="NaNs"):
        merge_folders(tiny_decoder(), [str(tmp_path / "adapter")])


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("setting", ["raw_peft", "from_peft"])
def test_an_adapter_of_another_class_is_refused_and_not_left_out(tmp_path: Path, setting: str) -> None:
    save_adapter(trained(seed=1), tmp_path, base="base")  # of an embedder
    config = LoraConfig(**{setting: [str(tmp_path)] if setting == "raw_peft" else str(tmp_path)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit Qwen2ForCausalLM"):
        with_adapter(tiny_decoder(head="ForCausalLM"), config, new_tokens=[])


def test_what_was_trained_whole_is_not_lost(tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_decoder(), CONFIG, new_tokens=[]), tmp_path, base="base")
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.score.weight": torch.ones(1, 32)}, file)
    with pytest.raises(ValueError, match=r"does not fit .*among them base_model\.model\.score\.weight"):
        merge_folders(tiny_decoder(), [str(tmp_path)])


def test_an_adapter_comes_after_those_that_its_base_had_in_it(tmp_path: Path) -> None:
    first, second = str(tmp_path / "1"), str(tmp_path / "2")
    save_adapter(trained(seed=1), Path(first), base="base")
    save_adapter(trained(seed=2), Path(second), base="base", raw_peft=[first])
    check_folders([first, second], setting="merge.adapters")
    check_folders([second], setting="lora.from_peft", before=[first])
    check_folders([first, first], setting="merge.adapters")
    for wrong in ([second], [second, first], [first, first, second]):
        with pytest.raises(ValueError, match=r"merge\.adapters: the adapter in .* was trained on a base with"):
            check_folders(wrong, setting="merge.adapters")


def test_rows_of_tokens_in_flag_embeddings_pickle_are_refused(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path, base="base")
    (tmp_path / "embedding").mkdir()
    (tmp_path / "embedding" / "emb.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"embedding/emb\.pth, a pickle"):
        check_folders([str(tmp_path)], setting="lora.raw_peft")


def test_what_no_worker_could_start_with_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path, base="base")
    with torch.device("meta"):
        model = tiny_decoder(head="ForCausalLM")
    check_adapter(LoraConfig(from_peft=str(tmp_path), raw_peft=[str(tmp_path)]), model)
    for setting, value in (("from_peft", "nowhere"), ("raw_peft", [str(tmp_path), "nowhere"])):
        with pytest.raises(FileNotFoundError, match=rf"lora\.{setting}: nowhere holds no adapter"):
            check_adapter(LoraConfig(**{setting: value}), model)  # type: ignore[arg-type]
    check_adapter(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), model)
    for setting in ("target_modules", "modules_to_save"):
        with pytest.raises(ValueError, match=rf"lora\.{setting}: Qwen2ForCausalLM has no module named query;.*lm_head"):
            check_adapter(LoraConfig(**{setting: ["query"]}), model)  # type: ignore[arg-type]
