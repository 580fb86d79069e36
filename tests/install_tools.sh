#!/usr/bin/env bash
# Installs what the tests need besides Python: Chromium, Node.js with npm and the packages of tests/node, and the package
# lists of apt. What is there already is left as it is. What cannot be installed is named, and the tests that need it are
# skipped, with the reason at the end of their report.
set -u
cd "$(dirname "$0")/.."

apt() {
    command -v apt-get > /dev/null || return 1
    if [ "$(id -u)" -eq 0 ]; then
        DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 --yes "$@" > /dev/null
    elif command -v sudo > /dev/null && sudo --non-interactive true 2> /dev/null; then
        sudo --non-interactive DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 --yes "$@" > /dev/null
    else
        return 1
    fi
}

packages=()
[ -x "${CHROMIUM:-}" ] || command -v chromium chromium-browser google-chrome > /dev/null || packages+=(chromium)
command -v node > /dev/null || packages+=(nodejs)
command -v npm > /dev/null || packages+=(npm)

# Two data sets of the tests are Debian packages, which apt-get finds by its lists.
if command -v apt-cache > /dev/null && ! apt-cache show gnome-cards-data > /dev/null 2>&1; then
    apt update || echo "tests: the package lists of apt could not be updated" >&2
fi
if [ ${#packages[@]} -ne 0 ]; then
    echo "Installing with apt-get: ${packages[*]}"
    apt install --no-install-recommends "${packages[@]}" || echo "tests: ${packages[*]} could not be installed" >&2
fi

made=tests/node/node_modules/.made
if command -v npm > /dev/null && [ ! "$made" -nt tests/node/package-lock.json ]; then
    if npm ci --prefix tests/node --ignore-scripts --no-audit --no-fund --loglevel=error; then
        touch "$made"
    else
        echo "tests: npm could not install the packages of tests/node" >&2
    fi
fi
exit 0
