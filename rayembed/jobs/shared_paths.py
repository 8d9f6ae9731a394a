"""Refuses paths of one machine where work is shipped to several: a worker would write where nobody looks.

Whether nodes share a folder cannot be told by its name, so it is tried: a file with a random name is written here and
looked for there.
"""

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayembed.config import Experiment
from rayembed.data.copies import is_mirrored
from rayembed.data.embeddings import embedding_paths
from rayembed.jobs.connection import alive_nodes
from rayembed.jobs.shipping import absolute

logger = logging.getLogger(__name__)
MODELS = ("score.model", "mine.model", "encode.model", "train.guide_model", "evaluate.retriever")
PROBE = ".rayembed-probe-"
JOB_COPIES = "/runtime_resources/working_dir_files/"  # of Ray's session folder
SEEN_WITHIN_S = 10.0  # a network file system may know a folder's names of some seconds ago
ANSWER_WITHIN_S = 60.0  # a node that starts a first process on a busy machine
_known: set[tuple[str, ...]] = set()  # nodes and paths that were found shared


class NotSharedError(ValueError):
    """A path of the experiment is not there on a node of the cluster."""


def check_shared(experiment: Experiment) -> None:
    """Refuses a run folder, cache, model or given vectors that a node of the cluster does not see.

    Data files are left out: this process alone reads them. One node costs nothing, and so does what was found shared
    before. A node that cannot run a worker is not asked.

    Raises:
        NotSharedError: names nodes, paths and what to do.
    """
    nodes = _others(experiment)
    if not nodes:
        return
    folders, files = written_folders(experiment), read_paths(experiment)
    key = (*sorted(node["NodeID"] for node in nodes), "", *folders.values(), "", *files.values())
    if key in _known:
        return
    with _probes(folders) as probes:
        missing = _asked(nodes, {**probes, **files})
    if missing:
        raise NotSharedError(_in_words(missing, {**folders, **files}, folders))
    _known.add(key)


def written_folders(experiment: Experiment) -> dict[str, str]:
    """Local folders that workers write, by their setting; copies of what lies on an object store are none."""
    found = {"output_dir": experiment.output_dir, "cache_dir": experiment.cache()}
    local = {setting: path for setting, path in found.items() if "://" not in path and not is_mirrored(path)}
    if local.get("cache_dir", "").startswith(local.get("output_dir", "\0") + os.sep):
        del local["cache_dir"]
    return local


@cache
def _told(setting: str, folder: str) -> None:
    logger.warning(
        "%s is %s, in the copy that Ray made of --working-dir for this job: the next job has another, and Ray deletes "
        "it. To keep and go on with what is written, set %s to a folder elsewhere or on an object store",
        *(setting, folder, setting),
    )


def warn_of_job_copies(experiment: Experiment) -> None:
    """Says, once, which folders that are written lie in what Ray unpacked for a submitted job."""
    for setting, folder in written_folders(experiment).items():
        path = os.path.abspath(folder)
        if JOB_COPIES in path:
            _told(setting, path)


def read_paths(experiment: Experiment) -> dict[str, str]:
    """Local files and folders that workers read, absolute, by their setting; no hub ids and no packages."""
    mine, lora = experiment.mine, experiment.lora
    models: dict[str, str | None] = {"model.name_or_path": experiment.model.name_or_path}
    for key in (*MODELS, "lora.from_peft"):
        section, _, name = key.partition(".")
        models[key] = getattr(getattr(experiment, section), name, None)
    models |= {f"lora.raw_peft[{number}]": path for number, path in enumerate(lora.raw_peft if lora else ())}
    found = {setting: absolute(name) for setting, name in models.items() if name and Path(name).is_dir()}
    found = {setting: path for setting, path in found.items() if not is_mirrored(path)}
    for key in ("corpus_embeddings", "query_embeddings"):
        given = [path for path in getattr(mine, key, ()) if "://" not in path]
        if given:  # one of them stands for all
            found[f"mine.{key}"] = os.path.abspath(embedding_paths(given, setting=f"mine.{key}")[0])
    return found


def unseen(paths: Mapping[str, str], wait_s: float) -> list[str]:
    """Settings whose path is not on this machine; runs in a task on each node.

    Args:
        paths: by setting.
        wait_s: seconds until a path counts as missing.
    """
    deadline = time.monotonic() + wait_s
    while missing := [setting for setting, path in paths.items() if not os.path.exists(path)]:
        if time.monotonic() > deadline:
            break
        for setting in missing:  # listing a folder makes a network file system ask its server
            folder = os.path.dirname(paths[setting])
            if os.path.isdir(folder):
                os.listdir(folder)
        time.sleep(0.5)
    return missing


def _others(experiment: Experiment) -> list[dict[str, Any]]:
    """Nodes beside that of this process that a worker could be put on."""
    here, cpus = ray.get_runtime_context().get_node_id(), experiment.ray.cpus_per_worker
    nodes = [node for node in alive_nodes() if node["NodeID"] != here]
    return [node for node in nodes if node["Resources"].get("CPU", 0) >= cpus]


@contextmanager
def _probes(folders: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Files with random names in the folders, by setting, for the length of the block."""
    written: dict[str, str] = {}
    try:
        for setting, folder in folders.items():
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, PROBE + secrets.token_hex(8))
            written[setting] = path
            Path(path).touch()
        yield written
    finally:
        for path in written.values():
            Path(path).unlink(missing_ok=True)


def _asked(nodes: Sequence[dict[str, Any]], paths: Mapping[str, str]) -> dict[str, list[str]]:
    """Settings that each node does not see, by the node's name; tasks without CPUs, so that busy nodes answer too."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(unseen)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=there).remote(paths, SEEN_WITHIN_S)] = _name(node)
    ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_WITHIN_S)
    missing: dict[str, list[str]] = {}
    for answer, name in asked.items():
        try:
            if found := ray.get(answer, timeout=0):
                missing[name] = found
        except GetTimeoutError:
            ray.cancel(answer, force=True)
            logger.warning("node %s did not say within %g s whether it sees the paths", name, ANSWER_WITHIN_S)
        except RayTaskError as error:
            raise NotSharedError(
                f"node {name} cannot run rayembed: {str(error).strip().splitlines()[-1]}. Install the same version of "
                "rayembed, Python and Ray on every node"
            ) from error
        except RayError as error:
            logger.warning("node %s did not say whether it sees the paths: %s", name, type(error).__name__)
    return missing


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _in_words(missing: Mapping[str, Sequence[str]], paths: Mapping[str, str], folders: Mapping[str, str]) -> str:
    lines = []
    for setting, path in paths.items():
        nodes = [name for name, settings in missing.items() if setting in settings]
        if nodes:
            what = "what is written here is not seen" if setting in folders else "is not there"
            more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
            lines.append(f"  {setting} {path}: {what} on {', '.join(nodes[:3])}{more}")
    return (
        "the nodes of the cluster do not share all that workers read and write:\n"
        + "\n".join(lines)
        + "\nGive paths on a file system that every node has mounted at the same place (NFS, Lustre, EFS, Filestore; "
        "of data also s3:// or gs://), copy models to the same path on every node or name them by their hub id, or "
        "run on one node"
    )
