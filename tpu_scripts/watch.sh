#!/bin/sh
# Keep a run going on a TPU until it is done: make the TPU if it is not there, or was taken away, install, start the
# command, and start it again when it ended before it was done. You may stop watching (Ctrl-C) and come back later.
#   tpu_scripts/watch.sh --name gpt2 --zone us-east5-b --type v6e-16 --spot --bucket B [--delete] -- train --config FILE
# The run's exit codes: 0 done; 42 saved, so go on (at most --resumes times, as after a pre-emption); 1 and 75: again,
# at most --retries times in a row; 2 and 74: stop. Its own exit code is the run's last; 42 where the resumes are used
# up, 124 where the hours are.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
NEEDS_TYPE=yes
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

[ $# -gt 0 ] || die 2 "say what to run, after --, for example: -- train --config configs/gpt2_124m.toml"
# What would stop it after hours in the queue is found now.
commit=$(need_commit) || exit $?
need_bucket $(($(api hosts) * TPU_SLICES))
check_run() { # COMMAND...: what the workers would refuse; check.py stands where they will, in the code that they get
    if [ "$TPU_CHECK" = none ] || [ -n "$TPU_DRY_RUN" ]; then
        say "the run is not checked before the TPU is asked for"
        return
    fi
    command -v "$TPU_CHECK" >/dev/null || die 2 "--check $TPU_CHECK: there is no such Python; none: do not check the run"
    there=$SCRATCH/home
    mkdir -p "$there/jaxgpt" "$there/jaxgpt-bucket/runs" "$there/jaxgpt-bucket/prepared"
    if [ -n "$TPU_REPO" ]; then
        git clone --quiet -- "$TPU_REPO" "$there/jaxgpt" || die 2 "--repo $TPU_REPO: cannot be cloned"
        git -C "$there/jaxgpt" checkout --quiet "$commit" || die 2 "--commit $commit: not in $TPU_REPO"
    else
        git -C "$HERE/.." archive "$commit" | tar -xf - -C "$there/jaxgpt"
    fi
    ln -s ../jaxgpt-bucket/runs ../jaxgpt-bucket/prepared "$there/jaxgpt/"
    "$TPU_CHECK" "$HERE/check.py" "$there" "$@" >&3 || exit $?
    rm -rf "$there"
}

leave_it() {
    say "no longer watching; $TPU_NAME goes on, and costs money. The same command watches again; or delete.sh"
    exit "$1"
}
trap 'leave_it 130' INT
trap 'leave_it 143' TERM HUP

finish() { # CODE MESSAGE
    say "$2"
    case $1 in 0 | 42 | 124) ;; *) sh "$HERE/logs.sh" --worker "${cause:-0}" --lines 30 >&3 2>/dev/null || true ;; esac
    [ -n "$ours" ] || exit "$1" # nothing was made, and what else has this name is not ours
    if [ -z "$TPU_DELETE" ]; then
        say "$TPU_NAME is left as it is; if it is there, it costs money. To delete it: delete.sh$(quote --name "$TPU_NAME" \
            --zone "$TPU_ZONE" --type "$TPU_TYPE" --slices "$TPU_SLICES")"
        exit "$1"
    fi
    sh "$HERE/delete.sh" >&3 || { [ "$1" != 0 ] || exit 1; }
    exit "$1"
}

end=$(($(now) + TPU_HOURS * 3600)) resumes=0 failures=0 ours=''
in_time() {
    [ "$(now)" -lt "$end" ] && return
    # It is told to stop first, so that it saves.
    [ "$(state)" != READY ] || { each_worker stop && pause 60; } || true
    finish 124 "the $TPU_HOURS hours are over"
}
resume() { # CODE WHY: the code is for when there are none left
    resumes=$((resumes + 1))
    [ "$resumes" -le "$TPU_RESUMES" ] || finish "$1" "$2; the $TPU_RESUMES resumes are used up. The same command goes on"
    say "$2: going on ($resumes of $TPU_RESUMES)"
    # Right after a pre-emption there is seldom capacity.
    pause $((resumes < 10 ? resumes * 30 : 300))
}
retry() { # CODE WHY
    [ $(($(now) - started)) -lt 3600 ] || failures=0 # it ran well for an hour: another trouble than last time's
    failures=$((failures + 1))
    [ "$failures" -le "$TPU_RETRIES" ] || finish "$1" "$2; that was try $failures in a row"
    say "$2: starting again ($failures of $TPU_RETRIES)"
    pause $((failures * 60))
}

