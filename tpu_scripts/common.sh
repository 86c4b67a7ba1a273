# shellcheck shell=sh
# What the scripts share: the settings, the one place that calls gcloud, and talking to the workers.
# Sourced by each script: `. common.sh` reads the flags and leaves what follows `--` as the arguments.
#
# Every setting is a flag, or a variable of the environment with TPU_ before it (TPU_NAME, TPU_ZONE, ...), which is
# how one script hands all of them to the next.

TPU_NAME=${TPU_NAME:-} TPU_ZONE=${TPU_ZONE:-} TPU_PROJECT=${TPU_PROJECT:-} TPU_TYPE=${TPU_TYPE:-}
TPU_TOPOLOGY=${TPU_TOPOLOGY:-} TPU_SLICES=${TPU_SLICES:-1} TPU_SPOT=${TPU_SPOT:-} TPU_NO_QUEUE=${TPU_NO_QUEUE:-}
TPU_BUCKET=${TPU_BUCKET:-} TPU_REPO=${TPU_REPO:-} TPU_COMMIT=${TPU_COMMIT:-HEAD} TPU_EXTRAS=${TPU_EXTRAS:-tpu}
TPU_PYTHON=${TPU_PYTHON:-3.12} TPU_VERSION=${TPU_VERSION:-} TPU_IMAGE=${TPU_IMAGE:-}
TPU_CREATE_FLAGS=${TPU_CREATE_FLAGS:-} TPU_SSH_FLAGS=${TPU_SSH_FLAGS:-} TPU_DRY_RUN=${TPU_DRY_RUN:-}
TPU_QUEUE_HOURS=${TPU_QUEUE_HOURS:-24} TPU_HOURS=${TPU_HOURS:-72} TPU_RESUMES=${TPU_RESUMES:-20}
TPU_RETRIES=${TPU_RETRIES:-3} TPU_DELETE=${TPU_DELETE:-} TPU_FLEX_START=${TPU_FLEX_START:-} TPU_CHECK=${TPU_CHECK:-python3}
WORKER='' TAIL=50
set -f # a * in a flag's value is a *

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    cat <<'END'

Settings (a flag, or the variable in the environment):
  --name N          TPU_NAME          of the TPU, and of all that is made for it
  --zone Z          TPU_ZONE          such as us-east5-b
  --project P       TPU_PROJECT       [gcloud's own]
  --type T          TPU_TYPE          v4-8, v5e-16, v5p-32, v6e-8 (the Cloud TPU API), or a Compute Engine machine:
                                      tpu7x-standard-4t, ct6e-standard-4t, ct5p-hightpu-4t; with --topology 2x2x2 if
                                      several hosts
  --slices N        TPU_SLICES        slices of that type, connected by the network [1]
  --spot            TPU_SPOT=1        cheaper, and may be taken away at any time
  --flex-start      TPU_FLEX_START=1  v5e, v6e: for at most --hours once it is there (168 are the most), not taken away
  --no-queue        TPU_NO_QUEUE=1    ask for it now (tpu-vm create) and not by a queued resource
  --bucket B        TPU_BUCKET        Cloud Storage bucket for runs/ and prepared/; "none": I mount a shared folder
  --repo URL        TPU_REPO          clone this on the workers [copy the local checkout]
  --commit C        TPU_COMMIT        the code's git commit [HEAD]
  --extras E        TPU_EXTRAS        of the package [tpu]
  --python V        TPU_PYTHON        [3.12]
  --check P         TPU_CHECK         watch, run: the Python here that has jaxgpt, to check the run before the TPU is
                                      asked for; none: do not [python3]
  --version V       TPU_VERSION       runtime version of the Cloud TPU API [by the type]
  --image F         TPU_IMAGE         image family of Compute Engine [by the type]
  --create-flags S  TPU_CREATE_FLAGS  more flags for gcloud ... create, such as "--reserved --network=n"
  --ssh-flags S     TPU_SSH_FLAGS     more flags for gcloud ... ssh and scp, such as --tunnel-through-iap
  --queue-hours H   TPU_QUEUE_HOURS   to wait for the TPU [24]
  --hours H         TPU_HOURS         watch, run: all in all [72]
  --resumes N       TPU_RESUMES       watch, run: times to go on after a pre-emption or exit code 42 [20]
  --retries N       TPU_RETRIES       watch, run: times in a row to start again after exit code 1 or 75 [3]
  --delete          TPU_DELETE=1      watch: delete the TPU at the end, however it ends
  --keep            TPU_DELETE=       run: do not
  --worker W                          logs: of this worker alone
  --lines N                           logs: as many [50]
  --dry-run         TPU_DRY_RUN=1     print the gcloud commands, run none
  --help
END
}

