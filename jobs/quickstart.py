"""Generated videos → a trained nano Valley → answers over HTTP: python jobs/quickstart.py [key=value ...]

Settings: valley_ray/quickstart/config.py, for example num_workers=1 num_served=0.
"""

import sys

from valley_ray.config import load_config
from valley_ray.errors import ValleyError


def main() -> int:
    """Exit status 0, or 2 with one line on stderr for a user's mistake."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    from valley_ray.quickstart.config import QuickstartConfig
    from valley_ray.quickstart.road import run

    try:
        config = load_config(QuickstartConfig, overrides=sys.argv[1:])
        run(config)
    except ValleyError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
