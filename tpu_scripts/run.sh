#!/bin/sh
# The whole path in one line: make a TPU, install, train through pre-emptions until it is done, delete the TPU.
#   tpu_scripts/run.sh --name gpt2 --zone us-east5-b --type v6e-16 --spot --bucket B -- train --config FILE
# It is watch.sh --delete: however it ends, the TPU is deleted, save with --keep, or if you stop watching (Ctrl-C).
# What it made lies in the bucket, in runs/.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
case ${1:-} in --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;; esac
exec sh "$HERE/watch.sh" --delete "$@"
