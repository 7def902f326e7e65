"""`llava train` on several hosts of a Ray cluster, as `deploy/train.yaml` (KubeRay) runs it:

    python -m llava_interleave.train.ray_hosts --hosts 2 --gpus 8 m4.json -r interleave -o run

Ray reserves the hosts and starts torchrun on each; the same command resumes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

PORT = 29400


def commands(
    addresses: Sequence[str], processes: int, job: str, words: Sequence[str]
) -> list[list[str]]:
    """The torchrun command of every host.

    addresses: of the hosts; the first has the rendezvous. words: arguments of `llava train`.
    """
    return [
        [
            *("torchrun", "--nnodes", str(len(addresses)), "--nproc-per-node", str(processes)),
            *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", job),
            *("--rdzv-endpoint", f"{addresses[0]}:{PORT}", "--local-addr", address),
            *("--rdzv-conf", f"is_host={'true' if number == 0 else 'false'}"),
            *("-m", "llava_interleave", "train", *words),
        ]
        for number, address in enumerate(addresses)
    ]


def run(hosts: int, gpus: int, cpus: int, words: Sequence[str]) -> int:
    """Train on `hosts` hosts with `gpus` and `cpus` each. -> the first exit code that is not 0."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class Host:
        def address(self) -> str:
            return str(ray.util.get_node_ip_address())

        def train(self, command: list[str]) -> int:
            return subprocess.run([sys.executable, "-m", "torch.distributed.run", *command[1:]],
                                  check=False).returncode  # fmt: skip

    ray.init()
    group = placement_group([{"CPU": cpus, "GPU": gpus}] * hosts, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    actors = [
        ray.remote(Host)
        .options(
            num_cpus=cpus,
            num_gpus=gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
        )
        .remote()
        for number in range(hosts)
    ]
    addresses = ray.get([actor.address.remote() for actor in actors])
    job = ray.get_runtime_context().get_job_id()
    every = commands(addresses, max(1, gpus), job, words)
    running = [actor.train.remote(command) for actor, command in zip(actors, every, strict=True)]
    while running:  # the first that fails ends all: Ray kills the actors with this process
        (done, *_), running = ray.wait(running)
        if code := ray.get(done):
            return int(code)
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the options; what it does not know are arguments of `llava train`."""
    parser = argparse.ArgumentParser(prog="python -m llava_interleave.train.ray_hosts")
    parser.add_argument("--hosts", type=int, required=True, help="of the Ray cluster")
    parser.add_argument("--gpus", type=int, default=0, help="of each host; a process has one")
    parser.add_argument("--cpus", type=int, default=1, help="of each host")
    return parser


def main() -> None:
    given, words = parser().parse_known_args()
    sys.exit(run(given.hosts, given.gpus, given.cpus, words))


if __name__ == "__main__":
    main()
