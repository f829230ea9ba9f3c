"""The programs in jobs/, opened as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

JOBS = Path(__file__).parents[1] / "jobs"


def load_job(name: str) -> ModuleType:
    """The module of jobs/NAME.py, whose `main` has not run."""
    spec = importlib.util.spec_from_file_location(f"{name}_job", JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
