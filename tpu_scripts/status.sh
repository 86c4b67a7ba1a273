#!/bin/sh
# What a TPU is doing: its state, and for each worker "running", "exit CODE" or "none" (nothing started).
#   tpu_scripts/status.sh --name gpt2 --zone us-east5-b --type v6e-16
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
NEEDS_TYPE=yes
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

found=$(state) || exit $?
say "$TPU_NAME: $found"
[ "$found" = READY ] || exit 0
code=0
each_worker state || code=1
[ -n "$TPU_DRY_RUN" ] || while read -r number node worker address; do
    say "worker $number ($node, $worker, $address): $(cat "$SCRATCH/out.$number")"
done <"$SCRATCH/workers"
exit "$code"
