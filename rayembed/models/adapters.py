"""Low-rank adapters of decoders: put on, saved, loaded, merged; and tokens added to the vocabulary.

Source: LoRA (arXiv:2106.09685) as peft implements it.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerBase

from rayembed.config.families import LoraConfig
from rayembed.models.chunks import Chunk
from rayembed.models.loading import weights_fingerprint
from rayembed.models.pickles import tensors_alone

CONFIG, BASE = "adapter_config.json", "adapter_base.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FLAG_TOKENS = "embedding/emb.pth"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = "default"  # peft's name of the one adapter there is
MERGE_TOLERANCE = 1e-3  # of a vector's length; float32 is off by about 1e-6, and the cosine by the square of it


class MergeError(RuntimeError):
    """A merged model gives other vectors than base and adapter did."""


def check_adapter(config: LoraConfig, backbone: nn.Module) -> None:
    """Refuses what no worker could start with; needs no GPU itself.

    Args:
        config: section lora.
        backbone: the model's architecture; weights on torch's device meta will do.

    Raises:
        FileNotFoundError: a folder holds no adapter.
        ModuleNotFoundError: bitsandbytes is not there and needed.
        ValueError: a name that no module has.
    """
    if config.load_in_4bit:
        check_bitsandbytes("lora.load_in_4bit", "false")
    check_folders(config.raw_peft, setting="lora.raw_peft")
    if config.from_peft is not None:
        check_folders([config.from_peft], setting="lora.from_peft", before=config.raw_peft)
    else:
        _, saved = _module_names(backbone, config)
        if config.load_in_4bit:
            _check_saved_in_4bit(backbone, saved)


def check_bitsandbytes(setting: str, otherwise: str) -> None:
    """Refuses a setting that needs bitsandbytes where it is not installed.

    Args:
        setting: that needs it, for the message.
        otherwise: the value of the setting that does without.

    Raises:
        ModuleNotFoundError: says what to install.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"{setting} needs the package bitsandbytes; pip install 'rayembed[qlora]', or set it to {otherwise}"
        )


def check_folders(folders: Sequence[str], *, setting: str, before: Sequence[str] = ()) -> None:
    """Refuses folders that hold nothing to merge, or not all of what was trained; reads no weights.

    Args:
        folders: of adapters, each put on the model with those before it in its weights.
        setting: that names them, for messages.
        before: further ones, which come first.

    Raises:
        FileNotFoundError: a folder holds no adapter.
        ValueError: an adapter is of a kind that has no place in a model's weights, or was trained on another base.
    """
    merged_already = list(before)
    for folder in folders:
        file = Path(folder) / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{setting}: {folder} holds no adapter (no {CONFIG})")
        if not any((Path(folder) / name).is_file() for name in WEIGHTS):
            raise FileNotFoundError(
                f"{setting}: {folder} holds no weights of an adapter (no {' and no '.join(WEIGHTS)})"
            )
        kind = json.loads(file.read_text()).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"{setting}: {folder} is of the kind {kind}; allowed: LORA, which weights can take in")
        if (Path(folder) / FLAG_TOKENS).is_file():
            raise ValueError(
                f"{setting}: {folder} has the rows of its new tokens in {FLAG_TOKENS}, a pickle of FlagEmbedding's, "
                "which is not read here; write its weight into the base's embeddings, and remove the file"
            )
        _check_base(folder, merged_already, setting)
        merged_already.append(folder)


def _check_base(folder: str, before: Sequence[str], setting: str) -> None:
    """Refuses an adapter without those that its base had in its weights."""
    file = Path(folder) / BASE
    if not file.is_file():
        return
    told = json.loads(file.read_text())
    if told["fingerprints"] and told["fingerprints"] != [weights_fingerprint(other) for other in before]:
        needed = ", then ".join(told["raw_peft"])
        raise ValueError(
            f"{setting}: the adapter in {folder} was trained on a base with {needed} merged into it, and here comes "
            f"after {', then '.join(before) or 'nothing'}; put the same before it"
        )


def add_tokens(tokenizer: PreTrainedTokenizerBase, backbone: nn.Module, tokens: Sequence[str]) -> list[int]:
    """Adds special tokens to tokenizer and model; a token that the tokenizer knows is left as it is.

    The embedding matrices grow where they have no row for a token, and never shrink. A new row is the mean of the rows
    of all tokens known before, so that every worker, and whoever puts an adapter on the base later, has the same one.

    Returns:
        Ids of the tokens that were new, for `with_adapter`.
    """
    known = tokenizer.get_vocab()
    count = len(tokenizer)
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if not new:
        return []
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in new]  # type: ignore[arg-type]  # a text gives one id
    model: Any = backbone
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
        if matrix is not None:
            with torch.no_grad():
                matrix.weight[ids] = matrix.weight[:count].float().mean(dim=0).to(matrix.weight.dtype)
    return ids


