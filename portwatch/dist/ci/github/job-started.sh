#!/bin/sh
# Before each job of a self-hosted runner. In the runner's .env:
#   ACTIONS_RUNNER_HOOK_JOB_STARTED=/opt/portwatch/job-started.sh
#   ACTIONS_RUNNER_HOOK_JOB_COMPLETED=/opt/portwatch/job-completed.sh
set -eu
portwatch mark > "$RUNNER_TEMP/portwatch.mark"
