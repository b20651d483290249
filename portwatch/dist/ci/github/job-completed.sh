#!/bin/sh
# After each job of a self-hosted runner, however it ended: whatever the job left listening is ended.
# A job is to fail if it leaves something behind? Add --fail-on-leak. One job at a time runs containers on this host?
# Add --stop-container.
set -eu
portwatch kill --since "$RUNNER_TEMP/portwatch.mark" --yes
