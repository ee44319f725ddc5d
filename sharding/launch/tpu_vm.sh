#!/usr/bin/env bash
# Train on all workers of a TPU VM slice, over ssh, from a machine that has gcloud:
#
#   ZONE=us-west4-a sharding/launch/tpu_vm.sh NAME sft --model /mnt/model --data /mnt/train.jsonl --out /mnt/run ...
#
# What stands behind the slice's name goes to `jaxaroo train` on every worker, where `jaxaroo` has to be on the PATH, or
# JAXAROO names it; model, data and --out are on storage that all of them see (NFS, a mounted bucket). Processes find each other by
# the slice's own metadata. If one worker fails, all end, and all are started again, up to RESTARTS times (10), where
# the newest whole checkpoint is. A slice that is gone (preempted) is not made anew: make one, and run this again.
set -uo pipefail

[ $# -gt 1 ] || { echo "usage: ZONE=... tpu_vm.sh NAME KIND --model ... --data ... --out ..." >&2 && exit 2; }
slice=$1 zone=${ZONE:?"expected the slice's zone in ZONE"}
shift
printf -v command '%q ' "${JAXAROO:-jaxaroo}" train "$@" --or-resume
for ((try = 0; try <= ${RESTARTS:-10}; try++)); do
    gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" --worker=all \
        --command="JAXAROO_COORDINATOR=auto exec $command"
    status=$?
    [ $status -ne 0 ] || exit 0
    [ $status -ne 2 ] || exit 2 # the command line cannot be used: not again
    state=$(gcloud compute tpus tpu-vm describe "$slice" --zone="$zone" --format="value(state)")
    if [ "$state" != READY ]; then
        echo "tpu_vm.sh: $slice is ${state:-gone}; make it anew and run this again, the run goes on where it was." >&2
        exit 1
    fi
    echo "tpu_vm.sh: status $status; starting all workers again ($((try + 1)) of ${RESTARTS:-10})" >&2
    # whoever still waits for the one that failed
    gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" --worker=all --command="pkill -f '[j]axaroo train' || true"
done
echo "tpu_vm.sh: gave up after ${RESTARTS:-10} restarts; the output above says why." >&2
exit 1
