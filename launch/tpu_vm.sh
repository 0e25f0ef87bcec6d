#!/usr/bin/env bash
# A command on all workers of a TPU VM slice (cloud.google.com/tpu/docs/queued-resources), begun again until it is done:
#
#     launch/tpu_vm.sh create my-pod --type v5litepod-256 --zone us-west4-a --bucket BUCKET
#     launch/tpu_vm.sh sync   my-pod --zone us-west4-a
#     launch/tpu_vm.sh run    my-pod --zone us-west4-a -- python -m launch.train --config FILE --workdir /runs/NAME
#     launch/tpu_vm.sh logs   my-pod --zone us-west4-a
#     launch/tpu_vm.sh delete my-pod --zone us-west4-a
#
# or all of it at once, with a new slice whenever one is preempted:
#
#     launch/tpu_vm.sh watch  my-pod --type v5litepod-256 --zone us-west4-a --bucket BUCKET --spot \
#         -- python -m launch.train --config FILE --workdir /runs/NAME
#
# The bucket is mounted at /runs, so that a workdir there outlives the slice. --dry-run prints each command instead.
# Others: --project P, --slices N, --runtime VERSION (by default the one of the type).
set -euo pipefail
cd "$(dirname "$0")/.."

STOPPED=75 # what a run returns that was stopped before its last step
HEALTH_SECONDS=${HEALTH_SECONDS:-60}

fail() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,17s/^# \{0,1\}//p' "$0"
}

run_or_print() {
    if [[ -n $dry ]]; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}

tpu() { # a subcommand of `gcloud compute tpus`, with where
    run_or_print gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
}

everywhere() { # a shell command on every worker of every slice
    for node in "${nodes[@]}"; do
        tpu tpu-vm ssh "$node" --worker=all --command="$1"
    done
}

default_runtime() {
    case $1 in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) fail "--type $1: no runtime is known for it; name one with --runtime" ;;
    esac
}

create() {
    [[ -n $type ]] || fail "create needs --type, such as v5litepod-256"
    local of_one=(--node-id="$name")
    [[ $slices -eq 1 ]] || of_one=(--node-count="$slices" --node-prefix="$name")
    tpu queued-resources create "$name" "${of_one[@]}" --accelerator-type="$type" --runtime-version="$runtime" \
        ${spot:+--spot} ${bucket:+--metadata=bucket="$bucket"}
    echo "waiting for the slice"
    [[ -z $dry ]] || { tpu queued-resources describe "$name" --format="value(state.state)" && return; }
    until [[ $(state) == ACTIVE ]]; do
        case $(state) in
            FAILED | SUSPENDED) fail "$name: $(state)" ;;
        esac
        sleep "$HEALTH_SECONDS"
    done
}

state() {
    gcloud compute tpus queued-resources describe "$name" --zone="$zone" ${project:+--project="$project"} \
        --format="value(state.state)" 2>/dev/null || echo GONE
}

# The project as git knows it, its pinned dependencies, and the bucket.
sync() {
    local archive
    archive=$(mktemp --suffix=.tar.gz)
    run_or_print git archive --format=tar.gz --output="$archive" HEAD
    for node in "${nodes[@]}"; do
        tpu tpu-vm scp "$archive" "$node":clip-jax.tar.gz --worker=all
    done
    rm -f "$archive"
    everywhere "$SETUP"
}

# shellcheck disable=SC2016  # expanded on the workers
SETUP='set -e
mkdir -p clip-jax && sudo mkdir -p /runs && sudo chown "$USER" /runs && tar -xzf clip-jax.tar.gz -C clip-jax && cd clip-jax
python3 -m pip install --quiet --user uv && export PATH=$HOME/.local/bin:$PATH
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --require-hashes -r requirements.lock
uv pip freeze --quiet --exclude-editable > constraints.txt
uv pip install --quiet -e ".[tpu]" -c constraints.txt
bucket=$(curl -sf -H "Metadata-Flavor: Google" \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/bucket || true)
if [ -n "$bucket" ] && ! mountpoint -q /runs; then
    command -v gcsfuse > /dev/null || {
        echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \
            | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
        curl -sf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc > /dev/null
        sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
    }
    gcsfuse --implicit-dirs "$bucket" /runs
