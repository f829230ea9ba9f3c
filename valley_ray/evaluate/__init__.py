"""Answers over data sets, and how good they are.

Answers, for an evaluation and for whoever wants no more than answers:
    config.py        what a user writes
    questions.py     samples → a row per question; kinds.py: what kind of question it is
    room.py          one model, many questions at once
    stages.py        a block of questions: its clips decoded, then answered; execution.py: the same on Ray
    ledger.py        answers on disk as they come
    answers.py       all of it: sources → answers, every row accounted for
    answer_files.py  the same as Parquet and JSON lines (jobs/answer.py); answer_words.py: what is typed after the job
    check.py         what is refused before anything starts
Numbers:
    texts.py, overlap.py, bertscore.py, judge.py, metrics.py
    predictions.py   Parquet and JSON; page.py: the same to look at
    evaluation.py    alone (jobs/evaluate.py), and of a training's checkpoint
    generated.py     what the jobs work on where they are told nothing
    accuracy.py      the quickstart's accuracies
"""
