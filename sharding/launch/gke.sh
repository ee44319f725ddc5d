#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet that XPK makes:
#
#   CLUSTER=my-cluster IMAGE=region-docker.pkg.dev/project/repo/jaxaroo TPU=v5litepod-64 \
#       sharding/launch/gke.sh NAME sft --model /data/model --data /data/train.jsonl --out /data/run ...
#
# What stands behind the workload's name goes to `jaxaroo train` in every pod; the image holds jaxaroo, and --out is on
# storage that all pods mount. SLICES (1) slices make one run, `--mesh.data` a multiple of them. If a pod fails, JAX's
# service ends the others and the JobSet starts all again, up to RESTARTS times (10), where the newest whole checkpoint
# is; a pod that is asked to go (SIGTERM) has 300 s to save.
set -euo pipefail

[ $# -gt 1 ] || { echo "usage: CLUSTER=... IMAGE=... TPU=... gke.sh NAME KIND --model ... --out ..." >&2 && exit 2; }
workload=$1
shift
printf -v command '%q ' jaxaroo train "$@" --or-resume
exec xpk workload create \
    --cluster="${CLUSTER:?"expected the name of the GKE cluster in CLUSTER"}" \
    --workload="$workload" \
    --docker-image="${IMAGE:?"expected a container image that holds jaxaroo in IMAGE"}" \
    --tpu-type="${TPU:?"expected the kind of slice in TPU, such as v5litepod-64"}" \
    --num-slices="${SLICES:-1}" \
    --max-restarts="${RESTARTS:-10}" \
    --termination-grace-period-seconds=300 \
    --command="$command"
