"""The manifests in deploy/: KubeRay's and Kubernetes' schemas, and a command that this program has."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from llava_interleave.cli import app

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs pip install kubernetes-validate")
jsonschema = pytest.importorskip("jsonschema")

DEPLOY = Path(__file__).parent.parent / "deploy"
TEXT, WHOLE, TEXTS = {"type": "string"}, {"type": "integer", "minimum": 0}, {"additionalProperties": {"type": "string"}}


def record(required: str, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": fields, "additionalProperties": False}


# KubeRay 1.7, https://docs.ray.io/en/master/kuberay/references/api.html: what a resource must have, and the fields of use here.
# A template is Kubernetes' own, and checked by its schema.
GROUP = {"rayStartParams": TEXTS, "template": {"type": "object"}}
CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    headGroupSpec=record("template", serviceType=TEXT, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": record("groupName template", groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, **GROUP),
    },
    enableInTreeAutoscaling={"type": "boolean"},
)
JOB = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=record("name", name=TEXT, namespace=TEXT, labels=TEXTS),
    spec=record(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=WHOLE,
        shutdownAfterJobFinishes={"type": "boolean"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        rayClusterSpec=CLUSTER,
    ),
)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "batch.yaml").read_text("utf-8"))


def check(job: dict[str, Any]) -> None:
    jsonschema.validate(job, JOB)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)


def test_schemas(job: dict[str, Any]) -> None:
    check(job)
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    for place, name, value in (
        (job["spec"], "shutdownAfterJobFinish", True),
        (workers, "replicas", "4"),
        (workers["template"]["spec"]["containers"][0], "imagePull", "Always"),
        (workers["template"]["spec"]["containers"][0]["env"][0], "value", 0),
    ):
        before = dict(place)
        place[name] = value
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(job)
        place.clear()
        place.update(before)
    check(job)


def test_one_image_and_what_it_says_of_itself(job: dict[str, Any]) -> None:
    """Ray wants one version on all machines; volumes that are mounted are there."""
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for pod, container in zip(pods, containers, strict=True):
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data"}


def test_the_command_parses(job: dict[str, Any]) -> None:
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, words[0]) == ("llava", "batch")
    command = get_command(app).commands["batch"]  # type: ignore[attr-defined]
    given = command.make_context("batch", words[1:]).params
    assert (given["ray"], given["ray_cpus"], str(given["source"])) == ("auto", 4, "/data/shards")
    gpus = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert int(gpus["cpu"]) > given["ray_cpus"] * int(gpus["nvidia.com/gpu"])
