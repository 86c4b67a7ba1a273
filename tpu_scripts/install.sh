#!/bin/sh
# Put the code, at one commit, with a Python of its own, on every worker of a TPU. Done already: nothing happens.
#   tpu_scripts/install.sh --name gpt2 --zone us-east5-b --type v6e-16 [--commit C] [--repo URL]
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
NEEDS_TYPE=yes
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

do_here() { if [ -n "$TPU_DRY_RUN" ]; then printf '%s\n' "$(quote "$@" | cut -c 2-)"; else "$@"; fi; }

commit=$(need_commit) || exit $?
stage=$SCRATCH/stage
[ -z "$TPU_DRY_RUN" ] || stage=.
mkdir -p "$stage"
set -- "$stage/jaxgpt-worker.sh"
do_here cp "$HERE/worker.sh" "$1"
if [ -z "$TPU_REPO" ]; then
    [ -z "$(git -C "$HERE/.." status --porcelain)" ] || say "changes that are not committed are not taken along"
    set -- "$@" "$stage/jaxgpt-code.tar.gz"
    do_here git -C "$HERE/.." archive --output "$2" "$commit"
fi

need_ready
copy_to() { # NUMBER NODE WORKER FILES...
    number=$1 node=$2 worker=$3
    shift 3
    for wait in 5 15 30 60 120 0; do
        api scp "$node" "$worker" "$@" </dev/null && return
        [ "$wait" != 0 ] || { tail -n 3 "$COMPLAINT" && die 75 "worker $number of $TPU_NAME does not answer"; }
        pause "$wait"
    done
}
# To 16 at a time, but to the first one alone: the first contact makes an ssh key and spreads it.
failed=0 batch=''
while read -r number node worker _; do
    [ -z "$TPU_DRY_RUN" ] || { copy_to "$number" "$node" "$worker" "$@" && continue; }
    (COMPLAINT=$SCRATCH/complaint.$number && copy_to "$number" "$node" "$worker" "$@") >"$SCRATCH/out.$number" 2>&1 &
    batch="$batch $number:$!"
    [ $((number % 16)) -ne 0 ] || wait_for_batch
    [ "$failed" = 0 ] || break
done <"$SCRATCH/workers"
wait_for_batch
[ "$failed" = 0 ] || exit 75
say "installing $commit on $(count_workers) workers (minutes)"
each_worker install "$commit" "$TPU_PYTHON" "$TPU_EXTRAS" "$TPU_REPO" "$TPU_BUCKET" || die 1 "not installed on every worker"
say "installed"
