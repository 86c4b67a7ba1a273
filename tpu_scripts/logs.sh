#!/bin/sh
# The last lines of the log of every worker, or of one.
#   tpu_scripts/logs.sh --name gpt2 --zone us-east5-b --type v6e-16 [--worker 0] [--lines 50]
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
NEEDS_TYPE=yes
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

need_ready
if [ -n "$WORKER" ]; then
    awk -v n="$WORKER" '$1 == n' "$SCRATCH/workers" >"$SCRATCH/one"
    [ -s "$SCRATCH/one" ] || die 2 "--worker $WORKER: $TPU_NAME has workers 0 to $(($(count_workers) - 1))"
    mv "$SCRATCH/one" "$SCRATCH/workers"
fi
code=0
each_worker logs "$TAIL" || code=1
[ -n "$TPU_DRY_RUN" ] || while read -r number _; do
    sed "s/^/[$number] /" "$SCRATCH/out.$number"
done <"$SCRATCH/workers"
exit "$code"
