"""A driver of 10,000 runs on 100 workers keeps up with them."""

import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent


def test_the_driver_keeps_up_with_ten_thousand_runs_on_a_hundred_workers():
    # A process of its own, so that the memory is the driver's.
    command = [sys.executable, "-m", "tests.ablation_scheduling"]
    found = json.loads(subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout)
    assert (found["runs"], found["workers"], found["most at a time"]) == (10_000, 100, 100)
    assert 50 < found["failed"] < 200
    # A run of a minute on each of 100 workers ends every 600 ms; a driver that takes 1 % of that is never waited for.
    assert found["driver: ms of processor time per run"] < 6
    assert found["the same in the last tenth"] < 3 * found["the same in the second tenth of the runs"] + 1
    assert found["driver: MB beside what it began with"] < 100
    assert found["share of workers busy"] > 0.9
