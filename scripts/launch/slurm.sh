#!/bin/bash
# Four nodes of a SLURM cluster with eight GPUs each:
#
#   sbatch scripts/launch/slurm.sh --recipe cifar100_inc10_moe --output_dir /shared/run
#
# One task per node, whose torchrun starts a process per GPU. When a process dies, all are started anew and the run goes
# on from its last state; when SLURM requeues the job, --resume does the same.
#SBATCH --job-name=hf_zocl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:-8}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    resume=(--resume true)
fi

# A restart needs a new store, which torchrun shares by default (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus))
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "$gpus" \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "${hosts%%$'\n'*}:29500" \
    --max_restarts 3 \
    scripts/train.py --bf16 true "$@" "${resume[@]}"
