"""What must hold of compose.yaml: the schema of Compose itself, and sense."""

import shlex
from collections.abc import Iterator
from typing import Any

import jsonschema
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from tests.cluster.kuberay import start_options
from tests.cluster.shipped import image_problems, keys_written_out, named_secret

Node = dict[str, Any]
HEAD = "head"
OF_THE_HOST = {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"}


def problems(document: Node) -> list[str]:
    """What is wrong with a compose file; nothing of its sense while Compose would refuse it."""
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in jsonschema.Draft202012Validator(get_builtin_schema("vendor.compose-spec")).iter_errors(document)
    ]
    if found:
        return found
    if HEAD not in document["services"]:
        return [f"there is no service {HEAD}"]
    found = keys_written_out(yaml.safe_dump(document))
    for name, service in document["services"].items():
        checks = (
            *_of_service(document, service),
            *_of_secrets(document, service),
            *_of_command(name, service),
            *_of_ports(name, service),
        )
        found += [f"{name}: {problem}" for problem in checks]
    return found


def _of_service(document: Node, service: Node) -> Iterator[str]:
    yield from image_problems(service.get("image", ""))
    if "shared:/shared" not in service.get("volumes", []) or "shared" not in document.get("volumes", {}):
        yield "the volume shared must be mounted at /shared"
    for key in ("shm_size", "healthcheck"):
        if key not in service:
            yield f"{key} is missing"
    if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", []):
        yield "cap_drop: [ALL] and security_opt: [no-new-privileges:true] are missing"
    for key in OF_THE_HOST & service.keys():
        yield f"{key} gives it more of the machine than it needs"


def _of_secrets(document: Node, service: Node) -> Iterator[str]:
    environment = service.get("environment", {})
    if environment.get("RAY_AUTH_MODE") != "token":
        yield "RAY_AUTH_MODE must be token"
    secrets = [f"/run/secrets/{name}" for name in service.get("secrets", []) if name in document.get("secrets", {})]
    if environment.get("RAY_AUTH_TOKEN_PATH") not in secrets:
        yield "RAY_AUTH_TOKEN_PATH must be one of its secrets"
    for variable, value in environment.items():
        if named_secret(variable) and value is not None:
            yield f"environment.{variable}: a secret must come from the environment of `docker compose`: write no value"
    for secret in document.get("secrets", {}).values():
        if "${" not in secret.get("file", ""):
            yield "secrets: the file must be named by a variable, so that no token lies beside compose.yaml"


def _of_command(name: str, service: Node) -> Iterator[str]:
    words = shlex.split(service.get("command", ""))
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[2:])
    if words[:2] != ["ray", "start"] or "block" not in options:
        yield "command must be `ray start --block ...`"
    for option in options.keys() - start_options():
        yield f"command: --{option} is no option of `ray start`"
    if name == HEAD:
        if "head" not in options or options.get("num-cpus") != "0":
            yield "command must have --head and --num-cpus=0: the driver must outlive the workers' memory"
    else:
        if not options.get("address", "").startswith(f"{HEAD}:"):
            yield f"command must have --address={HEAD}:PORT"
        if service.get("depends_on", {}).get(HEAD, {}).get("condition") != "service_healthy":
            yield "depends_on: it must wait until the head is healthy"


def _of_ports(name: str, service: Node) -> Iterator[str]:
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            yield f"port {port} is open to the world: write 127.0.0.1:{port}"
    if name != HEAD and service.get("ports"):
        yield "a worker publishes no ports"
