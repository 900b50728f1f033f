#!/bin/sh
# Makes .venv (everything that `make check`, `make test` and `make demo` need) out of a bare Python 3.11+.
#
#   requirements/bootstrap.sh PYTHON
#
# uv does the work: the one on PATH when it runs, else one that pip brings into .venvs/tools. Where packages come from
# is the user's own uv or pip configuration; uv does not read pip's, so pip has a try when uv finds no packages.
set -eu

python=${1:-}
if [ -z "$python" ]; then
    echo "make: no Python 3.11 or newer found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv)," >&2
    echo "make: or name it: make PYTHON=/path/to/python3" >&2
    exit 1
fi

started=$(date +%s)
say() { echo "[$(($(date +%s) - started)) s] $*"; }

make_tools() {
    [ -x .venvs/tools/bin/python ] && .venvs/tools/bin/python -m pip --version >/dev/null 2>&1 && return
    rm -rf .venvs/tools
    if ! "$python" -m venv .venvs/tools >.venvs/tools.log 2>&1; then
        cat .venvs/tools.log >&2
        rm -rf .venvs/tools
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "make: $python cannot make a virtual environment with pip. On Debian and Ubuntu:" >&2
        echo "make:     apt-get install python3-venv    (or python$version-venv)" >&2
        exit 1
    fi
}

mkdir -p .venvs
if uv --version >/dev/null 2>&1; then
    uv=uv
else
    uv=.venvs/tools/bin/uv
    if ! "$uv" --version >/dev/null 2>&1; then
        say "bringing uv into .venvs/tools"
        make_tools
        .venvs/tools/bin/python -m pip install --quiet --disable-pip-version-check \
            --require-hashes -r requirements/tools.txt
    fi
fi

say "making .venv ($("$python" --version)) from requirements/dev.txt"
"$uv" venv --quiet --allow-existing --python "$("$python" -c 'import sys; print(sys.executable)')" .venv
if ! "$uv" pip install --quiet --python .venv/bin/python --require-hashes -r requirements/dev.txt; then
    say "uv could not fetch the packages; trying pip, which has its own configuration"
    make_tools
    .venvs/tools/bin/python -m pip --python .venv/bin/python install --quiet --disable-pip-version-check \
        --require-hashes -r requirements/dev.txt
fi
# Without build isolation: the build backend is hatchling of the lock, and nothing is fetched past the hashes.
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation \
    -e packages/xim_protocol -e packages/xim_router -e packages/xim_agent
say ".venv is ready"
