#!/bin/sh
# Runs a command and ends what it leaves listening, however it ends: clean-run.sh make test
# It exits as the command does; with 1 where that went well and something was left behind. --stop-container stops all
# containers that publish ports and were made meanwhile: leave it out where others make some on this host.
set -eu
mark=$(mktemp)
end() {
    code=$?
    trap - EXIT
    portwatch kill --since "$mark" --yes --stop-container --fail-on-leak || [ "$code" -ne 0 ] || code=1
    rm -f "$mark"
    exit "$code"
}
portwatch mark > "$mark"
trap end EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
"$@"
