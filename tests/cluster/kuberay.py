"""What must hold of KubeRay manifests: fields by a schema of those that we use, pods by that of Kubernetes, sense.

The schema is of KubeRay 1.6 and 1.7; a field that it does not know is an error, as with `kubectl --validate=strict`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import start

from tests.cluster.shipped import RAY, image_problems, keys_written_out, named_secret

KUBERNETES = "1.33"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
Node = dict[str, Any]


def _fields(*required: str, **known: Node) -> Node:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": known}


TEXT: Node = {"type": "string", "minLength": 1}
YES_NO: Node = {"type": "boolean"}
COUNT: Node = {"type": "integer", "minimum": 0}
NAMES: Node = {"type": "object", "additionalProperties": TEXT}
STARTED: Node = {"type": "object", "additionalProperties": {"type": "string"}}
POD: Node = {"type": "object", "required": ["spec"]}  # read further by the schema of Kubernetes
METADATA = _fields("name", name=TEXT, namespace=TEXT, labels=NAMES, annotations=NAMES)
WORKERS = _fields(
    "groupName",
    "rayStartParams",
    "template",
    "minReplicas",
    "maxReplicas",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=STARTED,
    template=POD,
)
CLUSTER = _fields(
    "rayVersion",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=_fields("mode", mode={"enum": ["token", "disabled"]}, secretName=TEXT),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=_fields(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Conservative", "Default", "Aggressive"]},
        idleTimeoutSeconds=COUNT,
        resources=_fields(requests=NAMES, limits=NAMES),
        securityContext={"type": "object"},
    ),
    headGroupSpec=_fields(
        "rayStartParams",
        "template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=STARTED,
        template=POD,
    ),
    workerGroupSpecs={"type": "array", "minItems": 1, "items": WORKERS},
    suspend=YES_NO,
)
JOB = _fields(
    "entrypoint",
    "rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    preRunningDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=YES_NO,
    ttlSecondsAfterFinished=COUNT,
    suspend=YES_NO,
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=POD,
    submitterConfig=_fields(backoffLimit=COUNT),
)
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB}


def problems(document: Node) -> list[str]:
    """What is wrong with a RayCluster or a RayJob; nothing of its sense while a field is wrong."""
    schema = _fields(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"enum": list(KINDS)},
        metadata=METADATA,
        spec=KINDS.get(document.get("kind", ""), {}),
    )
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(document)
    ]
    if found:
        return found
    job = document["spec"] if document["kind"] == "RayJob" else None
    cluster = document["spec"] if job is None else job["rayClusterSpec"]
    pods = {"head": cluster["headGroupSpec"]["template"]}
    pods |= {f"workers {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    found = list(_of_cluster(cluster)) + keys_written_out(yaml.safe_dump(document))
    for name, template in pods.items():
        found += [f"{name}: {problem}" for problem in (*of_pod(template), *_of_ray_pod(template))]
    if job is not None:
        found += [f"submitter: {problem}" for problem in of_pod(job["submitterPodTemplate"])] + list(_of_job(job))
    return found


def kubernetes_problems(resource: Node) -> list[str]:
    """What Kubernetes itself would refuse, unknown fields included."""
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def of_pod(template: Node) -> Iterator[str]:
    """Of every pod: fields, images, user, rights, limits, secrets."""
    fields = kubernetes_problems(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    )
    if fields:
        yield from fields
        return
    rights = template["spec"].get("securityContext", {})
    if rights.get("runAsNonRoot") is not True or not rights.get("runAsUser"):
        yield "securityContext must have runAsNonRoot: true and a runAsUser other than 0"
    for container in template["spec"]["containers"]:
        yield from image_problems(container["image"])
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield "a container must have allowPrivilegeEscalation: false and capabilities.drop: [ALL]"
        asked, most = (container.get("resources", {}).get(side, {}) for side in ("requests", "limits"))
        if not {"cpu", "memory"} <= asked.keys() or not {"cpu", "memory"} <= most.keys():
            yield "resources: requests and limits of cpu and memory are missing, by which Ray knows the pod's size"
        if asked.get("nvidia.com/gpu") != most.get("nvidia.com/gpu"):
            yield "resources: requests and limits of nvidia.com/gpu differ"
        for variable in container.get("env", []):
            if named_secret(variable["name"]) and "secretKeyRef" not in variable.get("valueFrom", {}):
                yield f"env {variable['name']}: a secret must come from a Secret"


def _of_ray_pod(template: Node) -> Iterator[str]:
    spec, container = template["spec"], template["spec"]["containers"][0]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    mounted = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", [])}
    if mounted.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
        yield "/dev/shm must be an emptyDir with medium: Memory, or Ray's object store lies on a disk"
    if "persistentVolumeClaim" not in mounted.get("/shared", {}):
        yield "/shared must be a persistentVolumeClaim: runs go on from there"
    if not {"readinessProbe", "livenessProbe"} <= container.keys():
        yield "readinessProbe and livenessProbe are missing"


def _of_cluster(cluster: Node) -> Iterator[str]:
    if cluster["rayVersion"] != RAY:
        yield f"rayVersion is {cluster['rayVersion']}, and {RAY} is pinned"
    if cluster["authOptions"]["mode"] != "token":
        yield "authOptions.mode must be token"
    head = cluster["headGroupSpec"]
    if head.get("serviceType") != "ClusterIP":
        yield "headGroupSpec.serviceType must be ClusterIP, or the dashboard is open to the world"
    if head["rayStartParams"].get("num-cpus") != "0":
        yield 'headGroupSpec.rayStartParams.num-cpus must be "0": the driver must not die with a worker\'s memory'
    for group in (head, *cluster["workerGroupSpecs"]):
        for option in group["rayStartParams"].keys() - start_options():
            yield f"rayStartParams.{option} is no option of `ray start`"
    for group in cluster["workerGroupSpecs"]:
        least, most = group["minReplicas"], group["maxReplicas"]
        if not least <= group.get("replicas", least) <= most:
            yield f"workers {group['groupName']}: replicas must lie between minReplicas and maxReplicas"
        yield from _of_leaving(group["template"]["spec"])
        gpus = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("nvidia.com/gpu")
        if group["rayStartParams"].get("num-gpus", gpus) != gpus:
            yield f"workers {group['groupName']}: num-gpus is not the limit of nvidia.com/gpu, {gpus}"


def _of_leaving(spec: Node) -> Iterator[str]:
    """A pod that is told to end: Ray has its time for a checkpoint before Kubernetes kills it."""
    given = {variable["name"]: variable.get("value") for variable in spec["containers"][0].get("env", [])}
    seconds = int(given.get(DRAIN) or 30)
    if seconds >= spec.get("terminationGracePeriodSeconds", 30):
        yield f"terminationGracePeriodSeconds must be more than {DRAIN}, {seconds}"


def _of_job(job: Node) -> Iterator[str]:
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if not job.get("backoffLimit"):
        yield "backoffLimit must be 1 or more: a lost head is followed by a new cluster, and the run goes on"
    if not job["entrypoint"].startswith("rayembed run /shared/"):
        yield "entrypoint must be `rayembed run` with a file below /shared, which the next cluster sees too"
    given = yaml.safe_load(job.get("runtimeEnvYAML", "{}"))
    for key in given.keys() - RuntimeEnv.known_fields:
        yield f"runtimeEnvYAML.{key} is unknown to Ray"
    for name in given.get("env_vars", {}):
        if named_secret(name):
            yield f"runtimeEnvYAML.env_vars.{name}: a secret must come from a Secret"
    try:
        RuntimeEnv(**{key: value for key, value in given.items() if key in RuntimeEnv.known_fields})
    except (TypeError, ValueError) as error:
        yield f"runtimeEnvYAML: {error}"


@functools.cache
def start_options() -> frozenset[str]:
    """What `ray start` of the installed Ray takes."""
    return frozenset(name.removeprefix("--") for option in start.params for name in option.opts)
