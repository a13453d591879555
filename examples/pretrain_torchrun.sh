#!/usr/bin/env bash
# All GPUs of one machine:      examples/pretrain_torchrun.sh CONFIG.toml [--any.field value ...]
# Several machines, on each:    NODES=4 HEAD=node1:29400 examples/pretrain_torchrun.sh CONFIG.toml ...
#
#   NODES   machines; HEAD is any one of them, with a free port that the others reach
#   GPUS    processes per machine; all its GPUs by default
#   RUN_ID  tells runs apart that meet at the same HEAD
#
# A rank that dies stops all; torchrun starts them again, three times at most, from the newest checkpoint.
set -euo pipefail

NODES=${NODES:-1}
if [ "$NODES" = 1 ]; then
  meeting=(--standalone)
else
  meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?HEAD=host:port of one machine}"
    --rdzv-id "${RUN_ID:-megalite}")
fi

# On SIGTERM torchrun passes it on and waits this long (30 s by default) for the ranks to save before it kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun "${meeting[@]}" --nproc-per-node "${GPUS:-gpu}" --max-restarts 3 -m megalite pretrain "$@"
