#!/usr/bin/env bash
# Train on several nodes of a SLURM cluster, one process a node:
#
#   sbatch --nodes=4 --gpus-per-node=8 sharding/launch/slurm.sh sft --model DIR --data FILE --out /shared/run ...
#
# What stands behind the script's name goes to `jaxaroo train`; data, model and --out have to be on storage that all
# nodes see. `jaxaroo` has to be on the PATH of the nodes, or JAXAROO names it. A run that was begun is gone on with:
# after a failure at once, up to RESTARTS times (10); before the time limit (SIGTERM 180 s ahead) it saves, and the job
# is put back into the queue; after a lost node SLURM does that.
#SBATCH --job-name=jaxaroo
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
set -uo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch --nodes=N slurm.sh KIND --model ... --data ... --out ..." >&2 && exit 2; }
for ((try = 0; try <= ${RESTARTS:-10}; try++)); do
    # one task that fails ends the step: the others would wait for it
    srun --kill-on-bad-exit=1 "${JAXAROO:-jaxaroo}" train "$@" --or-resume
    status=$?
    case $status in
        0) exit 0 ;;
        2) exit 2 ;; # the command line cannot be used: not again
        143) # the time is up, and all is saved
            scontrol requeue "$SLURM_JOB_ID"
            exit 0
            ;;
    esac
    echo "slurm.sh: status $status; starting again ($((try + 1)) of ${RESTARTS:-10})" >&2
done
echo "slurm.sh: gave up after ${RESTARTS:-10} restarts; the logs above say why. The checkpoints are in --out." >&2
exit 1
