"""Compiled layers give what the layers as they are give, compile once for all lengths, and train in the real loop."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from rayembed.config import Experiment
from rayembed.config.families import LoraConfig
from rayembed.config.train import TrainConfig
from rayembed.models.adapters import with_adapter
from rayembed.models.chunks import TokenBatch, pack_chunks, pad_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.loading import prepare_for_training
from rayembed.models.packable import why_not_packed
from rayembed.training import loop
from rayembed.training.compiling import check_compile, compile_layers
from tests.models.tiny_decoders import tiny_decoder
from tests.training import processes
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens
from tests.training.test_engine import trainable

Found = tuple[Tensor, Tensor, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before, and nothing left for tests after."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches(packed: bool, *, count: int = 4) -> list[TokenBatch]:
    """Of other numbers of texts, and of other lengths, each time."""
    draw = random.Random(0)
    found = []
    for number in range(count):
        texts = [[draw.randrange(5, 60) for _ in range(draw.randint(2, 8 + number))] for _ in range(3 + number)]
        found.append(pack_chunks(texts) if packed else pad_chunks(texts, pad_token=0, padding_side="right"))
    return found


def step(model: Embedder, batch: TokenBatch) -> Found:
    """Vectors without and with gradient, from the same state of dropout, and gradients."""
    torch.manual_seed(7)
    with torch.no_grad():
        first = model.embed(batch)
    torch.manual_seed(7)
    second = model.embed(batch)
    weights = torch.randn(second.shape, generator=torch.Generator().manual_seed(0))
    (second * weights).sum().backward()
    gradients = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    model.zero_grad()
    return first, second.detach(), gradients


def assert_same(compiled: Embedder, plain: Embedder, *, packed: bool) -> None:
    names, graphs = [*plain.state_dict()], list[int]()
    for batch in batches(packed):
        first, second, gradients = step(compiled, batch)
        _, expected, expected_gradients = step(plain, batch)
        torch.testing.assert_close(second, expected, atol=1e-5, rtol=0)
        assert torch.equal(first, second), "GradCache draws the same dropout in both passes"
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[-1] == graphs[1], "other lengths were compiled anew"  # once where one is by chance a head's size
    assert [*compiled.state_dict()] == names


def test_compiled_layers_read_packed_texts_of_any_length_as_before(tiny_model: Path) -> None:
    plain, compiled = trainable(tiny_model, dropout=0.1), trainable(tiny_model, dropout=0.1)
    for model in (plain, compiled):
        assert why_not_packed(model, training=True) is None
    compile_layers(compiled, TrainConfig(torch_compile=True), backend="aot_eager")
    assert_same(compiled, plain, packed=True)


def test_layers_that_are_computed_again_in_the_backward_pass(tiny_model: Path) -> None:
    plain, compiled = trainable(tiny_model, dropout=0.1), trainable(tiny_model, dropout=0.1)
    for model in (plain, compiled):
        assert why_not_packed(model, training=True) is None
    backbone: Any = compiled.backbone
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = TrainConfig(torch_compile=True, gradient_checkpointing=True)
    compile_layers(compiled, settings, backend="aot_eager")
    assert_same(compiled, plain, packed=True)


def test_padded_texts_and_adapters_of_which_all_layers_share_what_is_compiled() -> None:
    made = []
    for _ in range(2):
        adapted = with_adapter(tiny_decoder("Qwen3", num_hidden_layers=5), LoraConfig(), new_tokens=[])
        made.append(Embedder(adapted, pooling="last_token", normalize=True))
        prepare_for_training(made[-1], family="decoder", fix_position_embedding=False, gradient_checkpointing=False)
    made[0].load_state_dict(made[1].state_dict())
    compile_layers(made[0], TrainConfig(torch_compile=True), backend="eager")
    assert_same(*made, packed=False)
    assert counters["stats"]["unique_graphs"] <= 2 * 3, "no gradient, gradient, and the first layer over a frozen base"


def both_ways(setups: list[Experiment], runs: list[Run], backend: str) -> list[int]:
    """Graphs of each run."""
    graphs, loop.compile_layers = [], partial(compile_layers, backend=backend)
    for one, run in zip(setups, runs, strict=True):
        counters.clear()
        train_one(one, run)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


# With an empty cache, inductor keeps the C++ compiler busy for half a minute of an idle machine.
@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_loop_trains_with_compiled_layers_and_writes_the_same_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(processes, "SECONDS", 280.0)
    write_row_tokens(random_rows(24), tiny_model, tmp_path / "tokens")
    told: dict[str, Any] = {"grad_cache": True, "tokens_per_chunk": 64, "per_device_train_batch_size": 6}
    told["packed"] = False  # one graph a layer
    told |= {"adam_epsilon": 1e-3, "learning_rate": 1e-3}
    setups = [experiment(tiny_model, workers=1, stage=2, torch_compile=on, **told) for on in (False, True)]
    # Without dropout: what is not compiled draws its own, as `use_quick_dropout` does. Replays are tested above.
    setups = [replace(setup, model=replace(setup.model, dropout=0.0)) for setup in setups]
    runs = [Run(tmp_path / str(number), tmp_path / "tokens") for number in range(2)]
    graphs = in_workers(1, both_ways, setups, runs, backend)[0]
    assert graphs[0] == 0 < graphs[1]
    plain, compiled = runs
    assert len(compiled.losses()) == 4
    assert compiled.losses() == pytest.approx(plain.losses(), abs=1e-5)
    assert compiled.weights().keys() == plain.weights().keys()
    norms = [[line["grad_norm"] for line in run.metrics()] for run in runs]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for name, weight in compiled.weights().items():
        torch.testing.assert_close(weight, plain.weights()[name], atol=1e-5, rtol=0)


def test_without_the_setting_nothing_is_compiled() -> None:
    model = torch.nn.Linear(2, 2)  # without a backbone
    compile_layers(model, TrainConfig())
    check_compile(TrainConfig(), 3)


def test_a_model_without_layers_is_refused() -> None:
    model = Embedder(torch.nn.Linear(2, 2), pooling="cls", normalize=True)
    with pytest.raises(ValueError, match=r"train\.torch_compile: Linear has no list of layers; set it to false"):
        compile_layers(model, TrainConfig(torch_compile=True))


def test_zero_3_is_refused() -> None:
    check_compile(TrainConfig(torch_compile=True), 2)
    with pytest.raises(ValueError, match=r"train\.torch_compile needs ZeRO stage 0, 1 or 2, and .* says 3"):
        check_compile(TrainConfig(torch_compile=True), 3)


def test_a_machine_that_cannot_compile_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train = TrainConfig(torch_compile=True)
    with monkeypatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"headers of Python.*python3-dev"):
            check_compile(train, 0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    with pytest.raises(FileNotFoundError, match=r"C\+\+ compiler, and there is no no-such-compiler; .* to false"):
        check_compile(train, 0)
