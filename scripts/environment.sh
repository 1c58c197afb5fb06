# Sourced by quickstart.sh and test.sh: makes .venv once, installs the project and `extras` into it, reuses both.
# Usage: extras=test; . scripts/environment.sh

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or later is needed, $python is $("$python" --version 2>&1); set PYTHON=/path/to/python" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=".venv/installed-${extras:-plain}"
if ! cmp -s setup.py "$stamp"; then
    echo "Installing into .venv (PyTorch is large: a few minutes the first time) …"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    cp setup.py "$stamp"
fi
