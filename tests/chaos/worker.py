"""A whole worker whose compute process plays the toy job. Started by path with its folder in TENFOLD_ variables."""

import logging
import sys
from pathlib import Path

from db.settings import Settings
from launch.lifeline import end_with_stdin
from workers.app import run_worker

TOY_JOB = Path(__file__).parents[1] / "workers" / "toy_job.py"

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    end_with_stdin()
    sys.exit(run_worker(Settings(), compute=[str(TOY_JOB)]))
