#!/usr/bin/env bash
# A command on the nodes of a SLURM cluster, one task a node, begun again until it is done:
#
#     sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh \
#         python -m launch.train --config configs/clip/vit_b32.py --workdir /shared/runs/vit-b32
#
# Five minutes before its time is over, and when it is preempted, the run saves and stops; the job then queues itself
# again and, with the same workdir, goes on. The workdir lies on a file system that all nodes share.
# DRY_RUN=1 prints the commands instead.
#SBATCH --job-name=clip-jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

STOPPED=75 # what a run returns that was stopped before its last step
export STOPPED_EXIT_CODE=$STOPPED

if [[ $# -eq 0 ]]; then
    echo "error: nothing to run; usage: sbatch --nodes=N launch/slurm.sh COMMAND …" >&2
    exit 2
fi

step=(srun --kill-on-bad-exit=1 --ntasks-per-node="${SLURM_NTASKS_PER_NODE:-1}" "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")

if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${step[@]}" && echo
    echo "# when it returns $STOPPED:"
    printf '%q ' "${requeue[@]}" && echo
    exit 0
fi

"${step[@]}" &
child=$!
# srun itself would end at once, and kill its tasks.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

# A trapped signal ends `wait` early: its result counts only when the step has ended.
code=0
wait $child || code=$?
while kill -0 $child 2>/dev/null; do
    code=0
    wait $child || code=$?
done

if [[ $code -eq $STOPPED ]]; then
    echo "stopped before its last step: queued again"
    "${requeue[@]}"
fi
exit "$code"