# ---------------------------------------------------------------- words for the user

# Messages and the commands of a dry run go to the script's own output, also from within $(...). A dry run's
# messages are comments, so that its whole output can be pasted into a shell.
exec 3>&1
say() { printf '%s%s\n' "${TPU_DRY_RUN:+# }" "$*" >&3; }
die() { # CODE MESSAGE
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

quote() { # the words, each as a shell would have to be given it
    for quoted in "$@"; do
        case $quoted in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) printf " '%s'" "$(printf '%s' "$quoted" | sed "s/'/'\\\\''/g")" ;;
            *) printf ' %s' "$quoted" ;;
        esac
    done
}

now() { date +%s; }
pause() { [ -n "$TPU_DRY_RUN" ] || sleep "$1"; }

# ---------------------------------------------------------------- gcloud

cloud() { # WORDS...: the one place that calls gcloud; its complaint is left in the file $COMPLAINT
    set -- "$@" ${TPU_PROJECT:+"--project=$TPU_PROJECT"} --quiet
    if [ -n "$TPU_DRY_RUN" ]; then
        printf 'gcloud%s\n' "$(quote "$@")" >&3
        return 0
    fi
    gcloud "$@" 2>"$COMPLAINT"
}

ask() { # WORDS...: cloud, again after an error that passes. 0; 2 the user's; 3 not there; 4 is there; 5 no capacity; 1
    asked=0
    until cloud "$@"; do
        asked=$((asked + 1))
        if says 'rateLimitExceeded|RATE_LIMIT|per minute|UNAVAILABLE|DEADLINE_EXCEEDED'; then :
        elif says 'no more capacity|RESOURCE_POOL_EXHAUSTED|stockout|insufficient capacity'; then return 5
        elif says 'quota'; then
            complain "no quota for this type in $TPU_ZONE. The Cloud TPU API counts by zone and type, spot apart:
TPUV6EPreemptiblePerProjectPerZoneForTPUAPI, ...; ask for more in the console (IAM & Admin, Quotas), or take the
zone and type of your grant"
            return 2
        elif says 'not found|NOT_FOUND|notFound'; then return 3
        elif says 'already exists|ALREADY_EXISTS|alreadyExists'; then return 4
        elif says 'active account|auth login|UNAUTHENTICATED|Reauthentication'; then
            complain "not logged in; run: gcloud auth login" && return 2
        elif says 'SERVICE_DISABLED|has not been used in project'; then
            complain "an API is off in this project; run: gcloud services enable tpu.googleapis.com compute.googleapis.com"
            return 2
        elif says 'PERMISSION_DENIED|Permission denied|does not have .*permission|forbidden'; then
            complain "not allowed: either your account lacks the role TPU Admin, or there is no zone $TPU_ZONE for you"
            return 2
        elif says 'INVALID_ARGUMENT|unrecognized arguments|Invalid value|Invalid choice|argument --'; then
            complain "gcloud refuses this request" && return 2
        fi
        [ "$asked" -lt 5 ] || { complain "gcloud failed 5 times" && return 1; }
        pause $((asked * 15))
    done
}

