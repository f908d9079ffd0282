#!/usr/bin/env bash
# One run on a Slurm allocation: Ray is started on every node, the run on the first, and Ray is stopped at the end.
#
#     sbatch cluster/slurm.sh configs/quickstart.yaml --run-dir /shared/runs/quickstart
#
# Submit from the checkout, on storage that all nodes share. The same command takes an unfinished run up again.
#SBATCH --job-name=patterning
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
# Before its time is up (or it is preempted, where PreemptParameters has send_user_signal) this script gets SIGTERM and
# hands it to the run, which saves its checkpoints and leaves within 30 s; the job is then queued again and goes on.
# 60 s, for Slurm looks at its clock every 30. Without the notice only what was not yet saved is done again.
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch cluster/slurm.sh CONFIG --run-dir DIR [--set KEY=VALUE]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
source .venv/bin/activate

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head_node:6379"

# Token authentication is on, with a token of this allocation's own that only its owner can read. To look at the
# dashboard meanwhile: ssh -L 8265:127.0.0.1:8265 HEAD_NODE, and give it what is in this file.
umask 077
private="$SLURM_SUBMIT_DIR/.patterning-$SLURM_JOB_ID"
mkdir -p "$private"
trap 'rm -rf "$private"' EXIT
export RAY_AUTH_TOKEN_PATH="$private/token" RAY_AUTH_MODE=token
python -c "import secrets; print(secrets.token_hex(32), end='')" > "$RAY_AUTH_TOKEN_PATH"

# srun passes no signal on to the run, nor does symmetric-run: it goes straight to the process, which is on this node.
told=0
leave() {
    told=1
    kill -TERM "$(cat "$private/driver.pid")" 2> /dev/null || true
}
trap leave TERM

# symmetric-run ends with `ray stop`, which stops every Ray of this user on the node: hence --exclusive.
srun --kill-on-bad-exit=1 ray symmetric-run \
    --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "${SLURM_CPUS_ON_NODE:?}" \
    -- env RAY_ADDRESS="$address" bash -c 'echo $$ > "$0"; exec patterning run "$@"' "$private/driver.pid" "$@" &
srun=$!
code=0
wait "$srun" || code=$?
# A trap ends `wait` early; the run is still leaving.
while kill -0 "$srun" 2> /dev/null; do
    code=0
    wait "$srun" || code=$?
done

# Preempted jobs are queued again by Slurm, cancelled ones must not be: only a job that ran into its own time limit.
if [[ $told == 1 && $code != 0 && $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
