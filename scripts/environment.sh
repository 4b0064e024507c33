# Sourced by the other scripts: makes .venv with pinned versions, or leaves it alone when it is up to date.
# Leaves the caller in the project's root, with $python set. HFCOMPRESS_PYTHON names another interpreter.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
stamp=.venv/hfcompress.stamp

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

wanted_stamp() {
    # The folder is part of it: an environment that was moved or copied points to the old place.
    { pwd; cat scripts/constraints.txt pyproject.toml; } | sha256sum | cut -d' ' -f1
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${HFCOMPRESS_PYTHON:-} ]]; then
        supported "$HFCOMPRESS_PYTHON" || fail "HFCOMPRESS_PYTHON=$HFCOMPRESS_PYTHON is not Python 3.11 to 3.13"
        printf '%s\n' "$HFCOMPRESS_PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is needed; install one, or name it in HFCOMPRESS_PYTHON"
}

install() {
    "$python" -m pip install -qq --disable-pip-version-check --no-input \
        --constraint scripts/constraints.txt "$@" || fail "pip could not install $* (its message stands above)"
}

make_environment() {
    local base
    base=$(find_python)
    if ! supported "$python"; then
        "$base" -m venv --clear .venv || fail "$base cannot make a virtual environment (python3-venv may be missing)"
    fi
    echo "Installing into .venv (some 2 GB; a minute or a few) ..." >&2
    # Torch first and pinned: an open requirement may pull another build of several GB.
    install "$(grep '^torch==' scripts/constraints.txt)"
    install --editable '.[dev]'
    "$python" -m pip check --quiet --disable-pip-version-check || fail "the installed packages do not fit together"
    wanted_stamp > "$stamp"
}

if [[ ! -x $python || ! -f $stamp || $(< "$stamp") != "$(wanted_stamp)" ]]; then
    # Two scripts started together must not both install.
    exec 9> .venv.lock
    flock 9
    if [[ ! -x $python || ! -f $stamp || $(< "$stamp") != "$(wanted_stamp)" ]]; then
        make_environment
    fi
    exec 9>&-
fi
