import pytest
import torch

from valley_ray.engine import sampling
from valley_ray.engine.engine import SamplingParams
from valley_ray.engine.sampling import choose_tokens, uniform_number

UNIFORM_OF_SEED_7 = [0.872073, 0.082843, 0.014108]
LOGITS = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))


def drawn(count: int, **options: float) -> list[int]:
    params = SamplingParams(**{"temperature": 1.0, **options})
    return choose_tokens(LOGITS.expand(count, -1), [params] * count, range(count))


def test_temperature_zero_is_the_likeliest_token() -> None:
    assert choose_tokens(LOGITS, [SamplingParams(seed=3)], [7]) == [1]


def test_uniform_numbers_never_change() -> None:
    # Recorded once: another stream would break the promise that a seed reproduces an answer across versions.
    assert [round(uniform_number(7, position), 6) for position in range(3)] == UNIFORM_OF_SEED_7
    assert uniform_number(-1, 0) == uniform_number(2**64 - 1, 0)


def test_frequencies_follow_the_probabilities() -> None:
    counts = torch.bincount(torch.tensor(drawn(4000)), minlength=4) / 4000
    # 3 standard deviations of a share of 0.5 over 4000 draws are 0.024.
    torch.testing.assert_close(counts, LOGITS[0].exp(), atol=0.025, rtol=0)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(drawn(300, top_k=2)) == {1, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    assert set(drawn(300, top_p=0.45)) == {1}
    assert set(drawn(300, top_p=0.7)) == {1, 3}
    assert set(drawn(500, top_p=0.8)) == {1, 2, 3}


def test_a_low_temperature_sharpens() -> None:
    assert drawn(300, temperature=0.05) == [1] * 300


def test_rows_are_chosen_apart() -> None:
    rows = torch.cat([LOGITS, LOGITS.flip(1), LOGITS])
    greedy, hot = SamplingParams(), SamplingParams(temperature=1.0, seed=5)
    alone = choose_tokens(LOGITS, [hot], [3])
    assert choose_tokens(rows, [hot, greedy, greedy], [3, 0, 0]) == [alone[0], 2, 1]


def test_a_temperature_that_float32_does_not_hold_is_greedy() -> None:
    for temperature in (1e-45, 1e-300, 5e-324):
        assert drawn(20, temperature=temperature) == [1] * 20


def test_the_shortlist_draws_what_sorting_everything_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    flat, peaked = torch.randn(1000, generator=generator) * 0.1, torch.randn(1000, generator=generator) * 4
    ties = (peaked * 2).round() / 2
    options = [{}, {"top_k": 7}, {"top_k": 400}, {"top_p": 0.8}, {"top_p": 0.999}, {"top_k": 20, "top_p": 0.5}]
    params = [SamplingParams(temperature=1.0, seed=seed, **one) for one in options for seed in range(40)]
    positions = [0] * len(params)
    for row in (flat, peaked, ties):
        rows = row.expand(len(params), -1)
        monkeypatch.setattr(sampling, "_SHORTLIST", 1000)
        expected = choose_tokens(rows, params, positions)
        for length in (5, 64):
            monkeypatch.setattr(sampling, "_SHORTLIST", length)
            assert choose_tokens(rows, params, positions) == expected, length
        assert [choose_tokens(row[None], [one], [0])[0] for one in params] == expected
