r"""A command on the TPU slices of a GKE cluster: a JobSet for kubectl, or the command that has xpk make one.

    python -m launch.gke --name vit-l14 --topology v5p:4x4x8 --image REGISTRY/clip-jax:1 --bucket BUCKET \
        -- python -m launch.train --config configs/clip/vit_l14_336.py --workdir /runs/vit-l14 | kubectl apply -f -
    python -m launch.gke --xpk --cluster CLUSTER …the same…

Prints; it starts nothing itself. The bucket is mounted at /runs: a workdir there outlives every pod, and the same
command, run again, goes on from its newest checkpoint. A pod that is evicted restarts the whole JobSet, which is not
counted; any other failure is, up to --max-restarts. (kubernetes.io/docs/concepts/workloads/controllers/job,
jobset.sigs.k8s.io, kueue.sigs.k8s.io, cloud.google.com/kubernetes-engine/docs/how-to/tpus)
"""

import argparse
import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from clip_jax.command_line import errors_in_one_line
from clip_jax.errors import ConfigError
from launch import STOPPED
from launch.planning.hardware import Topology, parse

# Names of node pools' accelerators, and of accelerator types.
ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice",
                "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}  # fmt: skip
TYPES = {"v5e": "v5litepod"}
GRACE_SECONDS = 600  # from SIGTERM to SIGKILL; longer than a save


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with errors_in_one_line(arguments.debug):
        topology = parse(arguments.topology, arguments.slices)
        check(arguments)
        if arguments.xpk:
            print(shlex.join(xpk(arguments, topology)))
        else:
            print(yaml.safe_dump(jobset(arguments, topology), sort_keys=False, width=110), end="")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m launch.gke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--debug", action="store_true", help="show where an error came from")
    top.add_argument("--name", required=True, help="of the run")
    top.add_argument("--topology", required=True, help="of a slice: v5p:4x4x8, v5e:16x16, v5litepod-256, …")
    top.add_argument("--slices", type=int, default=1, help="default: 1")
    top.add_argument("--image", required=True, help="the container (launch/Dockerfile)")
    top.add_argument("--bucket", help="of Cloud Storage, mounted at /runs by GKE's gcsfuse driver")
    top.add_argument("--service-account", help="of Kubernetes, allowed to write the bucket")
    top.add_argument("--queue", default="multislice-queue", help="Kueue's LocalQueue; default: multislice-queue")
    top.add_argument("--max-restarts", type=int, default=10, help="after failures, evictions apart; default: 10")
    top.add_argument("--grace", type=int, default=GRACE_SECONDS, help=f"seconds for a save; default: {GRACE_SECONDS}")
    top.add_argument("--spot", action="store_true", help="on spot nodes")
    top.add_argument("--xpk", action="store_true", help="print xpk's command instead of a JobSet")
    top.add_argument("--cluster", help="with --xpk: the cluster's name")
    top.add_argument("command", nargs="+", help="after `--`: what every host runs")
    return top


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for names that Kubernetes does not take, and for what the two ways lack."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", arguments.name):
        raise ConfigError(f"--name {arguments.name}: expected up to 40 small letters, digits and dashes")
    if arguments.xpk and not arguments.cluster:
        raise ConfigError("--xpk needs --cluster: the one that xpk has made")
    if arguments.grace < 1 or arguments.max_restarts < 0:
        raise ConfigError("--grace and --max-restarts are whole numbers, the first at least 1")
    runs = [word for word in arguments.command if word.rpartition("=")[2].startswith("/runs")]
    if not arguments.xpk and bool(runs) != bool(arguments.bucket):
        raise ConfigError("--bucket and a --workdir under /runs belong together: a run must outlive its pods")


def hosts(topology: Topology) -> tuple[int, int]:
    """(hosts of a slice, chips of a host)."""
    chips = math.prod(topology.shape)
    return (1, chips) if chips < 4 else (chips // 4, 4)


def shape(topology: Topology) -> str:
    return "x".join(map(str, topology.shape))


def jobset(arguments: argparse.Namespace, topology: Topology) -> dict[str, Any]:
    """The manifest: one Job a slice, one pod a host."""
    count, chips = hosts(topology)
    container: dict[str, Any] = {
        "name": "train",
        "image": arguments.image,
        "command": list(arguments.command),
        "env": [{"name": "STOPPED_EXIT_CODE", "value": str(STOPPED)}],
        "resources": {"limits": {"google.com/tpu": chips}, "requests": {"google.com/tpu": chips}},
        "securityContext": {"privileged": True},  # the TPU's memory is locked
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": arguments.grace,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.chip.name],
            "cloud.google.com/gke-tpu-topology": shape(topology),
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
    }
    template: dict[str, Any] = {"spec": pod}
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    if arguments.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"].append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    if arguments.bucket:
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        container["volumeMounts"] = [{"name": "runs", "mountPath": "/runs"}]
        attributes = {"bucketName": arguments.bucket, "mountOptions": "implicit-dirs"}
        pod["volumes"] = [
            {"name": "runs", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        ]
    job = {
        "parallelism": count,
        "completions": count,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod alone is of no use: JobSet restarts them all
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # Its fellows, which saved and stopped with an evicted one.
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
            ]
        },
        "template": template,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": arguments.name,
            "labels": {"kueue.x-k8s.io/queue-name": arguments.queue},
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": arguments.max_restarts,
                "rules": [
                    {
                        "name": "interrupted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": topology.slices, "template": {"spec": job}}],
        },
    }


def xpk(arguments: argparse.Namespace, topology: Topology) -> list[str]:
    """`xpk workload create …`; its bucket is attached to the cluster beforehand (`xpk storage attach`)."""
    kind = TYPES.get(topology.chip.name, topology.chip.name)
    return [
        "xpk", "workload", "create",
        f"--cluster={arguments.cluster}",
        f"--workload={arguments.name}",
        f"--tpu-type={kind}-{shape(topology)}",
        f"--num-slices={topology.slices}",
        f"--docker-image={arguments.image}",
        f"--max-restarts={arguments.max_restarts}",
        f"--restart-on-exit-codes={STOPPED}",
        f"--termination-grace-period-seconds={arguments.grace}",
        f"--env=STOPPED_EXIT_CODE={STOPPED}",
        *(["--spot"] if arguments.spot else []),
        f"--command={shlex.join(arguments.command)}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
