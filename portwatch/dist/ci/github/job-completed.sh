#!/bin/sh
# After each job of a self-hosted runner, however it ended: whatever the job left listening is ended.
# A job is to fail if it leaves something behind? Add --fail-on-leak. Others make containers on this host meanwhile? Leave
# out --stop-container: it stops all that publish ports and were made since.
set -eu
portwatch kill --since "$RUNNER_TEMP/portwatch.mark" --yes --stop-container
