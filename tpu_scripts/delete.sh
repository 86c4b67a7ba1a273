#!/bin/sh
# Delete a TPU and all that was made for it, in whatever state it is; says what it deleted.
#   tpu_scripts/delete.sh --name gpt2 --zone us-east5-b [--type T] [--slices N]
# Nothing there: exit code 0. Something left that may cost money: 1, with the command that deletes it.
# The bucket, and what is in it, stays.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

LEFT=0 DELETED=0
if [ -n "$TPU_TYPE" ]; then
    api delete
else
    tpu_delete
    gce_delete
fi
if [ "$LEFT" != 0 ]; then exit 1; fi
[ "$DELETED" != 0 ] || say "there is no $TPU_NAME in $TPU_ZONE; nothing to delete"
