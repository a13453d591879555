#!/usr/bin/env bash
#SBATCH --job-name=megalite
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8        # one task per GPU
#SBATCH --gpus-per-node=8          # not per task: every task sees all GPUs of its node and takes its own
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600          # to every task, 10 minutes before the end (and at preemption, see README.md)
#SBATCH --requeue                  # after a node failure, by Slurm itself
#SBATCH --open-mode=append
#SBATCH --output=megalite-%j.log
#
#   sbatch --nodes 8 examples/pretrain_slurm.sh CONFIG.toml [--any.field value ...]
#
# The ranks answer USR1 and TERM by saving and exiting with 75: the job then requeues itself, and goes on from there.
# If a rank is lost (the others say which, and exit with 69), they start again here, three times at most.
set -u

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

trap : TERM USR1                   # meant for the ranks; this script waits for them
for attempt in 1 2 3; do
  # The ranks end together by themselves. Were srun to kill them at the first one's exit, some would not exit with 75.
  srun --kill-on-bad-exit=0 --wait=120 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m megalite pretrain "$@"' rank "$@"
  code=$?
  case $code in
    75) exec scontrol requeue "$SLURM_JOB_ID" ;;
    69 | 13[0-9] | 14[0-9]) echo "attempt $attempt of 3: a rank was lost (exit code $code)" >&2 ;;
    *) exit $code ;;
  esac
done
exit $code
