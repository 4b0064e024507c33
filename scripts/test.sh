#!/usr/bin/env bash
# Checks the project: style, types, tests. `--full` adds the slow tests; other arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Several processes with a spinning OpenMP pool each make one another slow.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
# Tests compare bits. On some processors (AMD's) MKL's products depend on where a matrix lies in memory, unless told.
export MKL_CBWR=AUTO
# pyright would ask a registry whether a newer release is there.
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1

selection=()
if [[ ${1:-} == --full ]]; then
    selection=(-m "slow or not slow")
    shift
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pyright
"$python" -m pytest -n 2 -q "${selection[@]}" "$@"
bash scripts/beside.sh torchao -m pytest -q "${selection[@]}" tests/modeling/test_torchao.py tests/matrix -k torchao
if [[ ${#selection[@]} -gt 0 ]]; then
    # The engines of the exports live in an environment of their own; .venv skips their tests.
    bash scripts/environment_export.sh -m pytest -q "${selection[@]}" tests/deployment tests/test_runtime.py \
        tests/test_commands.py -k "deployment or runtime or export"
fi
