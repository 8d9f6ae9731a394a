"""The vocabulary that saved adapters were trained with, for a model that they are merged into."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rayembed.config import Experiment
from rayembed.models.loading import tokenizer_of

TOKENIZER = "tokenizer_config.json"


def tokens_of_adapters(experiment: Experiment, folders: Sequence[str]) -> list[str]:
    """Tokens that the tokenizers beside the adapters have and the model's has not, as they are to be added.

    Raises:
        ValueError: two adapters were trained with other tokens under the same number, or one has no rows for its own.
    """
    known = tokenizer_of(experiment.model).get_vocab()
    numbers: dict[str, int] = {}
    for folder in folders:
        if (Path(folder) / TOKENIZER).is_file():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=experiment.model.trust_remote_code)
            vocabulary = sorted(tokenizer.get_vocab().items(), key=itemgetter(1))
            new = {token: number for token, number in vocabulary if token not in known}
            _check_rows(folder, new)
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


def _check_rows(folder: str, new: Mapping[str, int]) -> None:
    """Refuses an adapter whose new tokens were read in training, and whose rows it does not bring."""
    if not new:
        return
    import peft  # seconds

    saved = peft.utils.load_peft_weights(folder, device="cpu")
    if all("lora_" in name for name in saved):
        raise ValueError(
            f"the tokenizer in {folder} has the tokens {', '.join(new)}, which the model has not, and the adapter has "
            "no rows for them: they would be read as something else than in training; merge the adapter into the model "
            "that it was trained on, with its rows"
        )
