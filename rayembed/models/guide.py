"""The embedder that judges which passages are false negatives, on the tokens of the model that is trained."""

from dataclasses import replace

from rayembed.config import Experiment
from rayembed.models.embedder import Embedder
from rayembed.models.loading import check_length, load_embedder, load_tokenizer, tokenizer_of


def load_guide(experiment: Experiment) -> Embedder | None:
    """The guide of train.guide_model, without gradients. None: there is none."""
    name = _name(experiment)
    if name is None:
        return None
    model = replace(experiment.model, family="encoder", dropout=None, normalize_embeddings=True)
    return load_embedder(model, name_or_path=name).requires_grad_(False)


def check_guide(experiment: Experiment) -> None:
    """Refuses a guide that cannot read what the model reads.

    Raises:
        ValueError: its tokens are others, or it has no positions for the lengths of the data.
        FileNotFoundError: there is no checkpoint under its name.
    """
    name = _name(experiment)
    if name is None:
        return
    remote = experiment.model.trust_remote_code
    own = tokenizer_of(experiment.model).get_vocab()
    theirs = load_tokenizer(name, padding_side="right", trust_remote_code=remote).get_vocab()
    if own != theirs:
        differing = sum(theirs.get(token) != number for token, number in own.items())
        raise ValueError(
            f"train.guide_model {name} reads other tokens than the model ({differing:,} of {len(own):,} differ); "
            "choose a guide with the model's tokenizer, or set it to null"
        )
    for side in ("query", "passage"):
        length = getattr(experiment.data, f"{side}_max_len")
        check_length(name, length, f"data.{side}_max_len", trust_remote_code=remote)


def _name(experiment: Experiment) -> str | None:
    return None if experiment.train is None else experiment.train.guide_model
