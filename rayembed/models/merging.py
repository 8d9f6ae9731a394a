"""Saved adapters merged into a model for good, each checked: a merge that did nothing looks like one that worked."""

import json
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import peft
from torch import nn
from transformers import AutoTokenizer

from rayembed.config import Experiment
from rayembed.models.adapters import merged
from rayembed.models.loading import tokenizer_of

CONFIG = "adapter_config.json"
TOKENIZER = "tokenizer_config.json"


def check_adapters(folders: Sequence[str], *, setting: str) -> None:
    """Refuses folders that hold nothing to merge; reads no weights.

    Args:
        folders: of adapters.
        setting: that names them, for messages.

    Raises:
        FileNotFoundError: a folder holds no adapter.
        ValueError: an adapter is of a kind that has no place in a model's weights.
    """
    for folder in folders:
        file = Path(folder) / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{setting}: {folder} holds no adapter (no {CONFIG})")
        kind = json.loads(file.read_text()).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"{setting}: {folder} is of the kind {kind}; allowed: LORA, which weights can take in")


def tokens_of_adapters(experiment: Experiment, folders: Sequence[str]) -> list[str]:
    """Tokens that the tokenizers beside the adapters have and the model's has not, as they are to be added.

    Raises:
        ValueError: two adapters were trained with other tokens under the same number.
    """
    known = tokenizer_of(experiment.model).get_vocab()
    numbers: dict[str, int] = {}
    for folder in folders:
        if (Path(folder) / TOKENIZER).is_file():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=experiment.model.trust_remote_code)
            vocabulary = sorted(tokenizer.get_vocab().items(), key=itemgetter(1))
            new = {token: number for token, number in vocabulary if token not in known}
            both = {**numbers, **new}
            if len({*numbers.items(), *new.items()}) > len(both) or len({*both.values()}) < len(both):
                raise ValueError(
                    f"the adapter in {folder} was trained with the tokens {', '.join(new)} added, and one before it "
                    f"with {', '.join(numbers)}, under the same numbers or in another order; merge adapters of one "
                    "vocabulary"
                )
            numbers = both
    ordered = sorted(numbers, key=numbers.__getitem__)
    return list(dict.fromkeys([*ordered, *experiment.model.additional_special_tokens]))


def merge_adapters(backbone: nn.Module, folders: Sequence[str]) -> nn.Module:
    """The model with the adapters in its weights, one after the other; the given one is used up.

    Args:
        backbone: of transformers, with rows for all tokens that the adapters were trained with.
        folders: of adapters.

    Raises:
        ValueError: an adapter is of another architecture, so that some of it would be left out.
        MergeError: merging changed vectors.
    """
    for folder in folders:
        adapted = peft.PeftModel.from_pretrained(backbone, folder)
        _check_loaded(adapted, folder)
        backbone = merged(adapted)
    return backbone


def _check_loaded(adapted: Any, folder: str) -> None:  # noqa: ANN401 - of peft
    """Refuses an adapter whose matrices did not all find their modules: peft warns, and goes on without them."""
    saved = peft.utils.load_peft_weights(folder, device="cpu")
    placed = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lost = sorted({name for name in saved if "lora_" in name} ^ {name for name in placed if "lora_" in name})
    if lost:
        raise ValueError(
            f"the adapter in {folder} does not fit {type(adapted.get_base_model()).__name__}: {len(lost)} matrices "
            f"have no counterpart, among them {lost[0]}; set model.name_or_path and model.family to what it was "
            "trained on"
        )
