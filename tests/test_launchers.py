"""How each platform starts a command: manifests against their schema, scripts by shellcheck, and runs of them with
stand-ins for what only the cloud has.
"""

import gzip
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT

from clip_jax.errors import ConfigError
from launch import cluster, gke

COMMAND = ["python", "-m", "launch.train", "--config", "configs/clip/vit_b32.py", "--workdir", "/runs/it"]
JOBSET = ["--name", "it", "--topology", "v5p:4x4x8", "--image", "r/c:1", "--bucket", "b"]


def strict(schema: Any) -> Any:
    """The schema with no other fields than it names, as the API server has it."""
    if isinstance(schema, list):
        return [strict(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        out["additionalProperties"] = False
    return out


def manifest(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    gke.main([*JOBSET, *arguments, "--", *COMMAND])
    return yaml.safe_load(capsys.readouterr().out)


def test_the_jobset_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    schema = strict(json.loads(gzip.decompress((ROOT / "tests/data/jobset.schema.json.gz").read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}  # every object's
    check = jsonschema.Draft202012Validator(schema)
    for more in ([], ["--slices", "4", "--spot", "--service-account", "runner", "--queue", "q"]):
        found = manifest(capsys, *more)
        assert not [f"{error.json_path}: {error.message}" for error in check.iter_errors(found)]
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["backOffLimit"] = 0
    assert [f"{error.json_path}: {error.message}" for error in check.iter_errors(found)]  # a misspelt field is found


def test_the_jobset_has_a_pod_for_each_host_and_time_to_save(capsys: pytest.CaptureFixture[str]) -> None:
    found = manifest(capsys, "--slices", "2", "--grace", "900")
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    job = found["spec"]["replicatedJobs"][0]
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 128 // 4
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 900
    assert pod["containers"][0]["command"] == COMMAND
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"


@pytest.mark.parametrize(
    ("topology", "accelerator", "expected"),
    [
        ("v4-8", "tpu-v4-podslice", (1, 4)),
        ("v5litepod-256", "tpu-v5-lite-podslice", (64, 4)),
        ("v5e:1x1", "tpu-v5-lite-podslice", (1, 1)),
        ("v6e:4x8", "tpu-v6e-slice", (8, 4)),
        ("tpu7x:4x4x4", "tpu7x", (16, 4)),
    ],
)
def test_slices_are_so_many_hosts(topology: str, accelerator: str, expected: tuple[int, int]) -> None:
    found = gke.parse(topology)
    assert gke.hosts(found) == expected
    assert gke.ACCELERATORS[found.chip.name] == accelerator


def test_a_workdir_behind_an_equals_sign_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["python", "-m", "launch.train", "--workdir=/runs/it"]
    gke.main([*JOBSET, "--", *command])
    assert "--workdir=/runs/it" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--bucket and a --workdir under /runs belong together"):
        gke.main([*JOBSET, "--bucket", "", "--", *command])


def test_xpk_gets_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    gke.main(["--xpk", "--cluster", "c", *JOBSET, "--", *COMMAND])
    printed = capsys.readouterr().out
    assert printed.startswith("xpk workload create --cluster=c --workload=it --tpu-type=v5p-4x4x8 --num-slices=1 ")
    assert "--restart-on-exit-codes=75" in printed
    assert f"'--command={' '.join(COMMAND)}'" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "It_"], "--name It_: expected up to 40 small letters"),
        (["--topology", "v5p:4x4"], "v5p chips stand in 3 dimensions"),
        (["--bucket", ""], "--bucket and a --workdir under /runs belong together"),
        (["--xpk"], "--xpk needs --cluster"),
        (["--slices", "0"], "--slices 0: expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        gke.main([*JOBSET, *arguments, "--", *COMMAND])


def shell(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments], cwd=ROOT, env=os.environ | environ, capture_output=True, text=True
    )


def test_shellcheck_finds_nothing() -> None:
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert len(scripts) == 2
    subprocess.run([Path(sys.executable).parent / "shellcheck", *scripts], check=True)


def test_a_dry_run_prints_every_command() -> None:
    where = ["my-pod", "--zone", "us-west4-a", "--dry-run"]
    done = shell("tpu_vm.sh", "watch", *where, "--type", "v5litepod-256", "--bucket", "b", "--spot", "--", *COMMAND)
    lines = [line for line in done.stdout.splitlines() if line.startswith("gcloud")]
    assert lines[0] == (
        "gcloud compute tpus queued-resources create my-pod --node-id=my-pod --accelerator-type=v5litepod-256 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --metadata=bucket=b --zone=us-west4-a "
    )
    assert f"# run.sh: {' '.join(COMMAND)} \n" in done.stdout
    assert lines[-1].startswith("gcloud compute tpus queued-resources delete my-pod --force")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start", "x"], "error: start: expected create, sync, run, logs, watch or delete"),
        (["create", "x", "--zone", "z"], "error: create needs --type"),
        (["create", "x", "--type", "v5p-8"], "error: --zone is missing"),
        (["run", "x", "--zone", "z"], "error: run needs a command after --"),
        (["create", "x", "--zone", "z", "--type", "v9-8"], "error: --type v9-8: no runtime is known for it"),
    ],
)
def test_what_tpu_vm_lacks_is_one_line(arguments: list[str], message: str) -> None:
    done = shell("tpu_vm.sh", *arguments)
    assert (done.returncode, done.stderr.startswith(message)) == (2, True), done.stderr


GCLOUD = """#!/usr/bin/env python3
# A slice of one worker: what is sent to it happens in $WORKER.
import os, shutil, subprocess, sys
words, worker = sys.argv[1:], os.environ["WORKER"]
with open(f"{worker}/gcloud.log", "a") as log:
    log.write(" ".join(words[2:5]) + "\\n")
if words[3] == "describe":
    print("ACTIVE")
elif words[3] == "scp":
    asked = open(f"{worker}/gcloud.log").read().count("queued-resources create")
    if asked <= int(os.environ.get("LOST", 0)):
        sys.exit("the slice is gone")
    shutil.copy(words[4], f"{worker}/" + words[5].split(":")[1])
elif words[3] == "ssh":
    command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    if "uv venv" in command:
        command = "mkdir -p clip-jax && tar -xzf clip-jax.tar.gz -C clip-jax"
    sys.exit(subprocess.run(["bash", "-c", command], cwd=worker, env=os.environ | {"HOME": worker}).returncode)
"""


def watch(folder: Path, run: str, **environ: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`tpu_vm.sh watch` with a gcloud of our own, and what that was asked for."""
    stand_in = folder / "gcloud"
    stand_in.write_text(GCLOUD)
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    done = shell(
        "tpu_vm.sh", "watch", "pod", "--zone", "z", "--type", "v5p-8", "--", "bash", "-c", run,
        PATH=f"{folder}:{os.environ['PATH']}", WORKER=str(folder), HEALTH_SECONDS="0.2", **environ,
    )  # fmt: skip
    return done, (folder / "gcloud.log").read_text().splitlines()


@pytest.mark.parametrize(("lost", "code"), [(1, 0), (3, 2)])
def test_a_slice_that_is_lost_in_its_set_up_is_deleted_and_asked_for_three_times(
    tmp_path: Path, lost: int, code: int
) -> None:
    done, asked = watch(tmp_path, "exit 0", LOST=str(lost))
    assert done.returncode == code
    assert asked.count("queued-resources create pod") == asked.count("queued-resources delete pod") == min(lost + 1, 3)
    said = "the run returned 0" if code == 0 else "error: pod: could not be set up, three times in a row"
    assert said + "\n" in done.stdout + done.stderr


def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path: Path) -> None:
    # Stopped the first time, done the second.
    run = 'test -e ../second && exit 0; touch ../second; exit "$STOPPED_EXIT_CODE"'
    done, asked = watch(tmp_path, run)
    assert done.returncode == 0, done.stderr
    assert "the slice was taken away; asking for another\n" in done.stdout
    assert done.stdout.endswith("the run returned 0\n")
    assert [line for line in asked if "describe" not in line and "cat" not in line].count(
        "queued-resources create pod"
    ) == 2
    assert asked.count("queued-resources delete pod") == 2
    assert (tmp_path / "clip-jax" / "launch" / "train.py").exists()  # the project itself was sent


def test_the_container_is_made_of_what_is_there() -> None:
    for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


@pytest.mark.parametrize(
    ("environ", "has_tpu", "expected"),
    [
        ({}, False, None),
        ({}, True, {}),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False, None),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"},
            False,
            {"cluster_detection_method": "slurm", "local_device_ids": list(range(8))},
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "SLURM_NTASKS": "4"},
            True,
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_processes_are_joined_as_the_platform_says(environ: dict[str, str], has_tpu: bool, expected: Any) -> None:
    assert cluster.how(environ, has_tpu) == expected


def test_half_of_an_address_is_named() -> None:
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID not set"):
        cluster.how({"JAX_COORDINATOR_ADDRESS": "a:1"}, False)
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID is '2' of JAX_NUM_PROCESSES '2'"):
        cluster.how({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, False)
