#!/usr/bin/env bash
# Sets everything up (once), then makes the documentation site in runs/site: the pages of docs/,
# the API from its docstrings, the command's manual from the command. A warning is an error.
# Arguments go to Sphinx: launch/docs.sh -D mermaid_use_local=https://mirror/mermaid.esm.min.mjs
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

site=runs/site
"$python" -m sphinx -q -W --keep-going -b html "$@" docs "$site"
echo "The site is made: $site/index.html"