def with_adapter(backbone: nn.Module, config: LoraConfig, *, new_tokens: Sequence[int]) -> nn.Module:
    """The model with an adapter that is trained, and all its own weights frozen but the rows of new tokens.

    Adapters of `raw_peft` are merged first. With `from_peft`, the adapter is that of the folder, with its own rank,
    scale, dropout and targets.

    Args:
        backbone: of transformers; becomes a part of the returned model.
        config: section lora.
        new_tokens: ids from `add_tokens`, whose input embeddings are trained.

    Raises:
        ValueError: a name that no module has, or new tokens that `from_peft` does not train.
    """
    import peft  # seconds, which processes without adapters do without

    model: Any = merge_folders(backbone, config.raw_peft)
    if config.from_peft is not None:
        adapted = _loaded(model, config.from_peft, trainable=True)
        _check_tokens(adapted.peft_config[ADAPTER], config.from_peft, new_tokens)
        found: nn.Module = adapted
        return found
    targets, saved = _module_names(model, config)
    embeddings = _embeddings_name(model)
    rows = {embeddings: list(new_tokens)} if new_tokens and embeddings not in saved else None
    answers = model.get_output_embeddings() is not None
    settings = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM if answers else peft.TaskType.FEATURE_EXTRACTION,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft divides it by the rank: it need not be whole
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        trainable_token_indices=rows,
    )
    return peft.get_peft_model(model, settings)


def _embeddings_name(backbone: Any) -> str:  # noqa: ANN401 - of transformers
    embeddings = backbone.get_input_embeddings()
    return next(str(name).rpartition(".")[2] for name, module in backbone.named_modules() if module is embeddings)


def _module_names(backbone: nn.Module, config: LoraConfig) -> tuple[list[str], list[str]]:
    """Names of the modules that get an adapter, and of those that are trained whole."""
    return (
        _names(backbone, config.target_modules or TARGETS, "lora.target_modules"),
        _names(backbone, config.modules_to_save, "lora.modules_to_save"),
    )


def _names(backbone: nn.Module, names: Sequence[str], setting: str) -> list[str]:
    """The names, each of which at least one module ends in."""
    modules = [name for name, _ in backbone.named_modules()]
    missing = [name for name in names if not any(f".{module}".endswith(f".{name}") for module in modules)]
    if missing:
        there = {name.rpartition(".")[2] for name, module in backbone.named_modules() if _has_weight_matrix(module)}
        raise ValueError(
            f"{setting}: {type(backbone).__name__} has no module named {', '.join(missing)}; set it to names among "
            f"{', '.join(sorted(there))}"
        )
    return list(names)


def _check_saved_in_4bit(backbone: Any, names: Sequence[str]) -> None:  # noqa: ANN401 - of transformers
    """Refuses to train whole what is held in 4 bits: all linear layers but a language model's last one."""
    head = backbone.get_output_embeddings()
    for name, module in backbone.named_modules():
        saved = next((one for one in names if name.endswith(one)), None)  # peft's rule: norm is input_layernorm too
        if saved and any(isinstance(part, nn.Linear) and part is not head for part in module.modules()):
            raise ValueError(
                f"lora.modules_to_save: {saved} has linear layers, which lora.load_in_4bit holds in 4 bits, and these "
                "cannot be trained whole; put it into lora.target_modules, or set load_in_4bit to false"
            )


def _has_weight_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _check_tokens(settings: Any, folder: str, new_tokens: Sequence[int]) -> None:  # noqa: ANN401 - of peft
    rows = settings.trainable_token_indices or {}
    trained = {number for numbers in rows.values() for number in numbers} if isinstance(rows, dict) else set(rows)
    missing = sorted(set(new_tokens) - trained)
    if missing and not settings.modules_to_save:
        raise ValueError(
            f"lora.from_peft: {folder} trains the embeddings of tokens {sorted(trained)}, and not of {missing}, which "
            "model.additional_special_tokens adds; add the tokens it was trained with, or put it into lora.raw_peft"
        )


