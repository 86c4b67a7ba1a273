#!/usr/bin/env bash
# Our train step beside torch's on one GPU, within 8 minutes: benchmarks/gpu.py with the environment it needs.
#
#   benchmarks/gpu.sh                      what is installed: jax with CUDA, flax, optax, pydantic; torch for the peer
#   benchmarks/gpu.sh --install            first makes .venv-gpu with all of them (a download of some gigabytes)
#   benchmarks/gpu.sh --model 124M         anything else goes to gpu.py
#   PYTHON=python3.12 benchmarks/gpu.sh    another Python
#
# None of the data packages is needed (grain, tensorflow-datasets, orbax-checkpoint, tokenizers, transformers).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [[ ${1:-} == --install ]]; then
    shift
    "$python" -m venv .venv-gpu
    python=.venv-gpu/bin/python
    # torch brings its own CUDA libraries: in one environment both sides share them, so torch goes first.
    "$python" -m pip install --quiet torch
    "$python" -m pip install --quiet 'jax[cuda12]>=0.11' flax optax pydantic numpy
elif [[ -z ${PYTHON:-} && -x .venv-gpu/bin/python ]]; then
    python=.venv-gpu/bin/python
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}                                  # XLA tells of every autotuned matmul
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}     # what torch advises against fragmentation
exec "$python" benchmarks/gpu.py "$@"
