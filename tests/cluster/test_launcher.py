"""The files of `ray up` are right, and each check finds the mistake that it is for."""

import pytest

from tests.cluster.launcher import problems
from tests.cluster.shipped import GONE, Keys, load, planted

HEAD: Keys = ("available_node_types", "head")
WORKER: Keys = ("available_node_types", "gpu-worker")
RUN: Keys = ("docker", "run_options")
STARTED = "ray start --head --num-cpus=0 --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml"
OF_BOTH: list[tuple[Keys, object, str]] = [
    (("cluster_nme",), "x", "'cluster_nme' was unexpected"),
    (("max_workers",), "8", "max_workers: '8' is not of type 'integer'"),
    (("head_node_type",), "heads", "head_node_type"),
    (("provider", "regions"), "x", "provider.regions is unknown"),
    ((*WORKER, "min_worker"), 1, "'min_worker' was unexpected"),
    (("docker", "images"), "x", "'images' was unexpected"),
    (("docker", "container_name"), GONE, "Must provide a container & image name"),
    (("docker", "head_image"), "rayembed:latest", "the tag must be"),
    (("docker", "worker_image"), "rayembed:0.1.0-ray2.61.0-cu130", "its Ray is 2.61.0"),
    ((*HEAD, "resources"), {"CPU": 8}, "resources CPU 0"),
    ((*HEAD, "resources"), GONE, "'resources' is a required property"),
    ((*WORKER, "min_workers"), 9, "max_workers"),
    ((*WORKER, "resources"), {"CPU": 8}, "nothing of its GPU"),
    ((*RUN, 2), "--env RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token"),
    ((*RUN, 3), "--env RAY_AUTH_TOKEN=abc", "must set RAY_AUTH_TOKEN_PATH"),
    ((*RUN, 3), "--env RAY_AUTH_TOKEN=abc", "a secret is written out"),
    ((*RUN, 4), "--env HF_TOKEN=abc", "HF_TOKEN is a secret"),
    (("file_mounts",), {}, "must set RAY_AUTH_TOKEN_PATH to a file of file_mounts"),
    ((*RUN, 1), "--volume /mnt/other:/shared", "no shared file system"),
    (("initialization_commands", 1), "sudo mkdir -p /mnt/shared", "no shared file system"),
    (("head_start_ray_commands", 1), f"{STARTED} --dashboard-host=0.0.0.0", "answer its own machine"),
    (("head_start_ray_commands", 1), STARTED.replace("=0 ", "=8 "), "--num-cpus=0"),
    (("head_start_ray_commands", 1), STARTED.partition(" --auto")[0], "no worker is ever started"),
    (("head_start_ray_commands", 1), f"{STARTED} --num-cpu=0", "--num-cpu is no option"),
    (("worker_start_ray_commands", 1), "ray start --address=$RAY_HEAD_IP:6380", "--address=$RAY_HEAD_IP:6379"),
]
OPEN = {"GroupName": "x", "IpPermissions": [{"FromPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
OF_AWS: list[tuple[Keys, object, str]] = [
    ((*WORKER, "node_config", "InstanceTypes"), "g6.xlarge", 'Unknown parameter in input: "InstanceTypes"'),
    ((*HEAD, "node_config", "BlockDeviceMappings", 0, "Ebs", "VolumeSize"), "200", "Invalid type for parameter"),
    ((*WORKER, "node_config", "SecurityGroupIds"), GONE, "port 22 open to the world"),
    ((*WORKER, "node_config", "InstanceMarketOptions"), GONE, "no spot machines"),
    (("provider", "security_group"), OPEN, "0.0.0.0: something is open"),
    (("provider", "security_group"), OPEN, "give SecurityGroupIds"),
]
OF_GCP: list[tuple[Keys, object, str]] = [
    ((*WORKER, "node_config", "machinetype"), "g2-standard-8", "machinetype is unknown"),
    ((*WORKER, "node_config", "scheduling", "preemptable"), True, "scheduling.preemptable is unknown"),
    ((*HEAD, "node_config", "networkInterfaces"), GONE, "port 22 open to the world"),
    ((*WORKER, "node_config", "scheduling", "provisioningModel"), "STANDARD", "no spot machines"),
]
MISTAKES = [("aws.yaml", *mistake) for mistake in (*OF_BOTH, *OF_AWS)]
MISTAKES += [("gcp.yaml", *mistake) for mistake in (*OF_BOTH, *OF_GCP)]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_nothing_is_wrong(name: str) -> None:
    assert problems(load(name)) == []


@pytest.mark.parametrize(
    ("name", "keys", "value", "words"), MISTAKES, ids=[f"{mistake[0]}-{mistake[3]}" for mistake in MISTAKES]
)
def test_a_mistake_is_found(name: str, keys: Keys, value: object, words: str) -> None:
    found = problems(planted(load(name), keys, value))
    assert any(words in problem for problem in found), found