fi'

# In the background: the run outlives this terminal. Its exit code is written when it has ended.
run() {
    [[ ${#command[@]} -gt 0 ]] || fail "run needs a command after --"
    local script
    script=$(mktemp --suffix=.sh)
    {
        echo "cd ~/clip-jax && export PATH=\$PWD/.venv/bin:\$PATH STOPPED_EXIT_CODE=$STOPPED"
        printf '%q ' "${command[@]}"
        printf '\necho $? > ~/exit_code\n'
    } > "$script"
    for node in "${nodes[@]}"; do
        tpu tpu-vm scp "$script" "$node":run.sh --worker=all
    done
    [[ -z $dry ]] || sed 's/^/# run.sh: /' "$script"
    rm -f "$script"
    everywhere "rm -f exit_code; nohup bash run.sh > run.log 2>&1 < /dev/null &"
}

logs() {
    tpu tpu-vm ssh "${nodes[0]}" --worker=0 --command="tail -n 100 -F run.log"
}

exit_code() { # of the run on the first worker; nothing while it goes on
    gcloud compute tpus tpu-vm ssh "${nodes[0]}" --worker=0 --zone="$zone" ${project:+--project="$project"} \
        --command="cat exit_code 2>/dev/null" 2>/dev/null || true
}

delete() {
    tpu queued-resources delete "$name" --force --quiet
}

watch() {
    [[ ${#command[@]} -gt 0 ]] || fail "watch needs a command after --"
    [[ -n $type ]] || fail "watch needs --type, such as v5litepod-256"
    local failed=0 status
    while true; do
        set +e # so that what fails in the set-up ends it, and not this loop, which has a slice to delete
        (set -e; create; sync; run)
        status=$?
        set -e
        if [[ $status -ne 0 ]]; then
            delete || true
            failed=$((failed + 1))
            [[ $failed -lt 3 ]] || fail "$name: could not be set up, three times in a row"
            echo "the slice could not be set up; asking for another"
            continue
        fi
        failed=0
        if [[ -n $dry ]]; then
            echo "# every $HEALTH_SECONDS s: a slice that is no longer ACTIVE, or a run that returned $STOPPED, is begun again"
            delete
            return
        fi
        local code=""
        while [[ -z $code && $(state) == ACTIVE ]]; do
            sleep "$HEALTH_SECONDS"
            code=$(exit_code)
        done
        delete || true
        if [[ -n $code && $code -ne $STOPPED ]]; then
            echo "the run returned $code"
            return "$code"
        fi
        echo "the slice was taken away; asking for another"
    done
}

dry="" zone="" project="" type="" runtime="" bucket="" spot="" slices=1 command=()
[[ $# -gt 0 ]] || { usage && exit 2; }
action=$1 && shift
if [[ $action == --dry-run ]]; then
    [[ $# -gt 0 ]] || fail "--dry-run of what? create, sync, run, logs, watch or delete"
    dry=yes action=$1 && shift
fi
case $action in
    create | sync | run | logs | watch | delete) ;;
    -h | --help | help) usage && exit ;;
    *) fail "$action: expected create, sync, run, logs, watch or delete" ;;
esac
[[ $# -gt 0 && $1 != -* ]] || fail "$action needs the name of a slice"
name=$1 && shift
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=yes && shift ;;
        --spot) spot=yes && shift ;;
        --) shift && command=("$@") && break ;;
        --type | --zone | --project | --runtime | --bucket | --slices)
            [[ $# -gt 1 ]] || fail "$1 needs a value"
            printf -v "${1#--}" '%s' "$2" && shift 2
            ;;
        *) fail "$1: unknown; a command comes after --" ;;
    esac
done
[[ -n $zone ]] || fail "--zone is missing, such as us-west4-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices: expected a number"
if [[ -n $type && -z $runtime ]]; then
    runtime=$(default_runtime "$type")
fi
nodes=("$name")
if [[ $slices -gt 1 ]]; then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

"$action"