bring_up() { # COMMAND...: TPU, code, command; the exit code of what failed
    found=$(state) || return
    [ -z "$TPU_DRY_RUN" ] || found=NONE
    case $found in
        NONE) ;;
        READY* | CREATING*) ours=yes ;;
        *) ours=yes && sh "$HERE/delete.sh" >&3 || return ;;
    esac
    hours_left=$(((end - $(now)) / 3600 + 1))
    TPU_QUEUE_HOURS=$((TPU_QUEUE_HOURS < hours_left ? TPU_QUEUE_HOURS : hours_left)) sh "$HERE/create.sh" >&3 || return
    ours=yes
    sh "$HERE/install.sh" >&3 || return
    sh "$HERE/launch.sh" -- "$@" >&3
}

look() { # what the run does: "running", "exit CODE WORKER", "unknown", or the state of a TPU that is not ready
    found=$(state) || { [ $? = 2 ] && echo refused || echo unknown; return; }
    [ "$found" = READY ] || { echo "$found" && return; }
    read -r _ node worker _ <"$SCRATCH/workers"
    code=0
    answer=$(remote "$node" "$worker" "sh jaxgpt-worker.sh state") || code=$?
    [ "$code" != 255 ] || answer=unknown
    case $answer in
        exit* | none) collect ;;
        *) echo "${answer:-unknown}" ;;
    esac
}
collect() { # worker 0 has ended; when one does, the others do within seconds. Which of their exit codes is the cause?
    for patience in 6 5 4 3 2 1; do
        each_worker state 3>/dev/null || true
        set +f
        grep . "$SCRATCH"/out.* /dev/null >"$SCRATCH/ends" || true
        set -f
        grep -q running "$SCRATCH/ends" || break
        pause 15
    done
    [ "$patience" != 1 ] || each_worker stop 3>/dev/null || true # one hangs
    # A worker that fails with 1, 2, 42 or 74 takes the others with it, who then end with 75.
    for cause in 2 74 1 42 75 0; do
        number=$(sed -n "s/^.*out\.\([0-9]*\):exit $cause\$/\1/p" "$SCRATCH/ends" | head -n 1)
        [ -z "$number" ] || { echo "exit $cause $number" && return; }
    done
    if grep -q ':exit' "$SCRATCH/ends"; then echo "exit 1 0"; else echo none; fi
}

# A run that is on already is watched, and not started anew.
up='' started=$(now) lost=0
if [ -z "$TPU_DRY_RUN" ]; then
    found=$(state) || exit $?
    [ "$found" != READY ] || [ "$(look)" != running ] || { up=yes ours=yes && say "watching what runs on $TPU_NAME"; }
fi
[ -n "$up" ] || check_run "$@"
while :; do
    in_time
    if [ -z "$up" ]; then
        code=0
        bring_up "$@" || code=$?
        case $code in
            0) up=yes started=$(now) lost=0 ;;
            2 | 74) finish "$code" "$TPU_NAME could not be brought up" ;;
            42 | 75) # a worker that does not answer may never do so
                [ -z "$ours" ] || sh "$HERE/delete.sh" >&3 || true
                resume "$code" "$TPU_NAME could not be brought up (exit code $code)" && continue
                ;;
            *) retry 1 "$TPU_NAME could not be brought up (exit code $code)" && continue ;;
        esac
    fi
    [ -z "$TPU_DRY_RUN" ] || finish 0 "and so on, until the exit code is 0"
    pause 60
    seen=$(look)
    case $seen in
        running) lost=0 && continue ;;
        refused) leave_it 2 ;; # a login that is over, say: nothing that is known of the run
        exit*) cause=${seen##* } code=${seen#exit } code=${code%% *} up='' ;;
        NONE | PREEMPTED*) up='' && resume 42 "$TPU_NAME was taken away ($seen)" && continue ;;
        none) up='' && resume 42 "the run is gone without an exit code (did the machine restart?)" && continue ;;
        *) # repaired, restarted or not reachable: that may pass
            lost=$((lost + 1))
            [ "$lost" -gt 10 ] || continue
            up='' lost=0
            sh "$HERE/delete.sh" >&3 || true
            resume 75 "$TPU_NAME did not answer any more ($seen)"
            continue
            ;;
    esac
    case $code in
        0) finish 0 "done" ;;
        42) resume 42 "the run has saved and ended (42)" ;;
        2 | 74) finish "$code" "the run ended with exit code $code, which another start would not change" ;;
        *) retry "$code" "the run ended with exit code $code on worker $cause" ;;
    esac
done
