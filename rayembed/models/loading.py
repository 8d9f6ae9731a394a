"""Names and folders to models and tokenizers; nothing is downloaded when the weights are at hand."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from rayembed.config.model import ModelConfig
from rayembed.models.decoders import append_eos, set_bidirectional, takes_positions
from rayembed.models.embedder import Embedder
from rayembed.models.families import FAMILIES
from rayembed.models.packing import first_position
from rayembed.models.pickles import tensors_alone

logger = logging.getLogger(__name__)
PACKAGE = "package://"
POOLING_FLAGS = {  # of 1_Pooling/config.json
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last_token": "pooling_mode_lasttoken",
}


def resolve(name_or_path: str) -> str:
    """A local folder for package://installed_package/folder; any other name as it is.

    Raises:
        FileNotFoundError: the package or the folder in it is not there.
    """
    if not name_or_path.startswith(PACKAGE):
        return name_or_path
    package, _, rest = name_or_path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{name_or_path}: no package {package!r} is installed; pip install it (here it goes by the name that "
            "Python imports, with _ and not -), or give a path"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / rest
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name_or_path}: {folder} holds no config.json")
    return str(folder)


def load_config(name_or_path: str, *, trust_remote_code: bool = False) -> Any:  # noqa: ANN401 - one class a backbone
    """The checkpoint's configuration.

    Raises:
        FileNotFoundError: no checkpoint is found under the name.
    """
    folder = resolve(name_or_path)
    try:
        if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json")
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"model {name_or_path!r}: no checkpoint found; give a hub id, a folder with config.json, or package://...: "
            f"{error}"
        ) from error


def teacher_kind(name_or_path: str, *, trust_remote_code: bool = False) -> str:
    """What scores of a checkpoint are: reranker, decoder-reranker or embedder, by the class that its config names.

    A decoder with sentence-transformers files (modules.json) is an embedder.
    """
    names = load_config(name_or_path, trust_remote_code=trust_remote_code).architectures or ()
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "reranker"
    decoder = any(name.endswith("ForCausalLM") for name in names)
    return "decoder-reranker" if decoder and stored_json(name_or_path, "modules.json") is None else "embedder"


def pooling_of(config: ModelConfig) -> str:
    """The pooling in force: the experiment's, else the checkpoint's sentence-transformers files', else the family's."""
    family = FAMILIES[config.family]
    stored = _stored_pooling(config.name_or_path) if config.pooling is None and family.reads == "texts" else None
    return config.pooling or stored or family.pooling


def _stored_pooling(name_or_path: str) -> str | None:
    """What the checkpoint's sentence-transformers files say, also of a hub id; None where it has none.

    Raises:
        ValueError: they ask for what cannot be done here: another pooling, or further modules.
    """
    modules = stored_json(name_or_path, "modules.json")
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules or ()]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ValueError(
            f"{name_or_path}: its modules.json lists {', '.join(unknown)}, which would be left out; set model.pooling "
            "to use its backbone alone"
        )
    stored = stored_json(name_or_path, "1_Pooling/config.json")
    if stored is None:
        return None
    if stored.get("pooling_mode") in ("cls", "mean", "lasttoken"):  # sentence-transformers 6 writes one word
        return str(stored["pooling_mode"]).replace("lasttoken", "last_token")
    found = next((name for name, flag in POOLING_FLAGS.items() if stored.get(flag)), None)
    if found is None:
        raise ValueError(
            f"{name_or_path}: its 1_Pooling/config.json asks for a pooling unknown here; set model.pooling"
        )
    return found


def stored_json(name_or_path: str, file: str) -> Any:  # noqa: ANN401 - JSON
    """A JSON file of the checkpoint, local or on the hub; None where there is none."""
    path = _hub_file(resolve(name_or_path), file)
    return None if path is None else json.loads(path.read_text())


def _hub_file(name_or_path: str, file: str) -> Path | None:
    path = cached_file(
        name_or_path,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if path is None else Path(path)


def check_length(name_or_path: str, length: int, setting: str, *, trust_remote_code: bool = False) -> None:
    """Refuses a length that the model has no positions for.

    Raises:
        ValueError: names the setting and the longest text that the model can read.
    """
    settings = load_config(name_or_path, trust_remote_code=trust_remote_code)
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is None:
        return
    positions -= first_position(settings)
    if length > positions:
        raise ValueError(
            f"{setting} is {length}, but {name_or_path} reads texts of at most {positions} tokens; lower it"
        )


def load_tokenizer(
    name_or_path: str,
    *,
    padding_side: str,
    trust_remote_code: bool = False,
    causal: bool = False,
    ends_texts: bool = False,
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Args:
        name_or_path: of the checkpoint.
        padding_side: left or right.
        trust_remote_code: run Python code that comes with it.
        causal: of a decoder: one without a padding token pads with the unknown or the eos token (FlagEmbedding's rule).
        ends_texts: make it put a token after every text, whose vector is the text's.

    Raises:
        ValueError: it has no padding token.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        resolve(name_or_path), padding_side=padding_side, trust_remote_code=trust_remote_code
    )
    if ends_texts:
        append_eos(tokenizer)
    if causal and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name_or_path} has no padding token")
    return tokenizer


def tokenizer_of(config: ModelConfig, *, name_or_path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the experiment's model, or of another of its family."""
    family = FAMILIES[config.family]
    return load_tokenizer(
        name_or_path or config.name_or_path,
        padding_side=family.padding_side,
        trust_remote_code=config.trust_remote_code,
        causal=family.causal,
        ends_texts=family.causal and family.reads == "texts",
    )


