#!/bin/sh
# What runs on a TPU worker; install.sh copies it there as jaxgpt-worker.sh.
#   install COMMIT PYTHON EXTRAS REPO BUCKET   the code, from REPO or else from jaxgpt-code.tar.gz, and what it needs
#   start ID BUCKET COORDINATOR COUNT WORD...   jaxgpt WORD... as process $WORKER of COUNT, in tmux
#   state      "running", "exit CODE", or "none"
#   logs N     the last N lines
#   stop       Ctrl-C: training saves and ends with 42
set -eu
CODE=$HOME/jaxgpt RUN=$HOME/jaxgpt-run WORKER=${WORKER:-0}
LOCKFILE=${TPU_LOCKFILE:-/tmp/libtpu_lockfile}
PATH=$HOME/.local/bin:$PATH # where uv lies
# One release of uv, which cannot change: a wheel of PyPI with the checksum that PyPI has for it.
UV=0.13.9 UV_SHA256=d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19
UV_WHEEL=3d/aa/26d64642d808de4a652579ef950d7cd2d37f080a8babf9c67c6b75fc4c3f/uv-$UV-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl

install() {
    [ "$(cat "$CODE/.installed" 2>/dev/null)" != "$*" ] || return 0
    rm -rf "$CODE"
    mkdir -p "$CODE"
    if [ -n "$4" ]; then
        git clone --quiet -- "$4" "$CODE"
        git -C "$CODE" checkout --quiet "$1"
    else
        tar -xzf "$HOME/jaxgpt-code.tar.gz" -C "$CODE"
    fi
    command -v tmux >/dev/null || get_package tmux
    case $5 in '' | none) ;; *) command -v gcsfuse >/dev/null || get_gcsfuse ;; esac
    # The images' Python is 3.10, too old for jax today; uv brings one and leaves theirs alone.
    [ "$(uv --version 2>/dev/null | cut -d ' ' -f 2)" = "$UV" ] || get_uv
    uv venv --quiet --python "$2" "$CODE/.venv"
    uv pip install --quiet --python "$CODE/.venv/bin/python" -e "${CODE}[$3]"
    echo "$*" >"$CODE/.installed"
}

start() {
    id=$1 bucket=$2 coordinator=$3 count=$4
    shift 4
    [ "$(cat "$RUN/id" 2>/dev/null)" != "$id" ] || return 0 # asked again, because the answer was lost on its way
    tmux kill-session -t jaxgpt 2>/dev/null || true
    # A killed process leaves it behind, and the next one says that the TPU is in use.
    rm -f "$LOCKFILE" 2>/dev/null || sudo rm -f "$LOCKFILE"
    # Outside of the code's folder, which a new commit replaces; and in the bucket where there is one: the disk of a
    # pre-empted worker is gone, and workers that save into folders of their own cannot go on together.
    data=$HOME/jaxgpt-data
    case $bucket in
        '' | none) ;;
        *) data=$HOME/jaxgpt-bucket && mount_bucket "$bucket" "$data" ;;
    esac
    mkdir -p "$data/compile_cache" # a TPU that comes after a pre-emption finds its program compiled
    for folder in runs prepared; do
        mkdir -p "$data/$folder"
        ln -sfn "$data/$folder" "$CODE/$folder"
    done
    mkdir -p "$RUN"
    rm -f "$RUN/exit"
    {
        printf 'cd %s\n' "$(quote "$CODE")"
        # jax's own port, 8482, is closed by the firewall rules that Google makes by itself; 8476 is open (jax 35905).
        printf 'export JAX_COORDINATOR_PORT=8476 PYTHONUNBUFFERED=1\n'
        printf 'export JAX_COMPILATION_CACHE_DIR=%s\n' "$(quote "$data/compile_cache")"
        # Who takes part is known here: detection could only find fewer, and each would train a run of its own.
        [ "$count" = 1 ] || printf 'export JAXGPT_COORDINATOR=%s JAXGPT_NUM_PROCESSES=%s JAXGPT_PROCESS_ID=%s\n' \
            "$(quote "$coordinator")" "$count" "$WORKER"
        printf 'exec .venv/bin/python -m jaxgpt%s\n' "$(for word in "$@"; do printf ' %s' "$(quote "$word")"; done)"
    } >"$RUN/command"
    # tmux: training goes on when the connection or the laptop is gone.
    tmux new-session -d -s jaxgpt "sh $(quote "$HOME/jaxgpt-worker.sh") main $(quote "$id")"
    echo "$id" >"$RUN/id"
}
quote() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }

mount_bucket() {
    ! mountpoint -q "$2" || return 0
    mkdir -p "$2"
    # rename-dir-limit: a checkpoint gets its name by renaming its folder, which gcsfuse refuses by default.
    # ttl 0: what one worker has written, the others have to see at once. File cache: prepared data is read in small
    # pieces at random, and from the disk after the first epoch; each open asks whether a file is still the same.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 --cache-dir="$HOME/.cache/gcsfuse" \
        --file-cache-max-size-mb=40000 --file-cache-cache-file-for-range-read=true "$1" "$2" && return
    account=$(curl -sSf -m 5 -H 'Metadata-Flavor: Google' "$METADATA" 2>/dev/null) || account=ACCOUNT
    echo "cannot mount gs://$1: is the name right, and may the workers' service account use it? If not: gcloud storage" \
        "buckets add-iam-policy-binding gs://$1 --member=serviceAccount:$account --role=roles/storage.objectUser" >&2
    exit 74
}
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/email
get_uv() {
    folder=$(mktemp -d)
    curl -LsSf -o "$folder/uv.whl" "https://files.pythonhosted.org/packages/$UV_WHEEL"
    echo "$UV_SHA256  $folder/uv.whl" | sha256sum --check --status ||
        { echo "uv $UV does not have the checksum it was released with, and is not installed: $UV_WHEEL" >&2 && exit 1; }
    python3 -m zipfile -e "$folder/uv.whl" "$folder"
    mkdir -p "$HOME/.local/bin"
    cp "$folder/uv-$UV.data/scripts/uv" "$HOME/.local/bin/uv"
    chmod 755 "$HOME/.local/bin/uv"
    rm -rf "$folder"
}
get_gcsfuse() {
    key=/usr/share/keyrings/cloud.google.asc
    curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    get_package gcsfuse
}
get_package() { # A fresh machine updates itself, which holds apt's lock for some minutes.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y "$1" >/dev/null
}

main() { # within tmux
    trap : INT TERM # the command gets them too; what it answers has to be written down
    code=0
    echo "=== start $1, worker $WORKER" >>"$RUN/log"
    sh "$RUN/command" >>"$RUN/log" 2>&1 || code=$?
    echo "=== exit code $code" >>"$RUN/log"
    echo "$code" >"$RUN/exit.new"
    mv "$RUN/exit.new" "$RUN/exit"
}

state() {
    if [ -f "$RUN/exit" ]; then
        echo "exit $(cat "$RUN/exit")"
    elif tmux has-session -t jaxgpt 2>/dev/null; then
        echo running
    else
        echo none
    fi
}

logs() { tail -n "$1" "$RUN/log" 2>/dev/null || echo "no log yet"; }
stop() { tmux send-keys -t jaxgpt C-c 2>/dev/null || true; }

case ${1:---help} in
    install | start | state | logs | stop | main) "$@" ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
esac
