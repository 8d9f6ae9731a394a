"""Checkpoints hold what is trained alone, also where the frozen base is in 4 bits or tied."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.families import LoraConfig
from rayembed.models.loading import prepare_for_training
from rayembed.models.trained import build_model
from rayembed.training.engine import Engine
from tests.models.tiny_decoders import qwen_tokenizer, tiny_decoder
from tests.training.processes import in_workers
from tests.training.small_training import experiment

STEPS = 3
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 64, "vocab_size": 4000}
KINDS: dict[str, dict[str, Any]] = {  # the last one: embeddings that are frozen under two names
    "decoder": {"stages": [0, 1, 3], "tokens": ["<query>"], "lora": {}},
    "in 4 bits": {"stages": [0, 1, 2], "tokens": ["<query>"], "lora": {"load_in_4bit": True}},
    "reranker": {"stages": [2], "family": "reranker-decoder", "lora": {"modules_to_save": ["norm"]}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    qwen_tokenizer().save_pretrained(folder)
    tiny_decoder(head="ForCausalLM", tie_word_embeddings=True, **SIZES).save_pretrained(folder)
    return folder


def setup_of(base: Path, kind: str, stage: int) -> Experiment:
    settings = KINDS[kind]
    plain = experiment(base, workers=dist.get_world_size(), stage=stage, pooling="last_token", learning_rate=1e-2)
    family, tokens = settings.get("family", "decoder"), settings.get("tokens", [])
    return replace(
        plain,
        model=replace(plain.model, family=family, additional_special_tokens=tokens),
        lora=LoraConfig(lora_rank=2, **settings["lora"]),
    )


def built(setup: Experiment) -> nn.Module:
    torch.manual_seed(setup.seed)
    model = build_model(setup)
    prepare_for_training(model, family=setup.model.family, fix_position_embedding=False, gradient_checkpointing=False)
    return model


def made_engine(setup: Experiment, model: nn.Module) -> Engine:
    assert setup.train is not None
    settings = deepspeed_settings(setup)
    if settings["zero_optimization"]["stage"] == 3:  # else weights this small are kept whole on each worker
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return Engine(model, setup.train, settings, total_steps=2 * STEPS, device=torch.device("cpu"))


class Squares(nn.Module):
    """A backbone whose output, squared and summed, is the loss."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.backbone(input_ids=ids, use_cache=False)[0]
        return found.square().mean()


def steps(engine: Engine, first: int, last: int) -> None:
    for number in range(first, last):
        torch.manual_seed(10 * number + dist.get_rank())
        engine.backward(engine(torch.randint(69, (2, 5))))
        engine.step()


def digits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def saved_and_continued(base: Path, kind: str, folder: Path) -> list[tuple[int, set[str], list[str], list[str]]]:
    """For each stage: bytes of the checkpoint, names in it, weights that differ, and frozen weights that changed."""
    found = []
    for stage in KINDS[kind]["stages"]:
        setup, checkpoint = setup_of(base, kind, stage), folder / str(stage)
        before = digits(Squares(built(setup).backbone))  # type: ignore[arg-type]
        unbroken = made_engine(setup, Squares(built(setup).backbone))  # type: ignore[arg-type]
        steps(unbroken, 0, STEPS)
        unbroken.save(checkpoint, {"step": STEPS})
        steps(unbroken, STEPS, 2 * STEPS)
        other = Squares(built(setup).backbone)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)  # nothing of what is loaded may come from here
        resumed = made_engine(setup, other)
        assert resumed.load(checkpoint)["step"] == STEPS
        steps(resumed, STEPS, 2 * STEPS)
        first, second = ({name: value.clone() for name, value in one.trained()} for one in (unbroken, resumed))
        differ = [name for name in first if not torch.equal(first[name], second[name])]
        assert any(not torch.equal(value, before[name]) for name, value in first.items()), "nothing was trained"
        frozen = [n for n, p in resumed.module.named_parameters() if not p.requires_grad and p.numel() > 0]
        after = dict(resumed.module.named_parameters())
        changed = [n for n in frozen if stage < 3 and not torch.equal(after[n].data, before[n])]
        dist.barrier()
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        states = [torch.load(path, weights_only=False) for path in files if "model_states" in path.name]
        names = {name for state in states for name in state["module"]}
        found.append((sum(path.stat().st_size for path in files), names - first.keys(), differ, changed))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_an_adapter_is_small_and_a_run_goes_on_from_it_bit_for_bit(
    base: Path, tmp_path: Path, kind: str
) -> None:
    whole = (base / "model.safetensors").stat().st_size
    for worker in in_workers(2, saved_and_continued, base, kind, tmp_path):
        assert len(worker) == len(KINDS[kind]["stages"])
        for size, others, differ, changed in worker:
            assert size < whole / 2
            assert (others, differ, changed) == (set(), [], [])


def load_another(base: Path, folder: Path) -> str:
    setup = setup_of(base, "decoder", 0)
    made_engine(setup, built(setup)).save(folder, {"step": 1})
    fewer = replace(setup, lora=LoraConfig(lora_rank=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match="lacks") as error:
        made_engine(fewer, built(fewer)).load(folder)
    return str(error.value)


def test_a_checkpoint_of_other_weights_is_refused(base: Path, tmp_path: Path) -> None:
    message = in_workers(1, load_another, base, tmp_path)[0]
    assert "it lacks 1 weights ['backbone.base_model.model.embed_tokens.modules_to_save.default.weight']" in message
    assert f"has {2 * 6 * 2 + 1} others" in message  # matrices of six layers in two blocks; the new token's row
