"""What can run a program when it is loaded is refused: pickles with more than tensors, and code beside a checkpoint."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from rayembed.config.model import ModelConfig
from rayembed.config.score import ScoreConfig
from rayembed.data.embeddings import read_headers
from rayembed.models.adapters import merge_folders
from rayembed.models.loading import load_config, load_embedder
from rayembed.models.m3 import SPARSE_FILE, _stored_linear
from rayembed.models.rerankers import load_reranker
from tests.conftest import write_tiny_model


class Program:
    """What a pickle of it runs: a file is made."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there when a program was run."""
    return tmp_path / "mark"


def test_the_program_of_these_tests_does_run_when_it_is_trusted(mark: Path, tmp_path: Path) -> None:
    torch.save({"x": Program(mark)}, tmp_path / "weights.bin")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert mark.exists()


@pytest.fixture
def model(mark: Path, tmp_path: Path) -> Path:
    """A checkpoint whose weights are a pickle with a program in it."""
    folder = write_tiny_model(tmp_path / "model")
    weights = dict(AutoModel.from_pretrained(folder).state_dict())
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": Program(mark)}, folder / "pytorch_model.bin")
    return folder


def test_of_a_model(model: Path, mark: Path) -> None:
    with pytest.raises(ValueError, match=rf"{model}: its weights are a pickle that holds more .*\(posix.system\)"):
        load_embedder(ModelConfig(name_or_path=str(model)))
    assert not mark.exists()


def test_of_a_teacher(tmp_path: Path, mark: Path) -> None:
    folder = write_tiny_model(tmp_path / "teacher")
    teacher = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    teacher.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({**teacher.state_dict(), "more": Program(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"{folder}: its weights are a pickle"):
        load_reranker(ScoreConfig(model=str(folder)), kind="reranker", device=torch.device("cpu"))
    assert not mark.exists()


@pytest.mark.parametrize("old", [False, True])
def test_of_a_head(old: bool, tmp_path: Path, mark: Path) -> None:
    """As torch writes them today, and as it did before version 1.6."""
    file = tmp_path / SPARSE_FILE
    torch.save({"weight": torch.zeros(1, 64), "bias": Program(mark)}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=rf"{file}: its weights are a pickle"):
        _stored_linear(file, 64)
    assert not mark.exists()


def test_of_an_adapter(tmp_path: Path, mark: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=2, target_modules=["query"])).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"more": Program(mark)}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=rf"{adapter}: its weights are a pickle"):
        merge_folders(AutoModel.from_pretrained(base), [str(adapter)])
    assert not mark.exists()


def test_of_given_vectors(tmp_path: Path, mark: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[Program(mark)]], np.object_), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_headers([str(tmp_path / "a.npy")], setting="mine.corpus_embeddings")
    assert not mark.exists()
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Program(mark)))
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_headers([str(tmp_path / "a.npy")], setting="mine.corpus_embeddings")
    assert not mark.exists()


def test_code_beside_a_checkpoint_runs_only_where_it_is_trusted(tmp_path: Path, mark: Path) -> None:
    assert not ModelConfig(name_or_path="x").trust_remote_code
    assert not ScoreConfig(model="x").trust_remote_code
    folder = tmp_path / "own"
    folder.mkdir()
    own = {"AutoConfig": "own_config.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    code = f"import os\nos.system('touch {mark}')\nfrom transformers import PretrainedConfig\n"
    (folder / "own_config.py").write_text(code + "class Own(PretrainedConfig):\n    model_type = 'own'\n")
    for load in (load_config, lambda name: load_embedder(ModelConfig(name_or_path=name))):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(str(folder))
    assert not mark.exists()
    load_config(str(folder), trust_remote_code=True)
    assert mark.exists()
