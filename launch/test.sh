#!/usr/bin/env bash
# All tests, with their set-up. Arguments go to pytest: bash launch/test.sh tests/crystals -k tokens
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment test
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -n auto --dist worksteal --durations 80 --durations-min 5 "$@"
