"""From drops in score to weights: equal to the equations as they are written, and what follows from them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels.calibration import Calibration, head_importance
from hawk_kernels.calibration.importance import flat_benchmarks, importance_standard_errors, spread_of_heads
from hawk_kernels.calibration.result import layer_result, task_score

# as scores of a few samples are: often equal, never tiny
drops = st.integers(-20, 20).map(lambda n: n / 20)


@st.composite
def matrices(draw):
    heads, benchmarks = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(drops, min_size=benchmarks, max_size=benchmarks), min_size=heads, max_size=heads))
    return torch.tensor(rows, dtype=torch.float64)


@given(matrices())
def test_weights_are_those_of_the_equations(deltas):
    weights = head_importance(deltas)
    assert weights.dtype == torch.float64
    assert torch.allclose(weights, csrc_ref.head_importance(deltas), atol=1e-14)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (weights >= 0).all()


@given(matrices(), st.floats(-5, 5), st.floats(0.1, 10))
def test_only_differences_between_heads_count(deltas, shift, scale):
    assert torch.allclose(head_importance(deltas * scale + shift), head_importance(deltas), atol=1e-7)


@given(matrices(), st.randoms())
def test_the_order_of_heads_and_benchmarks_does_not_matter(deltas, random):
    heads, benchmarks = (random.sample(range(n), n) for n in deltas.shape)
    shuffled = head_importance(deltas[heads][:, benchmarks])
    assert torch.allclose(shuffled, head_importance(deltas)[heads], atol=1e-14)


def test_a_benchmark_without_spread_counts_as_uniform():
    deltas = torch.tensor([[0.3, 0.1], [0.1, 0.1], [0.0, 0.1]], dtype=torch.float64)
    assert head_importance(deltas).tolist() == pytest.approx([(0.75 + 1 / 3) / 2, (0.25 + 1 / 3) / 2, 1 / 6])
    assert flat_benchmarks(deltas) == [1]
    assert head_importance(deltas[:, 1:]).tolist() == pytest.approx([1 / 3] * 3)


def test_what_rounding_leaves_of_a_difference_is_no_spread():
    deltas = torch.tensor([[0.1 + 0.2], [0.3], [0.3]], dtype=torch.float64)
    assert deltas.std() > 0
    assert head_importance(deltas).tolist() == [1 / 3] * 3
    assert flat_benchmarks(deltas) == [0]


def test_negative_drops_and_single_precision():
    deltas = torch.tensor([[-0.5], [0.5], [0.0]])
    assert head_importance(deltas).tolist() == pytest.approx([0.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        (torch.zeros(3), r"expected \[heads, benchmarks\].*got shape \[3\]"),
        (torch.zeros(3, 0), r"got shape \[3, 0\]"),
        (torch.tensor([[0.1], [float("nan")]]), "expected finite drops"),
        (torch.tensor([[0.1], [float("inf")]]), "expected finite drops"),
    ],
)
def test_drops_that_cannot_be_right_are_refused(deltas, message):
    with pytest.raises(ValueError, match=message):
        head_importance(deltas)


def test_standard_errors_are_those_of_resampling_one_by_one():
    random = np.random.default_rng(3)
    samples = [random.integers(0, 2, (20, 4)) - random.integers(0, 2, (20, 1)) * 0.5 for _ in range(2)]
    found = importance_standard_errors(samples, resamples=200, seed=7)
    draws = np.random.default_rng(7)
    counts = [draws.multinomial(20, [1 / 20] * 20, size=200) for _ in samples]
    weights = []
    for resample in range(200):
        columns = []
        for drops_of, count in zip(samples, counts, strict=True):
            drawn = [drops_of[i] for i in range(20) for _ in range(count[resample, i])]
            assert len(drawn) == 20
            columns.append(np.mean(drawn, axis=0))
        weights.append(csrc_ref.head_importance(torch.tensor(np.stack(columns, axis=1))).numpy())
    assert np.allclose(found, np.std(weights, axis=0, ddof=1), atol=1e-12)
    assert np.array_equal(found, importance_standard_errors(samples, resamples=200, seed=7))


def test_standard_errors_foretell_how_weights_scatter_between_draws_of_samples():
    random = np.random.default_rng(0)
    chances = np.array([0.1, 0.2, 0.4, 0.6])

    def draw():
        return (random.random((300, 4)) < chances).astype(np.float64)

    scatter = np.std(
        [head_importance(torch.tensor(draw().mean(axis=0))[:, None]).numpy() for _ in range(400)], axis=0, ddof=1
    )
    foretold = importance_standard_errors([draw()], seed=1)
    assert np.allclose(foretold[1:], scatter[1:], rtol=0.35)


def test_samples_that_all_agree_leave_no_doubt():
    assert importance_standard_errors([np.tile([0.0, 1.0, 1.0], (5, 1))]).tolist() == [0.0] * 3


def test_heads_that_differ_by_noise_alone_seldom_pass_for_more():
    random = np.random.default_rng(5)
    passed = 0
    for _ in range(400):
        scores = random.random((200, 8)) < 0.1
        errors = scores.std(axis=0, ddof=1) / np.sqrt(200)
        means, spreads = (torch.from_numpy(values[:, None]) for values in (scores.mean(axis=0), errors))
        spread, noise = spread_of_heads(means, spreads)
        passed += bool(spread > noise)
    assert passed <= 0.07 * 400


def test_the_spread_of_heads_is_that_of_the_largest_and_the_smallest_drop():
    deltas = torch.tensor([[0.3, 0.0], [0.1, 0.0], [0.2, 0.02]], dtype=torch.float64)
    errors = torch.tensor([[0.03, 0.0], [0.04, 0.0], [9.0, 0.01]], dtype=torch.float64)
    spread, noise = spread_of_heads(deltas, errors)
    assert spread.tolist() == pytest.approx([0.2, 0.02])
    # three pairs of heads share the 5 %
    assert noise.tolist() == pytest.approx([2.39398 * 0.05, 2.39398 * 0.01], rel=1e-5)
    assert spread_of_heads(deltas[:1], errors[:1])[0].tolist() == [0, 0]


@pytest.mark.parametrize(("drop", "is_noise"), [(0.019, True), (0.19, False)])
def test_a_task_whose_heads_differ_by_noise_is_named(drop, is_noise):
    """Each task is normalised by itself, so that one head gets the whole share of a task that only it disturbs."""
    random = np.random.default_rng(0)
    base = [np.ones(400), np.ones(400)]
    looks, flat = np.ones((400, 8)), np.ones((400, 8))
    looks[:200, 1] = 0
    flat[random.permutation(400)[: round(400 * drop)], 2] = 0
    flat[random.permutation(400)[:8], 0] = 0
    result = layer_result(["colours", "places"], base, [looks, flat], 0)
    assert result.weights[2] > 0.2
    tasks = tuple(task_score(name, 400, "", scores) for name, scores in zip(("colours", "places"), base, strict=True))
    calibration = Calibration("m", {}, 0, tasks, {"first": result}, {}, {}, "")
    named = [doubt for doubt in calibration.doubts() if "within their noise" in doubt]
    assert len(named) == is_noise
    if is_noise:
        assert named[0].startswith("places: the drops of its heads differ by 0.020 at most")
        assert "1/2 of the weights" in named[0]


def test_a_task_on_which_all_heads_are_equal_is_not_called_noise():
    base = [np.ones(200)]
    result = layer_result(["flat"], base, [np.ones((200, 4))], 0)
    calibration = Calibration("m", {}, 0, (task_score("flat", 200, "", base[0]),), {"first": result}, {}, {}, "")
    assert not any("noise" in doubt for doubt in calibration.doubts())
