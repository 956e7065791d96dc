#!/usr/bin/env bash
# mini, which comes with the package, designs crystals; they are relaxed, placed against a hull, and reported. Offline.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment evaluate
exec "$PYTHON" -m jaxcrystal.cli demo "$@"
