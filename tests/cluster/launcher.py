"""What must hold of the files of `ray up`: Ray's own schema, the machines' by that of EC2, and sense."""

import functools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.kuberay import start_options
from tests.cluster.shipped import image_problems, keys_written_out, named_secret, planted

Node = dict[str, Any]
SHARED, TOKEN = "/shared", "RAY_AUTH_TOKEN_PATH"
SCHEMA = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
OF_GCP = {  # fields of a machine that we use; nothing that could be asked without a network knows all of them
    "": {"machineType", "disks", "networkInterfaces", "guestAccelerators", "scheduling"},
    "disks": {"boot", "autoDelete", "type", "initializeParams"},
    "networkInterfaces": {"subnetwork", "accessConfigs"},
    "guestAccelerators": {"acceleratorType", "acceleratorCount"},
    "scheduling": {
        "provisioningModel",
        "preemptible",
        "automaticRestart",
        "onHostMaintenance",
        "instanceTerminationAction",
    },
}


def problems(document: Node) -> list[str]:
    """What is wrong with a cluster file; nothing of its sense while Ray refuses it."""
    try:
        validate_config(prepare_config(planted(document, ("cluster_name",), document.get("cluster_name"))))
    except jsonschema.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        return [f"Ray refuses it: {error!r}"]
    return [
        *_unknown(document),
        *_of_nodes(document),
        *_of_containers(document),
        *_of_commands(document),
        *keys_written_out(yaml.safe_dump(document)),
    ]


def _unknown(document: Node) -> Iterator[str]:
    """Keys that Ray's schema would let pass, and fields of machines, which it does not look at."""
    known = json.loads(SCHEMA.read_text())["properties"]["provider"]["properties"]
    for key in document["provider"].keys() - known.keys():
        yield f"provider.{key} is unknown to Ray"
    for name, node in document["available_node_types"].items():
        if document["provider"]["type"] == "aws":
            report = ParamValidator().validate({**node["node_config"], "MinCount": 1, "MaxCount": 1}, _ec2())
            if report.has_errors():
                yield f"{name}.node_config: {report.generate_report()}"
        else:
            yield from (f"{name}.node_config: {key} is unknown" for key in _unknown_to_gcp(node["node_config"]))


@functools.cache
def _ec2() -> Any:  # noqa: ANN401 - botocore has no types
    """What EC2 takes to start a machine."""
    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _unknown_to_gcp(config: Node) -> Iterator[str]:
    for part, allowed in OF_GCP.items():
        given = config.get(part, {}) if part else config
        for item in given if isinstance(given, list) else [given]:
            yield from (f"{part}.{key}".lstrip(".") for key in item.keys() - allowed)


def _of_nodes(document: Node) -> Iterator[str]:
    aws = document["provider"]["type"] == "aws"
    for name, node in document["available_node_types"].items():
        config = node["node_config"]
        if aws and not config.get("SecurityGroupIds"):
            yield f"{name}: without SecurityGroupIds Ray makes a group with port 22 open to the world"
        if not aws and not config.get("networkInterfaces"):
            yield f"{name}: without networkInterfaces it lies in the network `default`, with port 22 open to the world"
        if name == document["head_node_type"]:
            if node["resources"].get("CPU") != 0 or node.get("max_workers") != 0:
                yield "the head must have resources CPU 0 and max_workers 0: the driver must not die of a worker"
            continue
        spot = (
            config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
            if aws
            else config.get("scheduling", {}).get("provisioningModel") == "SPOT"
        )
        if not spot:
            yield f"{name}: its machines are no spot machines"
        if not node["resources"].get("GPU"):
            yield f"{name}: resources say nothing of its GPU"
    if "IpPermissions" in document["provider"].get("security_group", {}):
        yield "provider.security_group adds to port 22 open to the world; give SecurityGroupIds"
    if "0.0.0.0" in yaml.safe_dump(document):
        yield "0.0.0.0: something is open to the world"


def _of_containers(document: Node) -> Iterator[str]:
    docker = document.get("docker", {})
    for side in ("head_image", "worker_image"):
        yield from image_problems(docker.get(side, ""))
    words = [word for option in docker.get("run_options", []) for word in shlex.split(option)]
    options = list(zip(words[::2], words[1::2], strict=False))
    environment = dict(value.split("=", 1) for option, value in options if option == "--env")
    if environment.get("RAY_AUTH_MODE") != "token":
        yield "docker.run_options must set RAY_AUTH_MODE=token"
    if not any(environment.get(TOKEN, "").startswith(f"{folder}/") for folder in document.get("file_mounts", {})):
        yield f"docker.run_options must set {TOKEN} to a file of file_mounts"
    for name in filter(named_secret, environment):
        yield f"docker.run_options: {name} is a secret; mount it"
    mounts = [value.split(":") for option, value in options if option == "--volume"]
    ready = "\n".join(document["initialization_commands"])
    if not any(inside == SHARED and f"mountpoint -q {outside} || sudo mount" in ready for outside, inside in mounts):
        yield f"no shared file system is mounted and given to the container as {SHARED}"


def _of_commands(document: Node) -> Iterator[str]:
    for side in ("head", "worker"):
        command = next(line for line in document[f"{side}_start_ray_commands"] if line.startswith("ray start"))
        options = dict(word.removeprefix("--").partition("=")[::2] for word in shlex.split(command)[2:])
        for option in options.keys() - start_options():
            yield f"{side}_start_ray_commands: --{option} is no option of `ray start`"
        if side == "head":
            port = options.get("port")
            if options.get("num-cpus") != "0":
                yield "head_start_ray_commands must have --num-cpus=0"
            if options.get("dashboard-host", "127.0.0.1") != "127.0.0.1":
                yield "head_start_ray_commands: the dashboard must answer its own machine alone"
            if options.get("autoscaling-config") != "~/ray_bootstrap_config.yaml":
                yield "head_start_ray_commands: without --autoscaling-config no worker is ever started"
        elif options.get("address") != f"$RAY_HEAD_IP:{port}":
            yield f"worker_start_ray_commands must have --address=$RAY_HEAD_IP:{port}"
