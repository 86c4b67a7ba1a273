# shellcheck shell=sh
# The Cloud TPU API: v2 to v6e. Google only maintains it, but grants such as TRC's are for it. Sourced by common.sh.

tpu_nodes() { # a slice is a node; those of one queued resource are NAME-0, NAME-1, ...
    [ "$TPU_SLICES" -gt 1 ] || { printf '%s\n' "$TPU_NAME" && return; }
    slice=0
    while [ "$slice" -lt "$TPU_SLICES" ]; do
        printf '%s\n' "$TPU_NAME-$slice"
        slice=$((slice + 1))
    done
}

tpu_create() {
    case $TPU_TYPE in # the runtime version has to fit the generation: another one boots, and finds no TPU
        v5e-*) kind=v5litepod-${TPU_TYPE#v5e-} version=v2-alpha-tpuv5-lite ;;
        v5litepod-*) kind=$TPU_TYPE version=v2-alpha-tpuv5-lite ;;
        v5p-*) kind=$TPU_TYPE version=v2-alpha-tpuv5 ;;
        v6e-*) kind=$TPU_TYPE version=v2-alpha-tpuv6e ;;
        *) kind=$TPU_TYPE version=tpu-ubuntu2204-base ;;
    esac
    version=${TPU_VERSION:-$version}
    # Without this scope the workers could read buckets and not write to them.
    set -- --zone="$TPU_ZONE" --accelerator-type="$kind" --scopes=https://www.googleapis.com/auth/cloud-platform
    [ -z "$TPU_SPOT" ] || set -- "$@" --spot
    track=compute
    if [ -n "$TPU_FLEX_START" ]; then # only gcloud alpha has these flags
        track='alpha compute'
        set -- "$@" --provisioning-model=flex-start --max-run-duration="${TPU_HOURS}h" \
            --valid-until-duration="${TPU_QUEUE_HOURS}h"
    fi
    # shellcheck disable=SC2086  # these are several flags
    set -- "$@" $TPU_CREATE_FLAGS
    if [ -n "$TPU_NO_QUEUE" ]; then
        [ "$TPU_SLICES" = 1 ] || die 2 "--slices $TPU_SLICES needs a queued resource; leave out --no-queue"
        ask compute tpus tpu-vm create "$TPU_NAME" "$@" --version="$version"
    elif [ "$TPU_SLICES" -gt 1 ]; then
        # shellcheck disable=SC2086  # these are one or two words
        ask $track tpus queued-resources create "$TPU_NAME" "$@" --runtime-version="$version" \
            --node-count="$TPU_SLICES" --node-prefix="$TPU_NAME"
    else
        # shellcheck disable=SC2086
        ask $track tpus queued-resources create "$TPU_NAME" "$@" --runtime-version="$version" --node-id="$TPU_NAME"
    fi
}

tpu_state() {
    if [ -z "$TPU_NO_QUEUE" ]; then
        answer=$(ask compute tpus queued-resources describe "$TPU_NAME" --zone="$TPU_ZONE" \
            --format='value[separator=" "](state.state,state.failedData.error.message)') || { none_if_missing $?; return; }
        answer=${answer% }
        case $answer in
            ACTIVE* | '') ;;
            SUSPEND*) echo "PREEMPTED ($answer)" && return ;;
            FAILED*) echo "$answer" && return ;;
            *) echo "CREATING ($answer)" && return ;;
        esac
    fi
    : >"$SCRATCH/nodes"
    for node in $(tpu_nodes); do
        answer=$(ask compute tpus tpu-vm describe "$node" --zone="$TPU_ZONE" \
            --format='value[separator=" "](state,networkEndpoints[].ipAddress)') || {
            code=$?
            # A queued resource that is active has nodes, so one that is gone was taken away.
            [ -n "$TPU_NO_QUEUE" ] || [ "$code" != 3 ] || { echo "PREEMPTED ($node is gone)" && return; }
            none_if_missing "$code"
            return
        }
        [ -z "$TPU_DRY_RUN" ] || answer="READY $(awk -v n="$(tpu_hosts)" 'BEGIN {while (i < n) printf "ADDRESS_%d;", i++}')"
        case $answer in
            READY*) ;;
            PREEMPTED* | TERMINATED* | STOP* | DELETING*) echo "PREEMPTED ($node: ${answer%%[!A-Z_]*})" && return ;;
            *) echo "CREATING ($node: ${answer%%[!A-Z_]*})" && return ;;
        esac
        printf '%s %s\n' "$node" "${answer#READY}" >>"$SCRATCH/nodes"
    done
    # Processes count through the slices: slice 0 has the first numbers, as jax and the TPU's runtime expect.
    awk '{gsub(/[;,]/, " "); for (i = 2; i <= NF; i++) print n++, $1, i - 2, $i}' "$SCRATCH/nodes" >"$SCRATCH/workers"
    echo READY
}
none_if_missing() { # CODE of ask
    [ "$1" = 3 ] || return "$1"
    echo NONE
}
tpu_hosts() { # of a slice: 4 chips each; up to 8 chips of v5e and v6e are one; the other types count 2 cores a chip
    chips=${TPU_TYPE##*-}
    case $TPU_TYPE in v5e-* | v5litepod-* | v6e-*) chips=$((chips > 8 ? chips : 4)) ;; *) chips=$((chips / 2)) ;; esac
    echo $((chips > 4 ? chips / 4 : 1))
}

tpu_ssh() { # NODE WORKER COMMAND
    # shellcheck disable=SC2086
    cloud compute tpus tpu-vm ssh "$1" --zone="$TPU_ZONE" --worker="$2" --strict-host-key-checking=no $TPU_SSH_FLAGS \
        --command="$3"
}
tpu_scp() { # NODE WORKER FILES...: to its home folder
    node=$1 worker=$2
    shift 2
    # shellcheck disable=SC2086
    cloud compute tpus tpu-vm scp "$@" "$node:" --zone="$TPU_ZONE" --worker="$worker" --strict-host-key-checking=no \
        $TPU_SSH_FLAGS
}

tpu_delete() {
    # A queued resource stays in the list, and in the quota, when its nodes are gone. --force: with its nodes.
    remove "queued resource $TPU_NAME" compute tpus queued-resources delete "$TPU_NAME" --zone="$TPU_ZONE" --force
    for node in $(tpu_nodes); do
        remove "TPU VM $node" compute tpus tpu-vm delete "$node" --zone="$TPU_ZONE"
    done
}
