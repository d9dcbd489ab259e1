#!/bin/bash
# A smoke test for CI: does the training script start, make steps, and come to an end?
#
#     examples/smoke_test.sh train.py --max-steps 20
#
# Two workers on the CPU. A hang ends the job, with the stacks of all ranks, long before CI's own limit does. The summary
# goes to the page of the run on GitHub, or to stdout elsewhere.
set -uo pipefail
logs=${SMOKE_LOGS:-$(mktemp -d)}

elastic-run --standalone --nproc-per-node 2 --max-restarts 1 \
    --start-timeout 300 --hang-timeout 120 --hang-action stop \
    --log-dir "$logs" -t 3 "$@"
status=$?

elastic-job report "$logs" --format md >> "${GITHUB_STEP_SUMMARY:-/dev/stdout}"
exit "$status"
