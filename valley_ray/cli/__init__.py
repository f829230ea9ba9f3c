"""valley-ray: the command line. Arguments in, answers on stdout, one-line errors on stderr.

Every ValleyError is one line and exit code 2. Each command imports what it needs when it runs, so that `--help` and
mistakes that can be seen early cost no import of torch or Ray. Knows no Ray itself: `valley_ray.serve` does.
"""

from valley_ray.cli.entry import main

__all__ = ["main"]
