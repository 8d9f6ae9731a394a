"""A run goes on with the checkpoint of another number of workers, and ends with the weights of an unbroken one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.families import LoraConfig
from rayembed.models.loading import prepare_for_training
from rayembed.models.trained import build_model
from rayembed.training.checkpoints import FOLDER, MOMENTS, WEIGHT, Flat, Piece, Saved
from rayembed.training.engine import Engine
from tests.models.test_pickles import Program
from tests.models.tiny_decoders import qwen_tokenizer, save_decoder
from tests.training.processes import in_workers
from tests.training.test_engine import STAGES, Weights, experiment, make_engine, run, weights

KINDS = ("frozen positions", "adapter")
HALF = 2
Ended = dict[str, tuple[Weights, float, int]]
"""By kind and stage: weights, the next learning rate, and how many workers the checkpoint was of."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), qwen_tokenizer(), num_hidden_layers=2)


def made(models: dict[str, Path], kind: str, stage: int) -> tuple[Experiment, Engine]:
    settings: dict[str, Any] = {"lr_scheduler_type": "cosine", "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    setup = experiment(models[kind], dist.get_world_size(), stage, **settings)
    if kind == "adapter":
        model = replace(setup.model, family="decoder", pooling="last_token")
        setup = replace(setup, model=model, lora=LoraConfig(lora_rank=3, lora_dropout=0.0))
    torch.manual_seed(0)
    built = build_model(setup)
    prepare_for_training(
        built, family=setup.model.family, fix_position_embedding=kind != "adapter", gradient_checkpointing=False
    )
    if kind != "adapter":
        return setup, make_engine(setup, built, total_steps=2 * HALF)
    assert setup.train is not None  # under ZeRO 3 as shipped: small weights are whole on each worker
    return setup, Engine(
        built, setup.train, deepspeed_settings(setup), total_steps=2 * HALF, device=torch.device("cpu")
    )


def trained(models: dict[str, Path], folder: Path, last: int, goes_on: Path | None = None) -> Ended:
    """All kinds and stages from the start, or from others' half, to step `last`; with a checkpoint at half."""
    found = {}
    for kind in KINDS:
        for stage in STAGES:
            name = f"{kind}, ZeRO {stage}"
            setup, engine = made(models, kind, stage)
            done, workers = 0, 0
            if goes_on is not None:
                state = engine.load(goes_on / name / str(HALF))
                done, workers = state["step"], state["workers"]
            for step in range(HALF, last + 1, HALF):
                if step > done:
                    run(engine, setup, 2 * done, 2 * step)
                    done = step
                    engine.save(folder / name / str(step), {"step": done})
            found[name] = weights(engine), engine.learning_rate, workers
    return found


def first_half_and_shrunk(models: dict[str, Path], folder: Path, two: Path) -> Ended:
    trained(models, folder / "one", HALF)
    return trained(models, folder / "shrunk", 2 * HALF, two)


def whole(saved: Saved, key: str, parameters: Weights) -> Weights:
    """One of the optimiser's tensors of each parameter."""
    sizes = {name: value.numel() for name, value in parameters.items()}
    return {name: saved.cut(Flat(size, (Piece(name, 0, size, 0),)), key) for name, size in sizes.items()}


def largest(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys()
    return max((value.flatten() - second[name].flatten()).abs().max().item() for name, value in first.items())


def test_two_workers_then_one_and_one_then_two_end_as_an_unbroken_run(
    tiny_model: Path, decoder: Path, tmp_path: Path
) -> None:
    models = {"frozen positions": tiny_model, "adapter": decoder}
    unbroken = in_workers(2, trained, models, tmp_path / "two", 2 * HALF)[0]
    shrunk = in_workers(1, first_half_and_shrunk, models, tmp_path, tmp_path / "two")[0]
    grown = in_workers(2, trained, models, tmp_path / "grown", 2 * HALF, tmp_path / "one")
    assert grown[0].keys() == shrunk.keys() == unbroken.keys()
    for name, (expected, rate, _) in unbroken.items():
        for run_of, ended, workers in (("shrunk", shrunk, 2), ("grown", grown[0], 1), ("grown", grown[1], 1)):
            found = ended[name]
            assert largest(found[0], expected) < 1e-6, (name, run_of)
            assert found[1:] == (pytest.approx(rate), workers)
            if not name.endswith("ZeRO 0"):
                ends = [Saved(tmp_path / one / name / str(2 * HALF)) for one in (run_of, "two")]
                for key in (WEIGHT, *MOMENTS):
                    assert largest(*(whole(saved, key, expected) for saved in ends)) < 1e-6, (name, run_of, key)


def refusals(models: dict[str, Path], folder: Path) -> dict[str, str]:
    """What is said of each file of a checkpoint when it holds a program, by stage, on as many workers as wrote it."""
    told = {}
    for stage in STAGES:
        setup, engine = made(models, "frozen positions", stage)
        run(engine, setup, 0, HALF)
        own = folder / str(stage)
        engine.save(own, {"step": 1})
        assert engine.load(own)["step"] == 1
        for path in (own / FOLDER).glob("*.pt"):
            whole_file = path.read_bytes()
            torch.save({**torch.load(path, weights_only=False), "more": Program(folder / "mark")}, path)
            try:
                engine.load(own)
            except ValueError as error:
                told[f"{stage}: {path.name}"] = str(error)
            path.write_bytes(whole_file)
    return told


def test_deepspeed_is_not_given_a_checkpoint_with_a_program(tiny_model: Path, decoder: Path, tmp_path: Path) -> None:
    """It would run it, as it does where torch is told to trust the file."""
    (told,) = in_workers(1, refusals, {"frozen positions": tiny_model, "adapter": decoder}, tmp_path)
    assert sorted(told) == sorted(f"{path.parts[-3]}: {path.name}" for path in tmp_path.rglob("*.pt"))
    assert len(told) >= 1 + 2 + 2 + 2
    assert all("posix.system" in words for words in told.values())
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of ZeRO 1 by three workers: five values over two parameters, of which worker 1 has 2 and 1."""
    names, mapping = ("a", "b"), ([{"a": (0, 2)}], [{"a": (0, 1), "b": (1, 1)}], [{"b": (0, 1)}])
    folder = tmp_path / FOLDER
    folder.mkdir()
    torch.save({"dp_world_size": 3, "module": dict.fromkeys(names)}, folder / "mp_rank_00_model_states.pt")
    for rank, (groups, values) in enumerate(zip(mapping, ([1, 2], [3, 4], [5]), strict=True)):
        places = [
            {name: SimpleNamespace(start=start, numel=numel) for name, (start, numel) in group.items()}
            for group in groups
        ]
        moments = {key: torch.tensor([*values, 0.0]) * 10 for key in MOMENTS}
        state = {"state": {0: {"step": torch.tensor(7.0), **moments}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
        share = {
            "zero_stage": 1,
            "param_slice_mappings": places,
            "single_partition_of_fp32_groups": [torch.tensor(values, dtype=torch.float32)],
            "base_optimizer_state": state,
            "param_alignment_paddings": [[0, 0]],
        }
        torch.save({"optimizer_state_dict": share}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    with torch.serialization.safe_globals([SimpleNamespace]):
        yield tmp_path


def test_values_are_found_across_workers_and_padding_is_zero(written: Path) -> None:
    flat = Flat(6, (Piece("a", 1, 2, 0), Piece("b", 0, 2, 3)))
    assert Saved(written).cut(flat, WEIGHT).tolist() == [2, 3, 0, 4, 5, 0]
    share = Saved(written).share_of([flat, Flat(1, (Piece("b", 1, 1, 0),))], [0, 0])
    found = share["base_optimizer_state"]
    assert found["param_groups"] == [{"lr": 0.5, "params": [0, 1]}]
    assert found["state"][1]["exp_avg_sq"].tolist() == [50]
    assert [found["state"][i]["step"].item() for i in (0, 1)] == [7, 7]
    assert found["state"][0]["step"] is not found["state"][1]["step"], "each is counted up by itself"


def test_files_of_more_workers_that_were_killed_are_left_alone(written: Path) -> None:
    (written / FOLDER / "zero_pp_rank_3_mp_rank_00_optim_states.pt").write_bytes(b"half a file")
    assert len(Saved(written).shares) == 3


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_program_in_a_checkpoint_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    """In any file of those workers that count."""
    Saved(written).check_pickles()
    mark, path = tmp_path / "mark", written / FOLDER / name
    torch.save({**torch.load(path, weights_only=True), "more": Program(mark)}, path)
    with pytest.raises(ValueError, match=rf"{name}: its weights are a pickle that holds more .*posix.system"):
        Saved(written).check_pickles()
    assert not mark.exists()


def test_a_file_that_is_not_there_is_named(written: Path) -> None:
    (written / FOLDER / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(FileNotFoundError, match="written by 3 workers, and the file of worker 1 is not there"):
        Saved(written).cut(Flat(1, (Piece("a", 0, 1, 0),)), WEIGHT)


def test_a_layout_that_is_not_read_is_refused_with_the_number_of_workers(written: Path) -> None:
    path = written / FOLDER / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    saved = torch.load(path, weights_only=False)
    saved["optimizer_state_dict"]["param_alignment_paddings"] = [[3, 0]]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"parameter_alignment.*set ray\.num_workers to 3"):
        Saved(written).share_of([Flat(1, (Piece("a", 0, 1, 0),))], [0])