def merge_folders(backbone: nn.Module, folders: Sequence[str]) -> nn.Module:
    """The model with the adapters in its weights, one after the other; the given one is used up.

    Args:
        backbone: of transformers, with rows for all tokens that the adapters were trained with.
        folders: of adapters.

    Raises:
        ValueError: an adapter is of another architecture, so that some of it would be left out.
        MergeError: merging changed vectors.
    """
    for folder in folders:
        backbone = merged(_loaded(backbone, folder))
    return backbone


def _loaded(backbone: nn.Module, folder: str, *, trainable: bool = False) -> Any:  # noqa: ANN401 - of peft
    """The model with a saved adapter, all of whose weights found their places: peft warns, and goes on without them."""
    import peft  # seconds

    misfit = f"the adapter in {folder} does not fit {type(backbone).__name__}"
    advice = "set model.name_or_path and model.family to what it was trained on"
    try:
        with tensors_alone(folder):
            adapted: Any = peft.PeftModel.from_pretrained(backbone, folder, is_trainable=trainable)
    except KeyError as error:  # rows of tokens
        raise ValueError(f"{misfit}: {error} has no counterpart; {advice}") from error
    saved = peft.utils.load_peft_weights(folder, device="cpu")
    placed = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    there = adapted.state_dict().keys()  # a saved embedding matrix takes the place of the model's
    lost = sorted({name for name in saved if name not in placed and name not in there})
    lost += sorted({name for name in placed if "lora_" in name} - saved.keys())
    if lost:
        raise ValueError(f"{misfit}: {len(lost)} matrices have no counterpart, among them {lost[0]}; {advice}")
    return adapted


def merged(peft_model: nn.Module, batch: Chunk | None = None) -> nn.Module:
    """The model with the adapter in its weights, without peft; the given one is used up.

    Args:
        peft_model: from `with_adapter`, its base not in 4 bits.
        batch: must have the same vectors (a language model's logits) before and after. None: random tokens.

    Raises:
        MergeError: names the difference, as a share of the vector's length.
    """
    batch = _probe(peft_model) if batch is None else batch
    before = _outputs(peft_model, batch)
    model: Any = peft_model
    plain: nn.Module = model.merge_and_unload(safe_merge=True)
    _compare(before, _outputs(plain, batch))
    return plain.requires_grad_(True)


def _outputs(model: nn.Module, batch: Chunk) -> Tensor:
    """Vectors or logits [tokens, D] in float32, without dropout."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask)[0]
    model.train(training)
    return found[batch.mask.bool()].float()


def _compare(before: Tensor, after: Tensor) -> None:
    difference = ((before - after).norm(dim=1) / before.norm(dim=1).clamp(min=1e-12)).nan_to_num(nan=torch.inf)
    worst = float(difference.max())
    if worst > MERGE_TOLERANCE:
        cosine = float(torch.cosine_similarity(before, after).min())
        raise MergeError(
            f"merging the adapter changed vectors by up to {worst:.2g} of their length (cosine {cosine:.6f}), and "
            f"{MERGE_TOLERANCE} is allowed; the adapter itself is right, use it without merging"
        )


def save_adapter(peft_model: nn.Module, folder: Path, *, base: str, raw_peft: Sequence[str] = ()) -> None:
    """Writes adapter_model.safetensors, with the rows of new tokens, adapter_config.json, and what the base had in it.

    Args:
        peft_model: from `with_adapter`, with all its weights in this process.
        folder: is made if it is not there; other files in it stay.
        base: name or path of the model that the adapter is for, as whoever loads it is to find it.
        raw_peft: adapters that were merged into it before this one was trained.
    """
    model: Any = peft_model
    card = folder / "README.md"
    had_card = card.is_file()
    model.peft_config[ADAPTER].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)  # rows of new tokens, not the matrix, are the adapter's
    told = {"raw_peft": list(raw_peft), "fingerprints": [weights_fingerprint(other) for other in raw_peft]}
    (folder / BASE).write_text(json.dumps(told, indent=2) + "\n")
    if not had_card:
        card.unlink(missing_ok=True)  # peft's form with nothing filled in


def _probe(backbone: nn.Module) -> Chunk:
    """Four texts of 16 random tokens, the last tokens of the vocabulary among them, to check a merge with."""
    model: Any = backbone
    weight = model.get_input_embeddings().weight
    rows = weight.shape[0]
    ids = torch.randint(rows, (4, 16), generator=torch.Generator().manual_seed(0))
    ids[0] = torch.arange(rows - 16, rows).clamp(min=0)
    return Chunk(ids.to(weight.device), torch.ones_like(ids).to(weight.device))
