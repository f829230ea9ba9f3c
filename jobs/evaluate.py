"""Answer a held-out split with a model, and measure; every row accounted for. Run it again to go on where it stopped.

python jobs/evaluate.py                                  the nano model on generated clips (jobs/configs/evaluate.yaml)
python jobs/evaluate.py model=DIR output=DIR 'sources=[{path: test_q.json, media_root: videos}]'
python jobs/evaluate.py CONFIG.yaml [key=value ...]

Sources are what jobs/prepare.py reads too, the files of MSVD-QA, MSRVTT-QA and ActivityNet-QA among them. Written to
output: predictions.parquet, metrics.json and predictions.html. Every setting is described in
valley_ray/evaluate/config.py.
"""

import sys
from pathlib import Path

from valley_ray.config import load_config
from valley_ray.errors import ValleyError
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.program import run_program
from valley_ray.session import connect, quiet_ray_data
from valley_ray.storage import storage_root

GENERATED = Path(__file__).parent / "configs" / "evaluate.yaml"


def main(arguments: list[str]) -> int:
    """Exit status, as `run_program` has them."""
    if {"-h", "--help"} & set(arguments):
        print(str(__doc__).strip())
        return 0

    def work() -> None:
        from valley_ray.evaluate.evaluation import check_evaluation, evaluate

        config = _config(arguments)
        check_evaluation(config)
        connect()
        quiet_ray_data()
        print(evaluate(config).text())

    return run_program("evaluate", work)


def _config(arguments: list[str]) -> EvaluationConfig:
    overrides = [argument for argument in arguments if "=" in argument]
    paths = [Path(argument) for argument in arguments if "=" not in argument]
    if options := [one for one in arguments if one.startswith("-")]:
        raise ValleyError(f"unknown option {options[0]}; records are named by 'sources=[{{path: FILE}}]'")
    if len(paths) > 1:
        raise ValleyError(f"expected one configuration file, got {' and '.join(map(str, paths))}; drop one")
    config = load_config(EvaluationConfig, paths[0] if paths else GENERATED, overrides).under(storage_root())
    if paths or any(one.startswith("sources=") for one in overrides):
        return config
    from valley_ray.evaluate.generated import make_generated

    return make_generated(config, storage_root(), say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
