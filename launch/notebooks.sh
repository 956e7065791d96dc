#!/usr/bin/env bash
# Executes the notebooks, minutes each on two cores, and writes notebooks/pages. Arguments: the scripts (all).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment notebooks
exec "$PYTHON" launch/notebooks.py "$@"
