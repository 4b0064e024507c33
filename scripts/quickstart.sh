#!/usr/bin/env bash
# From nothing to a compressed, measured model; arguments go to `hfcompress run` (such as --set seed=1).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# A spinning OpenMP pool slows whatever shares the cores.
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
exec .venv/bin/hfcompress run recipes/quickstart.yaml "$@"
