#!/bin/bash
# A run over several nodes, one rank per GPU, without a launcher beside srun:
#   sbatch examples/slurm.sh RECIPE out=/shared/runs/first engine.stage=3
# Submitted again with the same `out`, it goes on where it was stopped.
#SBATCH --job-name=prism-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM ten minutes before the end: the ranks finish their step, save, and exit with 0.
#SBATCH --signal=TERM@600
set -euo pipefail

recipe=$1
shift
out=""
for override in "$@"; do
    case $override in out=*) out=${override#out=} ;; esac
done
[[ -n $out ]] || { echo "give out=PATH on a file system that all nodes share" >&2; exit 2; }

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS

if [[ -f $out/config.yaml ]]; then
    command=(resume "$out")
else
    command=(run "$recipe" engine.kind=deepspeed "$@")
fi
# The first rank that fails ends the job.
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m prism_fast "$@"' rank "${command[@]}"
