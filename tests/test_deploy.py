"""The manifests in deploy/: KubeRay's and Kubernetes' schemas, and a command that this
program has.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.main import get_command

from llava_interleave.cli import app
from llava_interleave.train import ray_hosts

pytestmark = pytest.mark.slow

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="needs pip install kubernetes-validate"
)
jsonschema = pytest.importorskip("jsonschema")

DEPLOY = Path(__file__).parent.parent / "deploy"
TEXT, WHOLE, TEXTS = (
    {"type": "string"},
    {"type": "integer", "minimum": 0},
    {"additionalProperties": {"type": "string"}},
)


def record(required: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required.split(),
        "properties": fields,
        "additionalProperties": False,
    }


# KubeRay 1.7, https://docs.ray.io/en/master/kuberay/references/api.html: what a resource must have,
# and the fields of use here. A template is Kubernetes' own, and checked by its schema.
GROUP = {"rayStartParams": TEXTS, "template": {"type": "object"}}
CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record("mode", mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=record("template", serviceType=TEXT, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": record(
            "groupName template",
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            **GROUP,
        ),
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


@pytest.fixture(params=["batch", "serve", "train"])
def resources(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """A job and its dependencies."""
    return list(yaml.safe_load_all((DEPLOY / f"{request.param}.yaml").read_text("utf-8")))


@pytest.fixture
def job(resources: list[dict[str, Any]]) -> dict[str, Any]:
    return resources[0]


def check(resources: list[dict[str, Any]]) -> None:
    job, *others = resources
    jsonschema.validate(job, JOB)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)
    for other in others:
        kubernetes_validate.validate(other, "1.34", strict=True)


def test_schemas(resources: list[dict[str, Any]]) -> None:
    check(resources)
    job = resources[0]
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    for place, name, value in (
        (job["spec"], "shutdownAfterJobFinish", True),
        (workers, "replicas", "4"),
        (workers["template"]["spec"]["containers"][0], "imagePull", "Always"),
        (workers["template"]["spec"]["containers"][0]["env"][0], "value", 0),
        (resources[-1], "spec", {"ports": "http"}),
    ):
        before = dict(place)
        place[name] = value
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(resources)
        place.clear()
        place.update(before)
    check(resources)


def test_one_image_and_what_it_says_of_itself(job: dict[str, Any]) -> None:
    """Ray wants one version on all machines; volumes that are mounted are there."""
    cluster = job["spec"]["rayClusterSpec"]
    pods = [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for pod, container in zip(pods, containers, strict=True):
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        assert "/data" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_command_parses(job: dict[str, Any]) -> None:
    if job["metadata"]["name"] == "llava-train":
        return  # the test below
    command, _, otherwise = job["spec"]["entrypoint"].partition(" || ")
    program, name, *words = shlex.split(command)
    assert otherwise in ("", f"test -e {words[1]}")
    assert program == "llava"
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    given = command.make_context(name, words).params
    assert (given["ray"], given["ray_cpus"]) == ("auto", 4)
    if name == "batch":
        assert str(given["source"]) == "/data/shards"
    else:
        assert given["model"] == ["/data/model"]
    gpus = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][
        0
    ]["resources"]["requests"]
    assert int(gpus["cpu"]) > given["ray_cpus"] * int(gpus["nvidia.com/gpu"])


def test_torchrun_runs_on_every_host_of_the_cluster() -> None:
    job = yaml.safe_load((DEPLOY / "train.yaml").read_text("utf-8"))
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    requests = workers["template"]["spec"]["containers"][0]["resources"]["requests"]
    program, _, module, *words = shlex.split(job["spec"]["entrypoint"])
    given, rest = ray_hosts.parser().parse_known_args(words)
    assert (program, module) == ("python", ray_hosts.__name__)
    assert (given.hosts, given.gpus) == (workers["replicas"], int(requests["nvidia.com/gpu"]))
    assert given.cpus < int(requests["cpu"])
    recipe = get_command(app).commands["train"].make_context("train", rest).params  # type: ignore[attr-defined]
    assert str(recipe["out"]) == "/data/run"
    first, second = ray_hosts.commands(["10.0.0.1", "10.0.0.2"], given.gpus, "7", rest)
    for number, command in enumerate((first, second), 1):
        torchrun = get_args_parser().parse_args(command[1:])
        assert (torchrun.nnodes, torchrun.nproc_per_node) == ("2", "8")
        assert (torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("10.0.0.1:29400", "7")
        assert torchrun.local_addr == f"10.0.0.{number}"
        assert torchrun.training_script_args == ["train", *rest]
        host = "true" if number == 1 else "false"
        assert torchrun.rdzv_conf == f"is_host={host}"


def test_what_is_served_is_reached_and_has_room() -> None:
    """The service leads to the port of the one process in front; replicas are no more than the
    machines for them.
    """
    job, service = yaml.safe_load_all((DEPLOY / "serve.yaml").read_text("utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    words = shlex.split(job["spec"]["entrypoint"])
    given = get_command(app).commands["serve"].make_context("serve", words[2:]).params  # type: ignore[attr-defined]
    assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    assert ports[service["spec"]["ports"][0]["targetPort"]] == (given["port"] or 8000)
    assert given["ray_replicas"] == f"{workers['minReplicas']}:{workers['maxReplicas']}"
    assert given["host"] == "0.0.0.0" and str(given["api_keys"]).startswith("/keys/")
