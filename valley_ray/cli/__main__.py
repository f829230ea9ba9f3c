"""`python -m valley_ray.cli` is `valley-ray`."""

import sys

from valley_ray.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
