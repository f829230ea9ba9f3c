"""Train Valley's first stage alone on Ray: the projector learns to say what the tower sees.

python jobs/pretrain.py                               the nano model's (jobs/configs/nano-stage1.yaml)
python jobs/pretrain.py jobs/configs/valley-stage1.yaml num_workers=4
python jobs/pretrain.py --check CONFIG.yaml           what would be trained, its memory and steps; starts nothing

Of a configuration with more stages the first is run. What it leaves is a model folder for jobs/finetune.py. Clips and
backbones of the nano model are made where they are missing. The guide: docs/training.md
"""

import sys
from pathlib import Path

from valley_ray.cli.training import run_job

NANO = Path(__file__).parent / "configs" / "nano-stage1.yaml"

if __name__ == "__main__":
    sys.exit(run_job("pretrain", sys.argv[1:], about=str(__doc__), default=NANO, first_stage_alone=True))
