"""Generated videos → a trained nano Valley → answers over HTTP: python jobs/quickstart.py [key=value ...]

Settings: valley_ray/quickstart/config.py, for example num_workers=1 num_served=0.
"""

import sys

from valley_ray.config import load_config
from valley_ray.program import run_program


def main(arguments: list[str]) -> int:
    """Exit status, as `run_program` has them."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0

    def work() -> None:
        from valley_ray.quickstart.config import QuickstartConfig
        from valley_ray.quickstart.road import run

        run(load_config(QuickstartConfig, overrides=arguments))

    stopped = "stopped; run it again: it begins anew and replaces what this run made"
    return run_program("quickstart", work, stopped=stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
