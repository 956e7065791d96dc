# Sourced by demo.sh and test.sh: a virtual environment of our own, made when it is missing or out of date.
#   make_environment EXTRAS    installs jaxcrystal[EXTRAS] into .venv and leaves its python in $PYTHON

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

make_environment() {
  local extras=$1 stamp=.venv/installed-$1 base
  for base in python3 python3.13 python3.12 python3.11; do
    command -v "$base" >/dev/null && "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    base=
  done
  [ -n "$base" ] || fail "needs Python 3.11 or newer on the PATH; install it and run this again"
  PYTHON=$PWD/.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    "$base" -m venv .venv || fail "cannot make a virtual environment in $PWD/.venv; install Python's venv module"
  fi
  local wanted
  wanted=$(cat pyproject.toml constraints.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setting up $PWD/.venv (some minutes, once)"
    # Modules are compiled when they are first imported; most never are.
    "$PYTHON" -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[$extras]" \
      || fail "could not install jaxcrystal[$extras] into .venv; the lines above say what is missing"
    echo "$wanted" >"$stamp"
  fi
}
