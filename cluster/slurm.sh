#!/bin/bash
# One sweep on Slurm: a Ray cluster over the nodes of this job, gone when the sweep ends.
#   sbatch cluster/slurm.sh sweeps/inat.py --storage /shared/runs
# Nodes, GPUs, CPUs and time are the lines below or options of sbatch; a sweep that ran out of time goes on with --resume.
#SBATCH --job-name=imbvlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --exclusive
set -euo pipefail

# Must be set: an environment with this package and cluster/requirements.txt, at the same path on every node.
: "${IMBVLM_ENV:?set it to the folder of the environment: IMBVLM_ENV=/shared/imbvlm-env sbatch cluster/slurm.sh ...}"

[ $# -gt 0 ] || { echo "which sweep? sbatch cluster/slurm.sh sweeps/inat.py --storage /shared/runs" >&2; exit 2; }
[ -x "$IMBVLM_ENV/bin/ray" ] || { echo "$IMBVLM_ENV has no bin/ray; see cluster/README.md" >&2; exit 2; }
[ -f "$1" ] || { echo "$1 is not there; start sbatch in the repository's root" >&2; exit 2; }
: "${SLURM_JOB_NUM_NODES:?this runs under sbatch}"
export PATH="$IMBVLM_ENV/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Seconds that nodes wait for each other: an environment on a shared disk takes longer than Ray's 30 the first time.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# Home is shared: every node finds the token there, and it is in no command line.
test -s ~/.ray/auth_token || (umask 077 && ray get-auth-token --generate > /dev/null)
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# The same command on every node: the head's also runs the sweep, the others serve it until it ends. Workers ask the
# dashboard too, so it isn't on loopback alone; it wants the token. Without its own --cpus-per-task srun (since 22.05)
# gives each node's task a single core.
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --dashboard-host 0.0.0.0 --num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" -- python "$@"
