#!/usr/bin/env bash
# Makes .venv-gptq, with what GPTQ needs (extra gptq), and runs what is given in it:
#     bash scripts/environment_gptq.sh -m pytest tests/methods/test_gptq.py -m "slow or not slow"
# gptqmodel asks for a newer torch than the one that everything else here is measured with, and is built from source.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch="torch==2.14.1"
python=.venv-gptq/bin/python
stamp=.venv-gptq/hfcompress.stamp
wanted=$({ pwd; cat scripts/constraints.txt scripts/environment_gptq.sh pyproject.toml; } | sha256sum | cut -d' ' -f1)

if [[ ! -f $stamp || $(< "$stamp") != "$wanted" ]]; then
    "${HFCOMPRESS_PYTHON:-python3}" -m venv --clear .venv-gptq
    echo "Installing into .venv-gptq (some minutes) ..." >&2
    { grep -v '^torch==' scripts/constraints.txt; echo "$torch"; } > .venv-gptq/constraints.txt
    install=("$python" -m pip install -qq --disable-pip-version-check --no-input --constraint .venv-gptq/constraints.txt)
    # Torch first: it is looked for while gptqmodel is built, in this environment and not in one of pip's own.
    "${install[@]}" "$torch" maturin ninja 'setuptools>=84.2.1' wheel
    "${install[@]}" --no-build-isolation gptqmodel
    "${install[@]}" --editable '.[dev,gptq]'
    printf '%s\n' "$wanted" > "$stamp"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
exec "$python" "$@"
