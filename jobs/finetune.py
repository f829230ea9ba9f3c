"""Train Valley's stages on Ray: the configuration's stages one after the other, in one run.

python jobs/finetune.py                               both stages of the nano model (jobs/configs/nano.yaml)
python jobs/finetune.py num_workers=1 zero_stage=3    the same with other settings
python jobs/finetune.py jobs/configs/valley-stage2.yaml model=models/mine
python jobs/finetune.py --check CONFIG.yaml           what would be trained, its memory and steps; starts nothing

Clips and backbones of the nano model are made where they are missing. The guide: docs/training.md
"""

import sys
from pathlib import Path

from valley_ray.cli.training import run_job

NANO = Path(__file__).parent / "configs" / "nano.yaml"

if __name__ == "__main__":
    sys.exit(run_job("finetune", sys.argv[1:], about=str(__doc__), default=NANO))
