"""Ask a model about the clips of a data set or a folder; every row accounted for. Run it again to go on.

python jobs/answer.py                    the nano model on generated clips, as jobs/configs/answer.yaml says
python jobs/answer.py model=DIR input=FOLDER question='What happens?' output=DIR [key=value ...]
python jobs/answer.py --input RECORDS [--input ...] [--media-root DIR] --output DIR model=DIR [key=value ...]
python jobs/answer.py CONFIG.yaml [key=value ...]

Records are asked their own questions, without their answers; question= asks about every other clip. Written to output:
answers.parquet, answers.jsonl and answers-summary.json. Every setting: AnswerSettings in valley_ray/evaluate/config.py.
"""

import argparse
import sys
from pathlib import Path

from valley_ray.program import run_program
from valley_ray.session import connect, quiet_ray_data

GENERATED = Path(__file__).parent / "configs" / "answer.yaml"


def main(arguments: list[str]) -> int:
    """Exit status, as `run_program` has them; failed rows are counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--input", action="append", default=[], metavar="FILE_OR_FOLDER", help="records or media")
    parser.add_argument("--media-root", metavar="DIR", help="folder of the media that records name; else theirs")
    parser.add_argument("--output", metavar="DIR", help="folder that is written, or gone on with")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    given = parser.parse_intermixed_args(arguments)

    def work() -> None:
        from valley_ray.evaluate.answer_files import answer_sources
        from valley_ray.evaluate.answer_words import read_words
        from valley_ray.evaluate.check import check_answers

        named = {"inputs": given.input, "media_root": given.media_root, "output": given.output}
        settings = read_words(given.words, **named, default=GENERATED, say=lambda line: print(line, flush=True))
        check_answers(settings)
        connect()
        quiet_ray_data()
        print(answer_sources(settings).text())

    return run_program("answer", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
