# shellcheck shell=bash
# Sourced by ci/setup, ci/test, ci/interop and ci/flakes: finds or installs a Python, then starts a module of ci/ with it.

# Replace this shell by a module of ci/, run by Python 3.11 or newer in the root of the checkout. Exit with 125 if there
# is no such Python.
hand_over() {
    cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit 125
    # On Debian a user's PATH lacks the directory of nft. Python must write byte code, or every start would be slow.
    export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
    unset PYTHONDONTWRITEBYTECODE PYTHONHOME
    local python module=$1
    shift
    python=$(find_python) || { install_python && python=$(find_python); } || no_python
    exec "$python" -S -m "$module" "$@"
}

# Print the first Python 3.11 or newer. The system's Python comes first, because Debian keeps it secure.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -ISc 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

# Install Debian's Python as root, or by sudo if it needs no password; return 1 if neither is possible.
install_python() {
    local become=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        become=(sudo -n)
    fi
    echo "no Python 3.11 or newer: installing Debian's" >&2
    become+=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=600)
    "${become[@]}" update >&2
    "${become[@]}" install -y --no-install-recommends python3 python3-venv >&2 || return 1
    printf '%-9s  %-20s %7.1f s\n' ok python "$SECONDS"
}

# Print the command that installs Python and the other packages, and exit with 125.
no_python() {
    echo "ci: no Python 3.11 or newer; as root: apt-get install --no-install-recommends" \
        "$(sed -n 's/^\([a-z][^ ]*\) .*/\1/p' ci/packages.txt | paste -sd ' ')" >&2
    exit 125
}
