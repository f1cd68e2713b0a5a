#!/usr/bin/env bash
# Sets up .venv from the requirements and runs the checks.
#
#   ./quickstart.sh setup     make .venv and install into it
#   ./quickstart.sh test      setup, then ruff, the unit tests and the scripts' tests (CPU, offline)
#
# PYTHON names the interpreter that .venv is made with (default: python3).
set -euo pipefail
cd "$(dirname "$0")"

requirements=(requirements.txt requirements-dev.txt)
stamp=.venv/.requirements

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0"
}

setup() {
    local python=${PYTHON:-python3}
    [ ! -x .venv/bin/python ] || python=.venv/bin/python
    if ! command -v "$python" >/dev/null; then
        echo "error: $python was not found; install Python 3.11 or newer, or set PYTHON to it" >&2
        exit 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed, $python is $("$python" -V 2>&1);" \
            "set PYTHON to a newer one, and remove .venv if it is the old one" >&2
        exit 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # An install is skipped while the requirements are what they were at the last one.
    if ! cat "${requirements[@]}" | cmp -s - "$stamp"; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
        cat "${requirements[@]}" >"$stamp"
    fi
}

run_tests() {
    .venv/bin/python -m ruff check .
    export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    .venv/bin/python -m pytest -q -m "not (scripts or slow or gpu or weights)"
    .venv/bin/python -m pytest -q -m scripts
}

case "${1:-}" in
    setup)
        setup
        ;;
    test)
        setup
        run_tests
        ;;
    "" | -h | --help)
        usage
        ;;
    *)
        echo "error: unknown command '$1'; expected setup or test" >&2
        exit 2
        ;;
esac