says() { grep -qiE "$1" "$COMPLAINT"; }
complain() { # MESSAGE, after gcloud's own last words
    { tail -n 5 "$COMPLAINT" && printf 'error: %s\n' "$1"; } >&2
}

# ---------------------------------------------------------------- workers

# $SCRATCH/workers has a line for each: number, node, number within the node, address. state() writes it.

remote() { # NODE WORKER COMMAND: its output; its exit code, or 255 where it could not be reached
    # gcloud does not pass the exit code on in every version, and adds words of its own, so the answer is marked: no
    # mark at its end, no answer.
    for remote_wait in 5 15 30 60 0; do
        reply=$(api ssh "$1" "$2" "echo jaxgpt-begin; $3 2>&1; echo jaxgpt-exit=\$?" </dev/null) || true
        [ -z "$TPU_DRY_RUN" ] || return 0
        code=$(printf '%s\n' "$reply" | sed -n 's/^.*jaxgpt-exit=//p' | tail -n 1)
        if [ -n "$code" ]; then
            printf '%s\n' "$reply" | sed -n '/jaxgpt-begin$/,$p' | sed '1d; $s/jaxgpt-exit=[0-9]*$//; ${/^$/d;}'
            return "$code"
        fi
        pause "$remote_wait"
    done
    tail -n 2 "$COMPLAINT" >&2
    return 255
}

each_worker() { # VERB WORDS...: worker.sh on all at once, 16 at a time; output in $SCRATCH/out.NUMBER
    # The exit code is that of the first worker that failed. Not `--worker=all`: that holds back all output till the
    # end, and does not say which worker failed.
    failed=0 batch=''
    while read -r number node worker _; do
        line="WORKER=$number sh jaxgpt-worker.sh$(quote "$@")"
        if [ -n "$TPU_DRY_RUN" ]; then
            remote "$node" "$worker" "$line"
            continue
        fi
        (COMPLAINT=$SCRATCH/complaint.$number && remote "$node" "$worker" "$line") >"$SCRATCH/out.$number" 2>&1 &
        batch="$batch $number:$!"
        [ $((number % 16)) -ne 15 ] || wait_for_batch
    done <"$SCRATCH/workers"
    wait_for_batch
    return "$failed"
}
wait_for_batch() {
    for entry in $batch; do
        ended=0
        wait "${entry#*:}" || ended=$?
        [ "$ended" != 0 ] || continue
        [ "$failed" != 0 ] || failed=$ended
        say "worker ${entry%%:*}: $(tail -n 3 "$SCRATCH/out.${entry%%:*}")"
    done
    batch=''
}

remove() { # WHAT WORDS...: delete it and say so; what is not there is fine. Counts in $DELETED and $LEFT
    what=$1 removed=0
    shift
    ask "$@" || removed=$?
    if [ "$removed" = 0 ]; then
        DELETED=$((DELETED + 1))
        [ -n "$TPU_DRY_RUN" ] || say "deleted $what"
    elif [ "$removed" != 3 ] && ! says SERVICE_DISABLED; then # where the API is off, nothing can be
        LEFT=$((LEFT + 1))
        say "NOT DELETED, and it may cost money: $what; try again: gcloud$(quote "$@")"
    fi
}

count_workers() { wc -l <"$SCRATCH/workers" | tr -d ' '; }

need_bucket() { # NUMBER of workers
    [ "$1" = 1 ] || [ -n "$TPU_BUCKET" ] ||
        die 2 "$1 workers need one folder for their checkpoints: --bucket NAME (or none, if you mount one yourself)"
}

need_commit() { # the commit to install, as a full hash where it comes from here
    [ -z "$TPU_REPO" ] || { echo "$TPU_COMMIT" && return; }
    git -C "$HERE/.." rev-parse --verify --quiet "$TPU_COMMIT^{commit}" ||
        die 2 "--commit $TPU_COMMIT: this checkout has no such commit, or is none; or give --repo URL"
}