def load_embedder(config: ModelConfig, *, name_or_path: str | None = None) -> Embedder:
    """The model with float32 weights, in evaluation mode.

    Args:
        config: the experiment's model.
        name_or_path: weights in place of the experiment's (a miner, a teacher, the tuned model), with its own pooling
            where its folder names one. None: the experiment's.
    """
    backbone = load_backbone(config, AutoModel, name_or_path=name_or_path)
    pooling = pooling_of(config) if name_or_path is None else _stored_pooling(name_or_path) or pooling_of(config)
    return as_embedder(config, backbone, pooling=pooling)


def as_embedder(config: ModelConfig, backbone: nn.Module, *, pooling: str) -> Embedder:
    """A backbone as an embedder of the experiment's family, in evaluation mode."""
    family = FAMILIES[config.family]
    if config.bidirectional:
        set_bidirectional(backbone)
    told = family.causal and takes_positions(backbone)
    return Embedder(backbone, pooling=pooling, normalize=config.normalize_embeddings, told_positions=told).eval()


def load_backbone(
    config: ModelConfig,
    auto_class: Any,  # noqa: ANN401 - transformers' Auto classes have no class in common
    *,
    name_or_path: str | None = None,
    settings: Mapping[str, Any] | None = None,
    in_4bit: torch.dtype | None = None,
) -> nn.Module:
    """A model of transformers with float32 weights, the experiment's dropout, and `settings` in its configuration.

    Args:
        config: the experiment's model.
        auto_class: of transformers.
        name_or_path: weights in place of the experiment's. None: the experiment's.
        settings: what the configuration says in place of its own. None: nothing.
        in_4bit: hold the weights of linear layers in 4 bits (NF4, their scales in 8 bits), frozen, and compute with
            them in this type; a language model's last layer stays as it is. None: all in float32.
            Source: QLoRA (arXiv:2305.14314), by bitsandbytes.
    """
    name = name_or_path or config.name_or_path
    found = load_config(name, trust_remote_code=config.trust_remote_code)
    dropout = dict.fromkeys(dropout_keys(found), config.dropout) if config.dropout is not None else {}
    for key, value in {**dropout, **(settings or {})}.items():
        setattr(found, key, value)
    how: dict[str, Any] = {}
    if in_4bit is not None:
        how["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call] # transformers types it not
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=in_4bit,
        )
    backbone: nn.Module
    with _without_load_report(), tensors_alone(name):
        backbone, told = auto_class.from_pretrained(
            resolve(name),
            config=found,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **how,
        )
    _tell_of_new_weights(name, tuple(sorted(key for key in told["missing_keys"] if "pooler." not in key)))
    module: Any
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else a forward pass in evaluation mode on such a CPU rewrites the weights for a kernel that computes in
            # bfloat16 and gives no gradient, and training goes on with that.
            module.support_avx512bf16_for_cpu = False
    return backbone


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from writing a table of weights that are not there, at the end of training too."""
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_no_load_report)
    try:
        yield
    finally:
        log.removeFilter(_no_load_report)


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


@cache  # once a process: the model is built again at the end of training
def _tell_of_new_weights(name: str, missing: tuple[str, ...]) -> None:
    if missing:
        logger.info("%s has no %s: drawn anew", name, ", ".join(missing))


def architecture(config: ModelConfig) -> nn.Module:
    """The experiment's model without its weights, which are on torch's device meta: what it is made of."""
    found = load_config(config.name_or_path, trust_remote_code=config.trust_remote_code)
    auto_class: Any = getattr(transformers, FAMILIES[config.family].backbone)
    with torch.device("meta"):
        backbone: nn.Module = auto_class.from_config(found, trust_remote_code=config.trust_remote_code)
    return backbone


def dropout_keys(settings: PretrainedConfig) -> list[str]:
    """Names of the dropout probabilities in a checkpoint's configuration."""
    return [
        key
        for key, value in settings.to_dict().items()
        if ("dropout" in key or key.endswith("_pdrop"))  # GPT-2's word for it
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ]


