"""Questions about scenes: one right answer each, in records that upstream's reader knows."""

from collections import Counter

import numpy as np

from valley_ray.chat.conversation import from_valley_record
from valley_ray.nano.clips import Split, question_records, training_records
from valley_ray.nano.language import make_tokenizer
from valley_ray.nano.questions import HARDER_KINDS, SINGLE_KINDS, conversations_about, questions_about
from valley_ray.nano.world import SCENE_KINDS, sample_scene

SPLIT = Split("some", 5, (("single", 40), ("pair", 10), ("sequence", 10), ("count", 10)))


def test_answers_tell_what_the_scene_holds() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(0, 0, "single")
    (actor,) = scene.actors
    answers = {question.kind: question.answer for question in questions_about(scene, rng)}
    assert answers == {
        "color": actor.color,
        "shape": actor.shape,
        "direction": actor.directions[0],
        "caption": f"a {actor.color} {actor.shape} moves {actor.directions[0]}",
    }


def test_every_scene_kind_is_asked_about() -> None:
    rng = np.random.default_rng(0)
    kinds = {q.kind for kind in SCENE_KINDS for q in questions_about(sample_scene(0, 0, kind), rng)}
    assert kinds == {*SINGLE_KINDS, *HARDER_KINDS}


def test_a_caption_is_never_learned_beside_the_answers_it_holds() -> None:
    rng = np.random.default_rng(0)
    for index in range(20):
        talks = conversations_about(sample_scene(0, index, "single"), rng)
        assert sorted(len(talk) for talk in talks) == [1, 3]
        assert all(len(talk) == 1 for talk in talks if any(question.kind == "caption" for question in talk))


def test_records_read_as_valley_conversations() -> None:
    for record in [*training_records(SPLIT), *question_records(SPLIT)]:
        conversation = from_valley_record(record)
        assert conversation.num_media == 1
        assert record["video"].startswith("some/")


def test_ids_are_unique_and_questions_carry_their_kind() -> None:
    questions = question_records(SPLIT)
    assert len({record["id"] for record in questions}) == len(questions) == 40 * 4 + 30
    assert Counter(record["kind"] for record in questions)["color"] == 40


def test_shuffled_answers_keep_their_frequencies_and_lose_their_clips() -> None:
    plain, shuffled = training_records(SPLIT), training_records(SPLIT, shuffle_answers=True)
    assert [record["id"] for record in plain] == [record["id"] for record in shuffled]

    def answers(records: list[dict]) -> list[str]:  # type: ignore[type-arg]
        return [turn["value"] for record in records for turn in record["conversations"][1::2]]

    assert Counter(answers(plain)) == Counter(answers(shuffled))
    same = sum(one == other for one, other in zip(answers(plain), answers(shuffled), strict=True))
    assert same < len(answers(plain)) / 2


def test_tokenizer_knows_every_word_of_the_nano_world() -> None:
    tokenizer = make_tokenizer()
    for record in training_records(SPLIT):
        for turn in record["conversations"]:
            ids = tokenizer.encode(turn["value"].removeprefix("<video>\n"), add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids, turn["value"]
