"""A base in 4 bits: what is rounded, that its adapter is trained, and what is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from rayembed.config.families import LoraConfig
from rayembed.config.model import ModelConfig
from rayembed.models.adapters import TARGETS, add_tokens, check_adapter, merged, save_adapter, with_adapter
from rayembed.models.chunks import Chunk
from rayembed.models.embedder import Embedder
from rayembed.models.loading import load_backbone, prepare_for_training
from tests.models.tiny_decoders import qwen_tokenizer, tiny_decoder

BATCH = Chunk(torch.tensor([[1, 2, 7, 3], [4, 8, 5, 6]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]))
CONFIG = LoraConfig(lora_rank=4, lora_dropout=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("base")
    qwen_tokenizer().save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8}  # rows of whole blocks
    tiny_decoder(head="ForCausalLM", **sizes).save_pretrained(folder)
    return ModelConfig(name_or_path=str(folder), family="decoder")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def hidden(model: Any, **inputs: Any) -> Tensor:  # noqa: ANN401
    found: Tensor = model(input_ids=BATCH.ids, attention_mask=BATCH.mask, **inputs)[0]
    return found[BATCH.mask.bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_are_rounded_to_normal_floats_in_blocks_and_nothing_else(
    base: ModelConfig, dtype: torch.dtype
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    full, rounded = (load_backbone(base, AutoModelForCausalLM, in_4bit=kind) for kind in (None, dtype))
    before = weights(full)
    normal, last = torch.distributions.Normal(0, 1), 0.9677083  # NF4: quantiles of it, the outermost -1 and 1
    below, above = (normal.icdf(torch.linspace(last, 0.5, count)) for count in (8, 9))
    levels = torch.cat([-below, above[:-1]]) / above[0]
    assert len(levels) == 16
    for name, value in rounded.named_parameters():
        if name.rpartition(".")[0].rpartition(".")[2] not in TARGETS or name.endswith("bias"):
            assert torch.equal(value, before[name]), name
            continue
        assert (value.dtype, value.requires_grad) == (torch.uint8, False)
        assert value.numel() == before[name].numel() / 2
        assert value.quant_state.nested, "scales in 8 bits"  # type: ignore[attr-defined]
        assert rounded.get_submodule(name.removesuffix(".weight")).compute_dtype == dtype
        blocks = before[name].reshape(-1, 64)
        scales = blocks.abs().amax(dim=1, keepdim=True)
        nearest = (blocks / scales).unsqueeze(-1).sub(levels).abs().argmin(dim=-1)
        found = dequantize_4bit(value.data, value.quant_state).reshape(-1, 64)  # type: ignore[attr-defined]
        torch.testing.assert_close(found.float(), levels[nearest] * scales, atol=0.02, rtol=0.02)
    with torch.no_grad():
        evaluated, kept = hidden(rounded), weights(rounded)["model.layers.0.mlp.up_proj.weight"].clone()
    assert torch.equal(hidden(rounded.train()), evaluated), "no other kernel, with other rounding, in evaluation"
    assert torch.equal(weights(rounded)["model.layers.0.mlp.up_proj.weight"], kept)
    assert evaluated.dtype == torch.float32


@pytest.mark.parametrize("in_4bit", [None, torch.float32])
def test_gradients_reach_the_adapter_through_frozen_layers_with_and_without_checkpointing(
    base: ModelConfig, in_4bit: torch.dtype | None
) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        adapted = with_adapter(load_backbone(base, AutoModel, in_4bit=in_4bit), CONFIG, new_tokens=[])
        model: Any = Embedder(adapted, pooling="last_token", normalize=True)
        prepare_for_training(
            model, family="decoder", fix_position_embedding=False, gradient_checkpointing=checkpointing
        )
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == checkpointing
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:  # zero in a new adapter, whose lora_A then gets no gradient
                nn.init.normal_(parameter, std=0.1)
        hidden(adapted, use_cache=False).square().sum().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad and p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 2 * len(TARGETS) * 2  # matrices, layers
    assert min(float(gradient.abs().max()) for gradient in plain.values()) > 0
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_an_adapter_trained_on_4_bits_goes_onto_the_base_in_full(base: ModelConfig, tmp_path: Path) -> None:
    def adapted(in_4bit: torch.dtype | None, config: LoraConfig) -> Any:  # noqa: ANN401
        backbone, tokenizer = load_backbone(base, AutoModel, in_4bit=in_4bit), qwen_tokenizer()
        return with_adapter(backbone, config, new_tokens=add_tokens(tokenizer, backbone, ["<query>"])).eval()

    trained, full = adapted(torch.float32, CONFIG), adapted(None, CONFIG)
    drawn = {name: torch.randn_like(value) for name, value in weights(trained).items() if ".lora_" in name}
    for model in (trained, full):
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert {*names} - {*drawn} == {"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"}
        model.load_state_dict(drawn, strict=False)
    save_adapter(trained, tmp_path, base=base.name_or_path)
    further = adapted(torch.float32, LoraConfig(from_peft=str(tmp_path)))
    with torch.no_grad():
        rounded, exact, again = hidden(trained), hidden(full), hidden(further)
        torch.testing.assert_close(hidden(merged(full, BATCH)), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, rounded)
    assert 0.5 < float(torch.cosine_similarity(rounded, exact).min()) < 0.99999, "rounding shows, and is small"


@pytest.mark.parametrize("name", ["q_proj", "self_attn", "layers"])
def test_what_is_held_in_4_bits_cannot_be_trained_whole(name: str) -> None:
    with torch.device("meta"):
        model = tiny_decoder(head="ForCausalLM")
    kept = ["norm", "embed_tokens", "lm_head"]
    check_adapter(LoraConfig(load_in_4bit=True, modules_to_save=kept), model)
    check_adapter(LoraConfig(modules_to_save=[name]), model)
    with pytest.raises(ValueError, match=rf"lora\.modules_to_save: {name} has linear layers"):
        check_adapter(LoraConfig(load_in_4bit=True, modules_to_save=[*kept, name]), model)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_adapter(LoraConfig(), tiny_decoder())
    with pytest.raises(ModuleNotFoundError, match=r"lora\.load_in_4bit needs .* bitsandbytes; pip install 'raye"):
        check_adapter(LoraConfig(load_in_4bit=True), tiny_decoder())


def test_adapters_cannot_be_merged_into_4_bits() -> None:
    with pytest.raises(ValueError, match=r"lora\.raw_peft cannot be merged .*the job merge"):
        LoraConfig(load_in_4bit=True, raw_peft=["some/folder"])
