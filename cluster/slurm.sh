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
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch cluster/slurm.sh CONFIG --run-dir DIR [--set KEY=VALUE]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
source .venv/bin/activate

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head_node:6379"

# Nobody else on the network may use the cluster: a token of this allocation's own, readable by its owner only.
umask 077
RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/.ray-token-$SLURM_JOB_ID"
export RAY_AUTH_TOKEN_PATH RAY_AUTH_MODE=token
python -c "import secrets; print(secrets.token_hex(32), end='')" > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

# symmetric-run ends with `ray stop`, which stops every Ray of this user on the node: hence --exclusive.
srun --kill-on-bad-exit=1 ray symmetric-run \
    --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "${SLURM_CPUS_ON_NODE:?}" \
    -- env RAY_ADDRESS="$address" patterning run "$@"
