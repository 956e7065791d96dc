#!/usr/bin/env bash
# The main job, small and offline: train on the embedded crystals, sample, relax, place against a hull, report.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment evaluate
exec "$PYTHON" -m jaxcrystal.cli demo "$@"
