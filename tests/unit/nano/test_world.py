"""The nano world: scenes that depend on their seed alone, and frames that show what the scene says."""

import numpy as np

from valley_ray.nano.make import WorldConfig
from valley_ray.nano.world import COLORS, DIRECTIONS, SCENE_KINDS, SIDE, VISIBLE, render, sample_scene


def test_scene_is_a_function_of_its_seed_and_index() -> None:
    for kind in SCENE_KINDS:
        assert sample_scene(3, 7, kind) == sample_scene(3, 7, kind)
        assert sample_scene(3, 7, kind) != sample_scene(3, 8, kind)
        assert sample_scene(3, 7, kind) != sample_scene(4, 7, kind)


def test_centres_stay_inside_what_the_centre_crop_keeps() -> None:
    margin = (SIDE - VISIBLE) / 2
    for kind in SCENE_KINDS:
        for index in range(50):
            for actor in sample_scene(0, index, kind).actors:
                for progress in np.linspace(0, 1, 9):
                    assert all(margin <= place <= SIDE - margin for place in actor.center(float(progress)))


def test_shape_moves_the_way_it_says() -> None:
    for index in range(50):
        (actor,) = sample_scene(1, index, "single").actors
        moved = np.subtract(actor.center(1.0), actor.center(0.0))
        assert tuple(np.sign(np.round(moved, 6)).astype(int)) == DIRECTIONS[actor.directions[0]]


def test_turning_shape_makes_two_different_moves() -> None:
    for index in range(30):
        (actor,) = sample_scene(1, index, "sequence").actors
        for leg in range(2):
            moved = np.subtract(actor.path[leg + 1], actor.path[leg])
            assert tuple(np.sign(np.round(moved, 6)).astype(int)) == DIRECTIONS[actor.directions[leg]]
        assert actor.directions[0] != actor.directions[1]


def test_rendered_shape_has_its_colour_where_it_is() -> None:
    for index in range(30):
        scene = sample_scene(2, index, "single")
        (actor,) = scene.actors
        if actor.shape == "ring":
            continue  # its middle is a hole
        x, y = actor.center(0.5)
        pixel = render(scene, np.array([0.5]))[0, int(y), int(x)].astype(int)
        nearest = min(COLORS, key=lambda name: np.abs(np.subtract(COLORS[name], pixel)).sum())
        assert nearest == actor.color


def test_a_file_stem_names_its_scene_alone() -> None:
    split = WorldConfig(num_train=5, num_train_harder=3).train
    assert all(split.scene(stem) == scene for stem, scene in split.scenes())


def test_no_clip_is_both_in_train_and_held_out() -> None:
    world = WorldConfig(num_train=300, num_held_out=300, num_train_harder=50, num_held_out_harder=50)
    train = {scene.digest for _, scene in world.train.scenes()}
    held_out = {scene.digest for _, scene in world.held_out.scenes()}
    assert len(train) == 450
    assert len(held_out) == 450
    assert not train & held_out