def prepare_for_training(
    model: nn.Module,
    *,
    family: str,
    fix_position_embedding: bool,
    gradient_checkpointing: bool,
    fix_encoder: bool = False,
) -> None:
    """Freezes what gets no gradient (the pooler head; on wish position embeddings, or the encoder); checkpointing.

    Raises:
        ValueError: the architecture knows no checkpointing.
    """
    backbone: Any = model.backbone
    if gradient_checkpointing:
        check_checkpointing(backbone)
    for name, parameter in backbone.named_parameters():
        unused = name.startswith("pooler.")
        fixed = fix_position_embedding and FAMILIES[family].position_embeddings in name
        if unused or fixed or fix_encoder:  # what an adapter froze stays so
            parameter.requires_grad_(False)
    backbone.config.use_cache = False  # of keys and values, which no training reads
    if gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def check_checkpointing(backbone: Any) -> None:  # noqa: ANN401 - of transformers
    """Refuses an architecture that knows no gradient checkpointing; one on torch's device meta will do.

    Raises:
        ValueError: names the architecture.
    """
    if not backbone.supports_gradient_checkpointing:
        raise ValueError(
            f"train.gradient_checkpointing is true, and {type(backbone).__name__} cannot compute activations again; "
            "set it to false, and a smaller batch if memory is short"
        )


def weights_fingerprint(name_or_path: str) -> str:
    """16 hex digits that change with any file of the checkpoint that vectors depend on; for a hub id, its commit."""
    return _fingerprint(name_or_path, {".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".py"})


def tokenizer_fingerprint(name_or_path: str) -> str:
    """16 hex digits that change with the tokenizer's files; for a hub id, its commit."""
    return _fingerprint(name_or_path, {".json", ".txt", ".model", ".py"})


def _fingerprint(name_or_path: str, suffixes: set[str]) -> str:
    folder = Path(resolve(name_or_path))
    digest = hashlib.sha256()
    if not folder.is_dir():
        path = _hub_file(name_or_path, "config.json")
        commit = path.parent.name if path else ""  # the hub's cache has a folder a commit
        digest.update(f"{name_or_path} {commit}".encode())
        return digest.hexdigest()[:16]
    for file in sorted(path for path in folder.rglob("*") if path.suffix in suffixes):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