need_ready() { # ends the script unless the TPU is there and ready: 2 if there is none, 42 if it was taken away
    found=$(state) || exit $?
    case $found in
        READY) ;;
        NONE) die 2 "there is no $TPU_NAME in $TPU_ZONE; make it with create.sh" ;;
        *) die 42 "$TPU_NAME in $TPU_ZONE is not ready but $found" ;;
    esac
}

# ---------------------------------------------------------------- flags

# shellcheck disable=SC2034  # WORKER is for logs.sh
while [ $# -gt 0 ]; do
    flag=$1
    case $flag in --*=*) flag=${1%%=*} value=${1#*=} && shift && set -- "$flag" "$value" "$@" ;; esac
    case $flag in
        --help | -h) usage && exit 0 ;;
        --spot) TPU_SPOT=1 ;;
        --flex-start) TPU_FLEX_START=1 ;;
        --no-queue) TPU_NO_QUEUE=1 ;;
        --delete) TPU_DELETE=1 ;;
        --keep) TPU_DELETE='' ;;
        --dry-run) TPU_DRY_RUN=1 ;;
        --) shift && break ;;
        -*)
            [ $# -gt 1 ] || die 2 "$flag needs a value, or is no flag (see --help)"
            case $flag in
                --name) TPU_NAME=$2 ;; --zone) TPU_ZONE=$2 ;; --project) TPU_PROJECT=$2 ;;
                --type) TPU_TYPE=$2 ;; --topology) TPU_TOPOLOGY=$2 ;; --slices) TPU_SLICES=$2 ;;
                --bucket) TPU_BUCKET=${2#gs://} ;; --repo) TPU_REPO=$2 ;; --commit) TPU_COMMIT=$2 ;;
                --extras) TPU_EXTRAS=$2 ;; --python) TPU_PYTHON=$2 ;; --version) TPU_VERSION=$2 ;;
                --image) TPU_IMAGE=$2 ;; --create-flags) TPU_CREATE_FLAGS=$2 ;; --ssh-flags) TPU_SSH_FLAGS=$2 ;;
                --queue-hours) TPU_QUEUE_HOURS=$2 ;; --hours) TPU_HOURS=$2 ;; --resumes) TPU_RESUMES=$2 ;;
                --retries) TPU_RETRIES=$2 ;; --lines) TAIL=$2 ;; --check) TPU_CHECK=$2 ;;
                --worker) WORKER=$2 ;;
                *) die 2 "there is no flag $flag (see --help)" ;;
            esac
            shift
            ;;
        *) die 2 "$1 is no flag; the command for the workers comes after --, for example: -- train --config FILE" ;;
    esac
    shift
done
export TPU_NAME TPU_ZONE TPU_PROJECT TPU_TYPE TPU_TOPOLOGY TPU_SLICES TPU_SPOT TPU_NO_QUEUE TPU_BUCKET TPU_REPO \
    TPU_COMMIT TPU_EXTRAS TPU_PYTHON TPU_VERSION TPU_IMAGE TPU_CREATE_FLAGS TPU_SSH_FLAGS TPU_QUEUE_HOURS \
    TPU_HOURS TPU_RESUMES TPU_RETRIES TPU_DELETE TPU_DRY_RUN TPU_FLEX_START TPU_CHECK

case $TPU_NAME in
    '') die 2 "give the TPU a name: --name NAME, or TPU_NAME" ;;
    *[!a-z0-9-]* | [!a-z]* | *-) die 2 "--name $TPU_NAME: small letters, digits and -, and a letter first" ;;
