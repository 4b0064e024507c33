#!/usr/bin/env bash
# Runs what is given in .venv with torchao beside it:
#     bash scripts/with_torchao.sh -m pytest tests/modeling/test_torchao.py
# Where torchao is installed every import of transformers takes seconds longer and prints warnings, so .venv is
# without it.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

beside=.venv/beside/torchao
if [[ ! -f $beside.stamp || $(< "$beside.stamp") != "$(wanted_stamp)" ]]; then
    rm -rf "$beside"
    install --no-deps --target "$beside" torchao
    wanted_stamp > "$beside.stamp"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
PYTHONPATH="$PWD/$beside${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$@"
