#!/usr/bin/env bash
# Makes .venv-clients (once): the libraries whose objects tests/clients tracks. The packages of
# .venv are seen from there, so torch is not installed twice. May be sourced: sets clients_python.
# Says what could not be installed, and fails then.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

clients_venv=$root/.venv-clients
clients_python=$clients_venv/bin/python
clients_stamp=$clients_venv/.distckpt-installed
clients_with=tests/clients/requirements.txt
clients_without=tests/clients/requirements-no-deps.txt

stamp_of_clients() {
    { stamp_of_requirements; cat launch/clients_env.sh "$clients_with" "$clients_without"; } | cksum
}

site_of() { # python
    "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

install_for_clients() { # arguments of pip's
    "$clients_python" -m pip install --quiet --no-compile --disable-pip-version-check \
        -c launch/requirements.txt "$@"
}

# Installs a file's packages at once; else one by one, to name those that fail.
install_file() { # FILE, more arguments of pip's
    local line failed=()
    if install_for_clients -r "$@"; then
        return
    fi
    while read -r line; do
        install_for_clients --retries 0 "$line" "${@:2}" || failed+=("$line")
    done < <(grep -v '^#' "$1")
    echo "clients: not installed: ${failed[*]}" >&2
    return 1
}

install_clients() {
    local site complete=yes
    echo "clients: making $clients_venv (once) ..."
    rm -rf "$clients_venv"
    "$python" -m venv "$clients_venv"
    site=$(site_of "$clients_python")
    echo "import site; site.addsitedir('$(site_of "$python")')" >"$site/distckpt-project.pth"
    install_file "$clients_with" || complete=
    install_file "$clients_without" --no-deps || complete=
    if [ -z "$complete" ]; then
        return 1
    fi
    (cd "$site" && "$clients_python" -m compileall -q -j 0 -x '/(pip|setuptools|tests|test)/' . \
        >/dev/null) || true
    stamp_of_clients >"$clients_stamp"
}

if [ "$(cat "$clients_stamp" 2>/dev/null)" != "$(stamp_of_clients)" ]; then
    install_clients
fi
