"""Where jobs keep what they write, and where they look for what they read.

Relative paths of a configuration mean the folder a job was started in. A job submitted to a cluster runs in a copy of
that folder which is deleted afterwards: its outputs go to ``$VALLEY_STORAGE``, or to ``~/valley_storage`` where that
is not set.
"""

import json
import os
from pathlib import Path

STORAGE_VARIABLE = "VALLEY_STORAGE"
SUBMITTED_STORAGE = "~/valley_storage"


def storage_root() -> Path:
    """Absolute folder that relative outputs are put under."""
    named = os.environ.get(STORAGE_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    if is_submitted_job():
        return Path(SUBMITTED_STORAGE).expanduser().absolute()
    return Path.cwd()


def is_submitted_job() -> bool:
    """True in a process that `ray job submit` started: Ray puts the submission's id into the job's metadata."""
    try:
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    except json.JSONDecodeError:
        return False
    return "job_submission_id" in (job.get("metadata") or {})
