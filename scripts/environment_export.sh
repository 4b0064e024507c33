#!/usr/bin/env bash
# Makes .venv-export, with the engines of the exports (extras onnx and openvino), and runs what is given in it:
#     bash scripts/environment_export.sh -m pytest tests/deployment -m "slow or not slow"
# The engines are large, so .venv is without them and skips their tests.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv-export/bin/python
stamp=.venv-export/hfcompress.stamp
wanted=$({ pwd; cat scripts/constraints.txt pyproject.toml; } | sha256sum | cut -d' ' -f1)

if [[ ! -f $stamp || $(< "$stamp") != "$wanted" ]]; then
    "${HFCOMPRESS_PYTHON:-python3}" -m venv --clear .venv-export
    echo "Installing into .venv-export (some 3 GB; a minute or a few) ..." >&2
    install=("$python" -m pip install -qq --disable-pip-version-check --no-input --constraint scripts/constraints.txt)
    # Torch first and pinned: an open requirement may pull another build of several GB.
    "${install[@]}" "$(grep '^torch==' scripts/constraints.txt)"
    "${install[@]}" --editable '.[dev,onnx,openvino]'
    printf '%s\n' "$wanted" > "$stamp"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
exec "$python" "$@"