esac
[ ${#TPU_NAME} -le 50 ] || die 2 "--name $TPU_NAME is longer than 50 characters"
[ -n "$TPU_ZONE" ] || die 2 "say where: --zone ZONE, or TPU_ZONE; gcloud compute tpus locations list tells the zones"
for number in "$TPU_SLICES" "$TPU_QUEUE_HOURS" "$TPU_HOURS" "$TPU_RESUMES" "$TPU_RETRIES" "$TAIL" "${WORKER:-0}"; do
    case $number in '' | *[!0-9]* | 0?* | ????????*) die 2 "'$number' is not a whole number below 10,000,000" ;; esac
done
# None of these words means anything to a shell, so that none of them can, here or on a worker.
plain() { # FLAG VALUE CHARACTERS
    case $2 in -* | *[!$3]*) die 2 "$1 $2: it may hold only $3, and not begin with -" ;; esac
}
plain --type "$TPU_TYPE" a-z0-9-
plain --zone "$TPU_ZONE" a-z0-9-
plain --topology "$TPU_TOPOLOGY" 0-9x
plain --project "$TPU_PROJECT" a-z0-9.:-
plain --bucket "$TPU_BUCKET" a-z0-9._-
plain --extras "$TPU_EXTRAS" a-z0-9,-
plain --python "$TPU_PYTHON" a-z0-9.-
plain --version "$TPU_VERSION" a-z0-9.-
plain --image "$TPU_IMAGE" a-z0-9-
plain --commit "$TPU_COMMIT" A-Za-z0-9._/~^-
case $TPU_REPO in -*) die 2 "--repo $TPU_REPO is no address" ;; esac
[ -n "$TPU_DRY_RUN" ] || command -v gcloud >/dev/null || die 2 "there is no gcloud here; see https://cloud.google.com/sdk"

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
COMPLAINT=$SCRATCH/complaint
: >"$COMPLAINT"
: >"$SCRATCH/workers"

# Which of Google's two ways: machine types (...-standard-4t, ...-hightpu-4t) are Compute Engine's, others the TPU API's.
# shellcheck source=tpu_scripts/tpu_api.sh
. "$HERE/tpu_api.sh"
# shellcheck source=tpu_scripts/compute_engine.sh
. "$HERE/compute_engine.sh"
case $TPU_TYPE in
    '' | v[234]-[1-9]* | v5e-[1-9]* | v5litepod-[1-9]* | v5p-[1-9]* | v6e-[1-9]*) API=tpu ;;
    tpu7x-standard-[1-8]t | ct6e-standard-[1-8]t | ct5p-hightpu-[1-8]t) API=gce ;;
    *-standard-*t | *-hightpu-*t)
        die 2 "--type $TPU_TYPE: instance groups are for tpu7x-standard-4t, ct6e-standard-4t and ct5p-hightpu-4t; \
v5e and v4 are served by the Cloud TPU API, for example --type v5e-8"
        ;;
    *7*) die 2 "--type $TPU_TYPE: the Cloud TPU API does not serve TPU7x; use --type tpu7x-standard-4t --topology 2x2x2" ;;
    *) die 2 "--type $TPU_TYPE is not known; such as v5e-16, or a machine type such as tpu7x-standard-4t" ;;
esac
[ "$API" = gce ] || case ${TPU_TYPE#*-} in *[!0-9]*) die 2 "--type $TPU_TYPE: the number of chips or cores?" ;; esac
case $TPU_FLEX_START:$TPU_TYPE:$TPU_SPOT$TPU_NO_QUEUE in
    :* | 1::* | 1:v5e-*: | 1:v5litepod-*: | 1:v6e-*:) ;;
    *) die 2 "--flex-start is for v5e and v6e in the queue of the Cloud TPU API, without --spot and --no-queue" ;;
esac
[ -z "$TPU_FLEX_START" ] || [ "$TPU_HOURS" -le 168 ] || die 2 "--flex-start: --hours $TPU_HOURS is more than 168, a week"
api() { # VERB WORDS...
    verb=$1
    shift
    "${API}_$verb" "$@"
}
state() { api state; } # NONE, CREATING, READY, PREEMPTED or FAILED, and why
[ -n "$TPU_TYPE" ] || [ "${NEEDS_TYPE:-}" != yes ] || die 2 "say which TPU: --type v5e-8, or TPU_TYPE"
[ "$API" = tpu ] || gce_check
