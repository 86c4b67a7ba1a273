#!/bin/sh
# Make a TPU and wait until it is ready.
#   tpu_scripts/create.sh --name gpt2 --zone us-east5-b --type v6e-16 --spot
# Exit codes: 0 ready; 2 your input, login or quota; 42 taken away while it was made; 75 no capacity in time; 1 else.
# Where it fails, nothing of what it made is left.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
NEEDS_TYPE=yes
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

ours='' # whether there is something that this script made: a TPU that was there before is not ours to delete
[ "$API" = tpu ] || ours=yes
give_up() { # CODE MESSAGE
    [ -z "$ours" ] || sh "$HERE/delete.sh" >&3 || true
    die "$1" "$2"
}

made() { # CODE of the attempt: true if it was made; ends the script where another attempt cannot help
    case $1 in
        0) return 0 ;;
        5) return 1 ;;
        4) die 2 "there is a TPU VM named $TPU_NAME that was made in another way; take another --name, or --no-queue" ;;
        3) tail -n 3 "$COMPLAINT" >&2 && give_up 2 "there is no $TPU_TYPE, or no such image or reservation, in $TPU_ZONE" ;;
        *) give_up "$1" "could not make $TPU_NAME" ;;
    esac
}

trap 'say "no longer waiting; what was asked for stays, and costs money once it is there. To delete it: delete.sh"; exit 130' INT

found=NONE
[ -n "$TPU_DRY_RUN" ] || found=$(state) || exit $?
deadline=$(($(now) + TPU_QUEUE_HOURS * 3600)) wait=60
case $found in
    READY*) say "$TPU_NAME is there already, and ready" && exit 0 ;;
    CREATING*) ours=yes && say "$TPU_NAME is being made already" ;;
    NONE)
        code=0
        api create || code=$?
        until made "$code"; do
            [ "$(now)" -lt "$deadline" ] || give_up 75 "no capacity in $TPU_ZONE within $TPU_QUEUE_HOURS h; try another zone"
            say "no capacity for $TPU_TYPE in $TPU_ZONE now; again in $wait s"
            pause "$wait"
            wait=$((wait < 600 ? wait * 2 : 600)) code=0
            api create || code=$?
        done
        ours=yes
        say "asked for $TPU_NAME: $TPU_SLICES x $TPU_TYPE in $TPU_ZONE${TPU_SPOT:+, spot}"
        ;;
    PREEMPTED*) die 42 "$TPU_NAME is $found; delete it with delete.sh, then make it again" ;;
    *) die 1 "$TPU_NAME is $found; delete it with delete.sh, then make it again" ;;
esac

before=''
while :; do
    found=$(state) || give_up $? "cannot learn what became of $TPU_NAME"
    [ "$found" = "$before" ] || say "$TPU_NAME: $found"
    before=$found
    case $found in
        READY*) exit 0 ;;
        CREATING*) [ "$(now)" -lt "$deadline" ] || give_up 75 "$TPU_NAME was not ready within $TPU_QUEUE_HOURS h" ;;
        PREEMPTED*) give_up 42 "$TPU_NAME was taken away while it was made" ;;
        *[Qq]uota* | *QUOTA*) give_up 2 "$TPU_NAME: no quota; see docs/tpu.md" ;;
        *) give_up 1 "$TPU_NAME: $found" ;;
    esac
    pause 30
done
