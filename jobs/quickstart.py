"""Generated videos → a trained nano Valley → answers over HTTP: python jobs/quickstart.py [key=value ...]

Settings: valley_ray/quickstart/config.py, for example num_workers=1 num_served=0.
"""

import signal
import sys
from typing import NoReturn

from valley_ray.config import load_config
from valley_ray.errors import ValleyError

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


def main() -> int:
    """Exit status 0, or with one line on stderr 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM.

    Raises:
        SystemExit: as Ray ends a process that is connected to it at SIGTERM.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        from valley_ray.quickstart.config import QuickstartConfig
        from valley_ray.quickstart.road import run

        run(load_config(QuickstartConfig, overrides=sys.argv[1:]))
    except ValleyError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return USER_ERROR
    except (KeyboardInterrupt, SystemExit) as error:
        print("quickstart: stopped; run it again: it begins anew and replaces what this run made", file=sys.stderr)
        if isinstance(error, SystemExit):
            raise  # Ray's handler of SIGTERM, which it puts in place of ours: the status is its own
        return TERMINATED if signal.SIGTERM.name in str(error) else INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(*_: object) -> NoReturn:
    """SIGTERM as an exception: what was begun is cleaned up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break off the cleaning
    raise KeyboardInterrupt(signal.SIGTERM.name)


if __name__ == "__main__":
    sys.exit(main())
