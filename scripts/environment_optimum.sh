#!/usr/bin/env bash
# Makes .venv-optimum, with transformers 4 and optimum's classes for ONNX Runtime and OpenVINO, which cannot be
# installed beside transformers 5, and runs what is given in it. Tests that need it find it by its place:
#     bash scripts/environment_optimum.sh --version && bash scripts/environment_export.sh -m pytest -m slow tests/deployment/test_optimum.py

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv-optimum/bin/python
stamp=.venv-optimum/hfcompress.stamp
torch=$(grep '^torch==' scripts/constraints.txt)
packages=("$torch" transformers==4.57.6 'optimum-onnx[onnxruntime]==0.1.0' 'optimum-intel[openvino]==1.27.0' optimum==2.1.0
    onnxruntime==1.31.1 openvino==2026.4.1)
wanted=$({ pwd; printf '%s\n' "${packages[@]}"; } | sha256sum | cut -d' ' -f1)

if [[ ! -f $stamp || $(< "$stamp") != "$wanted" ]]; then
    "${HFCOMPRESS_PYTHON:-python3}" -m venv --clear .venv-optimum
    echo "Installing into .venv-optimum (some 3 GB; a minute or a few) ..." >&2
    install=("$python" -m pip install -qq --disable-pip-version-check --no-input)
    # Torch first: an open requirement may pull another build of several GB.
    "${install[@]}" --constraint scripts/constraints.txt "$torch"
    "${install[@]}" "${packages[@]}"
    printf '%s\n' "$wanted" > "$stamp"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
exec "$python" "$@"
