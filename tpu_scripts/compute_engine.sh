# shellcheck shell=sh
# TPUs as machines of Compute Engine: the only way to TPU7x and later. Sourced by common.sh.
# A slice is a managed instance group of an instance template; of several hosts, with a workload policy that says
# how the chips are connected.

gce_check() {
    [ "$TPU_SLICES" = 1 ] || die 2 "--slices with $TPU_TYPE: use deploy/kubernetes/train, where GKE connects the slices"
    per_host=${TPU_TYPE##*-} per_host=${per_host%t} HOSTS=1
    [ -n "$TPU_TOPOLOGY" ] || return 0
    case $TPU_TOPOLOGY in *[!0-9x]* | x* | *x | *xx*) die 2 "--topology $TPU_TOPOLOGY is not like 2x4 or 2x2x2" ;; esac
    HOSTS=$(($(printf '%s' "$TPU_TOPOLOGY" | sed 's/x/*/g') / per_host))
    [ "$HOSTS" -ge 1 ] || die 2 "--topology $TPU_TOPOLOGY has fewer chips than one $TPU_TYPE"
}

gce_hosts() { echo "$HOSTS"; }

gce_create() {
    region=${TPU_ZONE%-*} policy='' project=$TPU_PROJECT
    case $TPU_TYPE in # TPU7x takes no other disk, and has an image of its own
        tpu7x*) set -- --boot-disk-type=hyperdisk-balanced && image=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
        *) set -- && image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    esac
    [ -z "$TPU_SPOT" ] || set -- "$@" --provisioning-model=SPOT --instance-termination-action=STOP
    # shellcheck disable=SC2086  # these are several flags
    there_or ask compute instance-templates create "$TPU_NAME" --machine-type="$TPU_TYPE" \
        --image-project=ubuntu-os-accelerator-images --image-family="${TPU_IMAGE:-$image}" \
        --maintenance-policy=TERMINATE --boot-disk-size=200GB \
        --scopes=https://www.googleapis.com/auth/cloud-platform "$@" $TPU_CREATE_FLAGS || return
    set --
    if [ "$HOSTS" -gt 1 ]; then
        # The group wants the policy's whole path; a bare name is "malformed".
        [ -n "$project" ] || project=$(ask config get-value project) || return
        [ -n "$project" ] || project=PROJECT
        policy=projects/$project/regions/$region/resourcePolicies/$TPU_NAME
        there_or ask compute resource-policies create workload-policy "$TPU_NAME" --region="$region" \
            --type=HIGH_THROUGHPUT --accelerator-topology="$TPU_TOPOLOGY" || return
        # bulk: all hosts or none. Half a slice computes nothing and costs half.
        set -- --workload-policy="$policy" --target-size-policy-mode=bulk
    fi
    # do-nothing: a host that was replaced has lost its place in the run, so we make the whole slice anew.
    there_or ask compute instance-groups managed create "$TPU_NAME" --zone="$TPU_ZONE" --template="$TPU_NAME" \
        --size="$HOSTS" --base-instance-name="$TPU_NAME" --default-action-on-vm-failure=do-nothing "$@"
}
there_or() { # COMMAND...: what is there already, from a try that was cut off, will do
    code=0
    "$@" || code=$?
    [ "$code" = 4 ] || return "$code"
}

gce_state() {
    ask compute instance-groups managed list-instances "$TPU_NAME" --zone="$TPU_ZONE" \
        --format='value(instance.basename(),instanceStatus)' >"$SCRATCH/nodes" || { none_if_missing $?; return; }
    [ -z "$TPU_DRY_RUN" ] || awk -v n="$HOSTS" 'BEGIN {while (i < n) print "INSTANCE_" i++, "RUNNING"}' >"$SCRATCH/nodes"
    if grep -qE 'STOP|TERMINATED|SUSPEND' "$SCRATCH/nodes"; then
        echo "PREEMPTED ($(awk '$2 != "RUNNING" {print $1 ": " $2}' "$SCRATCH/nodes" | head -n 1))"
    elif [ "$(grep -c RUNNING "$SCRATCH/nodes")" = "$HOSTS" ]; then
        # A machine's name is its address: Compute Engine's own DNS knows it within the project.
        sort "$SCRATCH/nodes" | awk '{print NR - 1, $1, 0, $1}' >"$SCRATCH/workers"
        echo READY
    else
        trouble=$(ask compute instance-groups managed list-errors "$TPU_NAME" --zone="$TPU_ZONE" --limit=1 \
            --format='value(error.code,error.message)') || return
        case $trouble in
            *[Qq]uota* | *QUOTA*) echo "FAILED $trouble" ;;
            *) echo "CREATING ($(grep -c RUNNING "$SCRATCH/nodes") of $HOSTS hosts run${trouble:+; $trouble})" ;;
        esac
    fi
}

gce_ssh() { # NODE WORKER COMMAND
    # shellcheck disable=SC2086
    cloud compute ssh "$1" --zone="$TPU_ZONE" --strict-host-key-checking=no $TPU_SSH_FLAGS --command="$3"
}
gce_scp() { # NODE WORKER FILES...: to its home folder
    node=$1
    shift 2
    # shellcheck disable=SC2086
    cloud compute scp "$@" "$node:" --zone="$TPU_ZONE" --strict-host-key-checking=no $TPU_SSH_FLAGS
}

gce_delete() {
    # In this order: a template or policy in use cannot be deleted. Deleting machines alone: the group makes new ones.
    remove "instance group $TPU_NAME" compute instance-groups managed delete "$TPU_NAME" --zone="$TPU_ZONE"
    remove "instance template $TPU_NAME" compute instance-templates delete "$TPU_NAME"
    remove "workload policy $TPU_NAME" compute resource-policies delete "$TPU_NAME" --region="${TPU_ZONE%-*}"
}
