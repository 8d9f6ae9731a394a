"""The KubeRay manifests are right, and each check finds the mistake that it is for."""

import pytest

from tests.cluster.kuberay import kubernetes_problems, problems
from tests.cluster.shipped import GONE, Keys, load, planted

JOB, CLUSTER = "kuberay-job.yaml", "kuberay-cluster.yaml"
OF_JOB: Keys = ("spec", "rayClusterSpec")
HEAD: Keys = (*OF_JOB, "headGroupSpec")
WORKERS: Keys = (*OF_JOB, "workerGroupSpecs", 0)
POD: Keys = (*WORKERS, "template", "spec")
CONTAINER: Keys = (*POD, "containers", 0)
HEAD_CONTAINER: Keys = (*HEAD, "template", "spec", "containers", 0)
SUBMITTER: Keys = ("spec", "submitterPodTemplate", "spec", "containers", 0)
MISTAKES: list[tuple[Keys, object, str]] = [
    (("apiVersion",), "ray.io/v1alpha1", "apiVersion"),
    (("kind",), "RayJobs", "kind"),
    (("spec", "backofLimit"), 3, "'backofLimit' was unexpected"),
    (("spec", "backoffLimit"), "3", "backoffLimit: '3' is not of type 'integer'"),
    (("spec", "backoffLimit"), GONE, "backoffLimit must be 1 or more"),
    (("spec", "entrypoint"), "rayembed run configs/quickstart.yaml", "below /shared"),
    (("spec", "shutdownAfterJobFinishes"), False, "needs shutdownAfterJobFinishes"),
    (("spec", "submissionMode"), "K8sJob", "is not one of"),
    (("spec", "runtimeEnvYAML"), {"env_vars": {}}, "runtimeEnvYAML"),
    (("spec", "runtimeEnvYAML"), "workng_dir: .\n", "workng_dir is unknown"),
    (("spec", "runtimeEnvYAML"), "env_vars: [A]\n", "runtimeEnvYAML"),
    (("spec", "runtimeEnvYAML"), "env_vars: {HF_TOKEN: abc}\n", "HF_TOKEN: a secret"),
    ((*OF_JOB, "rayVersion"), "2.61.0", "rayVersion is 2.61.0"),
    ((*OF_JOB, "authOptions"), GONE, "'authOptions' is a required property"),
    ((*OF_JOB, "authOptions", "mode"), "disabled", "authOptions.mode must be token"),
    ((*OF_JOB, "autoscalerOptions", "version"), "v3", "is not one of"),
    (HEAD, GONE, "'headGroupSpec' is a required property"),
    ((*HEAD, "serviceType"), "LoadBalancer", "open to the world"),
    ((*HEAD, "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
    ((*HEAD, "rayStartParams", "num-cpus"), "4", 'must be "0"'),
    ((*HEAD, "rayStartParams", "dashbord-host"), "0.0.0.0", "dashbord-host is no option"),
    ((*HEAD_CONTAINER, "image"), "registry.example.com/rayembed:latest", "the tag must be"),
    ((*HEAD_CONTAINER, "image"), "registry.example.com/rayembed:0.1.0-ray2.59.0-cpu", "its Ray is 2.59.0"),
    ((*HEAD_CONTAINER, "env", 1), {"name": "HF_TOKEN", "value": "abc"}, "HF_TOKEN: a secret"),
    ((*HEAD_CONTAINER, "env", 0, "value"), "hf_abcdefghijklmnopqrstuvwx", "a secret is written out"),
    ((*HEAD_CONTAINER, "readinessProbe"), GONE, "readinessProbe and livenessProbe"),
    (WORKERS[:-1], [], "should be non-empty"),
    ((*WORKERS, "minReplicas"), 4, "between minReplicas and maxReplicas"),
    ((*WORKERS, "maxReplicas"), "8", "'8' is not of type 'integer'"),
    ((*WORKERS, "rayStartParams", "num-gpus"), "2", "num-gpus is not the limit"),
    ((*POD, "securityContext"), {"runAsUser": 0}, "runAsNonRoot"),
    ((*POD, "terminationGracePeriod"), 120, "terminationGracePeriod"),
    ((*POD, "terminationGracePeriodSeconds"), GONE, "terminationGracePeriodSeconds must be more"),
    ((*POD, "terminationGracePeriodSeconds"), 60, "terminationGracePeriodSeconds must be more"),
    ((*POD, "volumes", 1, "emptyDir", "medium"), GONE, "/dev/shm must be"),
    ((*POD, "volumes", 0), {"name": "shared", "emptyDir": {}}, "/shared must be"),
    ((*CONTAINER, "resources", "limits", "nvidia.com/gpu"), GONE, "nvidia.com/gpu differ"),
    ((*CONTAINER, "resources", "requests"), GONE, "requests and limits of cpu and memory"),
    ((*CONTAINER, "resources", "limits", "memory"), GONE, "requests and limits of cpu and memory"),
    ((*CONTAINER, "securityContext", "allowPrivilegeEscalation"), True, "allowPrivilegeEscalation"),
    ((*CONTAINER, "volumeMount"), [], "volumeMount"),
    ((*SUBMITTER, "image"), "rayproject/ray", "the tag must be"),
]


@pytest.mark.parametrize("name", [JOB, CLUSTER])
def test_nothing_is_wrong(name: str) -> None:
    assert problems(load(name)) == []


@pytest.mark.parametrize(("keys", "value", "words"), MISTAKES, ids=[mistake[2] for mistake in MISTAKES])
def test_a_mistake_is_found(keys: Keys, value: object, words: str) -> None:
    found = problems(planted(load(JOB), keys, value))
    assert any(words in problem for problem in found), found


def test_a_job_s_cluster_is_the_one_that_stays() -> None:
    assert load(JOB)["spec"]["rayClusterSpec"] == load(CLUSTER)["spec"]


def test_storage_is_what_pods_ask_for() -> None:
    storage = load("kuberay-storage.yaml")
    assert kubernetes_problems(storage) == []
    assert kubernetes_problems(planted(storage, ("spec", "accessMode"), ["ReadWriteMany"]))
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]  # pods of several machines write
    volumes = load(CLUSTER)["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == storage["metadata"]["name"]
