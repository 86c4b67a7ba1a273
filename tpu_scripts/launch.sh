#!/bin/sh
# Start the same command on every worker of a TPU, in tmux: it goes on when your connection is gone.
#   tpu_scripts/launch.sh --name gpt2 --zone us-east5-b --type v6e-16 --bucket B -- train --config configs/gpt2_124m.toml
# On each worker ~/jaxgpt-run has the command, the log, and at the end the exit code.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
NEEDS_TYPE=yes
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

[ $# -gt 0 ] || die 2 "say what to run, after --, for example: -- train --config configs/gpt2_124m.toml"
need_ready
count=$(count_workers)
need_bucket "$count"
[ -n "$TPU_BUCKET" ] || [ -z "$TPU_SPOT" ] ||
    say "no --bucket: when this spot TPU is taken away, its checkpoints go with it, and the run starts anew"
address=$(awk 'NR == 1 {print $4}' "$SCRATCH/workers")
# All or none: a TPU program that runs on a part of its hosts waits for the others.
code=0
each_worker start "$(now)-$$" "$TPU_BUCKET" "$address:8476" "$count" "$@" || code=$?
if [ "$code" != 0 ]; then
    each_worker stop || true
    die "$([ "$code" = 255 ] && echo 75 || echo "$code")" "not started on every worker; stopped on the others"
fi
say "started on $count workers: jaxgpt $*"
