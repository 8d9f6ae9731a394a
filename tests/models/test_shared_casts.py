"""One copy in half precision for layers that read the same rows."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, Qwen3Config, Qwen3Model

from rayembed.models.shared_casts import share_casts

MODELS = {
    "BERT": BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        add_pooling_layer=False,
    ),
    "Qwen3": Qwen3Model(
        Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=64,
        )
    ),
}
PLACES = {"BERT": 2, "Qwen3": 4}  # attention; and with a gate, feed-forward
SPARED = {"BERT": 2 * 2, "Qwen3": 2 * (2 + 1)}  # copies of the hidden states: two layers


def outputs_and_gradients(model: nn.Module, *, half: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """What comes out, the gradients, and how many bytes of bfloat16 wait for the backward pass."""
    model.zero_grad()
    held = dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.data_ptr()] = tensor
        return tensor

    ids = torch.arange(24).view(2, 12)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        out = model(input_ids=ids).last_hidden_state
    out.float().pow(2).sum().backward()  # type: ignore[no-untyped-call]
    return (
        out.detach(),
        {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None},
        sum(own.nbytes for own in held.values() if own.dtype == torch.bfloat16),
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_same_comes_out_of_fewer_copies(name: str) -> None:
    model = MODELS[name].eval()
    for module in model.modules():
        module.__dict__.get("_forward_pre_hooks", {}).clear()
    before = outputs_and_gradients(model, half=True)
    full = outputs_and_gradients(model, half=False)
    share_casts(model)
    hooked = sum(bool(module._forward_pre_hooks) for module in model.modules())
    assert hooked == PLACES[name]
    after = outputs_and_gradients(model, half=True)
    assert torch.equal(after[0], before[0]), "the same numbers were cast"
    assert before[2] - after[2] == SPARED[name] * 24 * 32 * 2
    for gradient, plain in ((after[1][key], before[1][key]) for key in before[1]):
        assert float((gradient - plain).norm()) <= 0.02 * float(plain.norm()) + 1e-6
    again = outputs_and_gradients(model, half=False)
    assert torch.equal(again[0], full[0]), "nothing is cast without autocast"
    assert all(torch.equal(again[1][key], full[1][key]) for key in full[1])


def test_attention_that_adds_its_input_keeps_it_as_it_is() -> None:
    albert = AlbertModel(
        AlbertConfig(vocab_size=50, embedding_size=16, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    )
    share_casts(albert)
    assert not any(module._forward_pre_hooks for module in albert.modules())


def test_layers_read_one_copy() -> None:
    model = MODELS["BERT"]
    read = dict[str, Tensor]()
    attention = model.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        attention.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: read.update({name: inputs[0]})
        )
    share_casts(model)
    outputs_and_gradients(model, half=True)
    assert {own.dtype for own in read.values()} == {torch.bfloat16}
    assert len({own.data_ptr() for own in read.values()}) == 1
