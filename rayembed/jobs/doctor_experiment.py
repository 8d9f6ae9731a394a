"""What `doctor` looks at in an experiment: whether its storage can be read and written, and its models loaded."""

import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from pyarrow import fs

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.config.uris import public_name, public_text
from rayembed.data import storage
from rayembed.data.beir import is_beir
from rayembed.jobs.doctor_machine import Finding
from rayembed.jobs.shared_paths import MODELS
from rayembed.models.loading import load_config, resolve, tokenizer_of

WITHIN_S = 30.0  # an object store that cannot be reached is tried again and again by its client
SENTENCE = "the words of a text"
PROBE, TEXT = ".rayembed-probe-", b"rayembed doctor"
CREDENTIALS = {
    "s3": "credentials are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws or the machine's role; "
    "another server goes into ?endpoint_override=HOST:PORT&scheme=http",
    "gs": "credentials are taken from GOOGLE_APPLICATION_CREDENTIALS or the machine's account",
    "abfs": "credentials are taken from AZURE_STORAGE_ACCOUNT_NAME and the login of the machine",
}


def storages(experiment: Experiment | None) -> Iterator[Finding]:
    """Writes, reads and deletes a small file where the run and its cache lie, and opens each of the data."""
    if experiment is None:
        return
    for setting, folder in {"output_dir": experiment.output_dir, "cache_dir": experiment.cache()}.items():
        yield _tried(setting, folder, _written, "written, read and deleted a file in")
    made = experiment.harvest.output if experiment.harvest is not None else None
    for setting, path in _data(experiment):
        if made and storage.identity(path) == storage.identity(made) and not storage.exists(path):
            yield Finding("ok", setting, f"{public_name(path)} is not there yet: the job harvest makes it")
        else:
            yield _tried(setting, path, _read, "read")


def models(experiment: Experiment | None) -> Iterator[Finding]:
    """Configuration, tokenizer and form of the weights of each model that the experiment names."""
    if experiment is None:
        return
    own = experiment.model
    named = {"model.name_or_path": (own.name_or_path, own.trust_remote_code)}
    for key in MODELS:
        section, _, name = key.partition(".")
        settings = getattr(experiment, section)
        if getattr(settings, name, None):
            named[key] = (getattr(settings, name), getattr(settings, "trust_remote_code", own.trust_remote_code))
    for key, (name, trusted) in named.items():
        yield _model(key, name, trusted, own if key == "model.name_or_path" else None)
        if trusted:
            found = f"{name} may run Python code of its own (trust_remote_code)"
            yield Finding("warning", key, found, "only for sources that you trust: else set it to false")


def _data(experiment: Experiment) -> Iterator[tuple[str, str]]:
    data, mine = experiment.data, experiment.mine
    given = {"data.train": data.train, "data.corpus": data.corpus}
    given["data.evaluation"] = [] if data.evaluation is None else [data.evaluation]
    for key in ("corpus_embeddings", "query_embeddings"):
        given[f"mine.{key}"] = getattr(mine, key, [])
    for setting, paths in given.items():
        for path in paths:
            yield setting, path


def _tried(setting: str, path: str, what: Callable[[str], None], words: str) -> Finding:
    """Does something with a path in a thread, which is left behind where storage does not answer."""
    failures: list[Exception] = []

    def work() -> None:
        try:
            what(path)
        except Exception as error:  # of any filesystem
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WITHIN_S)
    name = public_name(path)
    advice = CREDENTIALS.get(path.partition("://")[0], "correct the path, or its permissions")
    if thread.is_alive():
        return Finding("error", setting, f"{name} does not answer within {WITHIN_S:g} s", advice)
    if failures:
        told = str(failures[0]).strip().splitlines() or [type(failures[0]).__name__]
        return Finding("error", setting, f"{name}: {public_text(told[0])}", advice)
    return Finding("ok", setting, f"{words} {name}")


def _written(folder: str) -> None:
    """Leaves nothing behind, nor folders that were not there."""
    filesystem, inner = storage._locate(folder)
    inner, missing = inner.rstrip("/"), []
    if isinstance(filesystem, fs.LocalFileSystem):
        missing = [place for place in (Path(inner), *Path(inner).parents) if not place.exists()]
        Path(inner).mkdir(parents=True, exist_ok=True)
    probe = f"{inner}/{PROBE}{secrets.token_hex(8)}"
    try:
        with filesystem.open_output_stream(probe) as stream:
            stream.write(TEXT)
        with filesystem.open_input_stream(probe) as stream:
            if stream.read() != TEXT:
                raise OSError("what was written is not what is read")
        filesystem.delete_file(probe)
    finally:
        for place in missing:
            place.rmdir()


def _read(path: str) -> None:
    files = [storage.join(path, "corpus.jsonl")] if is_beir(path) else storage.expand(path)
    with storage.open_input(files[0]) as file:
        file.read(1)


def _model(key: str, name: str, trusted: bool, own: ModelConfig | None) -> Finding:
    try:
        found = load_config(name, trust_remote_code=trusted)
        if own is not None:
            tokenizer = tokenizer_of(own)
            if not {*tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]} - {tokenizer.unk_token_id}:
                raise ValueError(f"{name}: its tokenizer knows no word of {SENTENCE!r}; are its files there?")
        form = _form(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = "give a hub id (a private one needs HF_TOKEN, and HF_HUB_OFFLINE unset), a folder, or package://..."
        return Finding("error", key, told, advice)
    kind = ", ".join(found.architectures or ()) or type(found).__name__
    if form == "safetensors":
        return Finding("ok", key, f"{name}: {kind}, weights as safetensors")
    if form == "pickle":
        advice = "a pickle, of which tensors alone are read: code in it is refused. Save it anew as safetensors"
        return Finding("warning", key, f"{name}: {kind}, weights as pytorch_model.bin", advice)
    advice = "the folder has a configuration and no weights: copy model.safetensors there"
    return Finding("error", key, f"{name}: {kind}, no weights", advice)


def _form(name: str) -> str:
    """Of a checkpoint's weights: safetensors, pickle or none; of a hub id nothing is downloaded."""
    folder = Path(resolve(name))
    if folder.is_dir():
        files = {path.name for path in folder.iterdir()}
    else:
        files = {file for file in _WEIGHTS if isinstance(try_to_load_from_cache(name, file), str)}
        files = files or set(HfApi().list_repo_files(name))
    return next((form for file, form in _WEIGHTS.items() if file in files), "none")


_WEIGHTS = {
    "model.safetensors": "safetensors",
    "model.safetensors.index.json": "safetensors",
    "pytorch_model.bin": "pickle",
    "pytorch_model.bin.index.json": "pickle",
}
