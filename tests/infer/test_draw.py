"""What is drawn follows the distribution that the settings name, worked out here once more in plain fp64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tunesmith.core.errors import RecipeError
from tunesmith.core.ports import SampleSettings
from tunesmith.infer.draw import Asked, check_settings, draw
from tunesmith.model import native

SIZES = (50, 3001)
DRAWS, ROWS = 20480, 512
PROMPT = frozenset(range(0, 20))
SAID = Counter({3: 1, 17: 2, 30: 4, 49: 1})
MAIN = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.7},
    "frequency": {"frequency_penalty": 0.9},
    "presence": {"presence_penalty": 1.4},
    "bias": {"logit_bias": {1: 3.0, 20: -2.0, 49: 5.0, 4: float("-inf")}},
    "all": {
        "temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "frequency_penalty": 0.4,
        "presence_penalty": 0.3, "logit_bias": {1: 1.0, 30: 2.5, 7: -1.0},
    },
}  # fmt: skip
MORE = {
    "hot": {"temperature": 1.8},
    "top_k beyond the first candidates": {"top_k": 100},
    "top_k beyond the vocabulary": {"top_k": 5000, "min_p": 0.001},
    "top_p beyond the first candidates": {"top_p": 0.9},
    "top_p of nearly everything": {"top_p": 0.99999, "temperature": 3.0},
    "min_p beyond the first candidates": {"min_p": 0.003},
    "repetition wanted": {"repetition_penalty": 0.8},
    "presence wanted": {"presence_penalty": -1.5, "frequency_penalty": -0.4},
}
SETTINGS = MAIN | MORE


@pytest.fixture(autouse=True, params=[True, False], ids=["compiled", "operations"])
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    with native.switched(request.param):
        yield


def logits_of(size: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def distribution(logits: np.ndarray, settings: SampleSettings, prompt: frozenset[int], said: Counter[int]) -> np.ndarray:
    """The probabilities, one rule after the other, token by token."""
    x = logits.astype(np.float64).copy()
    for token, bias in settings.logit_bias.items():
        x[token] += bias
    for token in prompt | set(said):
        x[token] = x[token] / settings.repetition_penalty if x[token] > 0 else x[token] * settings.repetition_penalty
    for token, count in said.items():
        x[token] -= settings.frequency_penalty * count + settings.presence_penalty
    x /= settings.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda token: (-x[token], token))
    if settings.top_k:
        for token in order[settings.top_k :]:
            p[token] = 0
        p /= p.sum()
    if settings.top_p < 1:
        mass = 0.0
        for token in order:
            if mass >= settings.top_p:
                p[token] = 0
            mass += p[token]
        p /= p.sum()
    p[p < settings.min_p * p.max()] = 0
    return p / p.sum()


def chance_of(counts: np.ndarray, p: np.ndarray) -> float:
    """The p-value of Pearson's test; cells in which fewer than 8 are expected are put together."""
    expected = p * counts.sum()
    small = expected < 8
    seen, wanted = [*counts[~small], counts[small].sum()], [*expected[~small], expected[small].sum()]
    if wanted[-1] < 8:
        rest, mass = seen.pop(), wanted.pop()
        seen[-1] += rest
        wanted[-1] += mass
    a, b = np.array(seen, float), np.array(wanted, float)
    statistic = float(((a - b) ** 2 / b).sum())
    return float(torch.special.gammaincc(torch.tensor((len(a) - 1) / 2, dtype=torch.float64), torch.tensor(statistic / 2)))


def frequencies(logits: np.ndarray, asked: Asked, seed: int) -> np.ndarray:
    counts = np.zeros(len(logits), np.int64)
    rng = np.random.default_rng(seed)
    batch = torch.from_numpy(logits).expand(ROWS, -1)
    for _ in range(DRAWS // ROWS):
        counts += np.bincount(draw(batch, [asked] * ROWS, rng.random(ROWS).tolist()).tokens, minlength=len(logits))
    return counts


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 50) for name in MAIN), *((name, 3001) for name in ("plain", "cold", "top_k", "top_p", "min_p", "all"))]
)
def test_frequencies_follow_the_settings(name: str, size: int) -> None:
    settings = SampleSettings(**MAIN[name])
    logits = logits_of(size, seed=size)
    logits[:50] += 5  # so that the tokens that the settings speak about are drawn
    p = distribution(logits, settings, PROMPT, SAID)
    before = logits.copy()
    counts = frequencies(logits, Asked(settings, PROMPT, SAID.copy()), seed=1)
    assert counts.sum() == DRAWS
    assert not counts[p == 0].any(), "what is cut off is never drawn"
    assert chance_of(counts, p) > 1e-4
    np.testing.assert_array_equal(logits, before)
    if name != "plain":  # the test itself can tell: another distribution does not pass
        assert chance_of(counts, distribution(logits, SampleSettings(), PROMPT, SAID)) < 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_the_whole_line_is_inverted_in_vocabulary_order(name: str) -> None:
    """On an even grid of numbers every token gets its share, up to one grid point at each border, in ascending order."""
    settings = SampleSettings(**SETTINGS[name])
    logits = logits_of(3001, seed=4)
    p = distribution(logits, settings, PROMPT, SAID)
    grid = (np.arange(1000) + 0.5) / 1000
    tokens = draw(torch.from_numpy(logits).expand(1000, -1), [Asked(settings, PROMPT, SAID.copy())] * 1000, grid.tolist()).tokens
    edges = np.concatenate([[0], p.cumsum()])
    assert bool((edges[tokens] <= grid + 1e-5).all())
    assert bool((edges[np.array(tokens) + 1] >= grid - 1e-5).all())
    assert bool((p[tokens] > 0).all())


@pytest.mark.parametrize("size", [*SIZES, 64, 256, 1, 2])
@pytest.mark.parametrize("narrow", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}])
def test_numbers_at_both_ends_of_the_line(size: int, narrow: dict[str, float]) -> None:
    logits = logits_of(size, seed=1)
    p = distribution(logits, SampleSettings(**narrow), frozenset(), Counter())
    last = float(np.nextafter(1, 0))
    tokens = draw(torch.from_numpy(logits).expand(3, -1), [Asked(SampleSettings(**narrow))] * 3, [0.0, last, 1.0]).tokens
    kept = np.flatnonzero(p > 0)
    assert tokens == [kept[0], kept[-1], kept[-1]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"top_k": 40}, {"top_p": 0.99}, {"min_p": 0.001}, {"temperature": 0.0}])
def test_what_has_no_weight_is_never_drawn(settings: dict[str, float]) -> None:
    logits = logits_of(300)
    logits[::2] = -np.inf
    logits[0:64] = -np.inf  # a whole block
    logits[250:] = -np.inf
    grid = [0.0, *np.linspace(0, 1, 2000).tolist(), float(np.nextafter(1, 0)), 1.0]
    drawn = draw(torch.from_numpy(logits).expand(len(grid), -1), [Asked(SampleSettings(**settings))] * len(grid), grid)
    assert np.isfinite(logits[drawn.tokens]).all()
    assert np.isfinite(drawn.logprobs).all()


def test_a_lone_token_is_always_drawn() -> None:
    logits = torch.full((4, 500), float("-inf"))
    logits[:, 321] = 3.0
    for settings in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}, {"top_k": 100, "temperature": 0.1}):
        drawn = draw(logits, [Asked(SampleSettings(**settings))] * 4, [0.0, 0.3, 0.999999, 1.0])
        assert drawn.tokens == [321] * 4
        assert drawn.logprobs == [0.0] * 4


@pytest.mark.parametrize("size", SIZES)
def test_of_equal_logits_the_first_stay_at_the_border_of_top_k(size: int) -> None:
    logits = np.full(size, -1.0, np.float32)
    logits[[10, 30]] = 2.0
    grid = np.linspace(0, 1, 300).tolist()
    for count in (1, 2, 3, 5, 20):
        tokens = draw(torch.from_numpy(logits).expand(300, -1), [Asked(SampleSettings(top_k=count))] * 300, grid).tokens
        rest = [token for token in range(size) if token not in (10, 30)]
        assert sorted(set(tokens)) == sorted([10, 30][:count] + rest[: max(0, count - 2)]), "so many, and the first of them"


def test_top_p_that_the_first_token_reaches_alone() -> None:
    logits = torch.tensor([0.1, 0.6, 0.2, 0.1]).log()
    grid = np.linspace(0, 1, 101).tolist()
    for top_p, want in ((0.001, {1}), (0.6 - 1e-6, {1}), (0.6 + 1e-6, {1, 2}), (0.81, {0, 1, 2})):
        tokens = draw(logits.expand(101, -1), [Asked(SampleSettings(top_p=top_p))] * 101, grid).tokens
        assert set(tokens) == want, top_p


@pytest.mark.parametrize("size", [*SIZES, 9000])
def test_rows_with_different_settings_are_what_each_is_alone(size: int) -> None:
    rng = np.random.default_rng(5)
    rows = [
        Asked(SampleSettings(top_logprobs=number % 3, **one), PROMPT, SAID.copy())
        for number, one in enumerate([*SETTINGS.values(), {"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 3.0}] * 2)
    ]
    logits = torch.from_numpy(np.stack([logits_of(size, seed=n, spread=3.0) for n in range(len(rows))]))
    numbers = rng.random(len(rows)).tolist()
    together = draw(logits, rows, numbers)
    for order in (range(len(rows)), rng.permutation(len(rows)).tolist()):
        for place in order:
            alone = draw(logits[place : place + 1].clone(), [rows[place]], [numbers[place]])
            assert alone.tokens[0] == together.tokens[place]
            assert alone.logprobs[0] == together.logprobs[place]
            assert alone.tops[0] == together.tops[place]
    order = rng.permutation(len(rows)).tolist()
    turned = draw(logits[order], [rows[i] for i in order], [numbers[i] for i in order])
    assert turned.tokens == [together.tokens[i] for i in order]
    assert turned.logprobs == [together.logprobs[i] for i in order]


@pytest.mark.parametrize("size", SIZES)
def test_log_probs_are_the_models_own_and_tops_are_the_likeliest(size: int) -> None:
    logits = logits_of(size, seed=3)
    logp = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    rows = [Asked(SampleSettings(top_logprobs=k, **SETTINGS["all"]), PROMPT, SAID.copy()) for k in (0, 1, 7, 1024)]
    drawn = draw(torch.from_numpy(logits).expand(4, -1), rows, [0.1, 0.5, 0.7, 0.99])
    assert drawn.logprobs == pytest.approx(logp[drawn.tokens].tolist(), abs=1e-6)
    for row, tops in zip(rows, drawn.tops, strict=True):
        count = min(row.settings.top_logprobs, size)
        best = np.argsort(-logp)[:count]
        assert [token for token, _ in tops] == best.tolist()
        assert [value for _, value in tops] == pytest.approx(logp[best].tolist(), abs=1e-6)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [5, 300, 512])
def test_logits_that_are_not_finite_show_in_the_log_probability(odd: float, size: int) -> None:
    for place in (0, size // 2, size - 1):
        logits = torch.from_numpy(logits_of(size))[None].repeat(3, 1)
        logits[1, place] = odd
        for settings in ({"temperature": 0.0}, {}, {"temperature": 0.3}):
            drawn = draw(logits, [Asked(SampleSettings(**settings))] * 3, [0.4, 0.5, 1.0])
            assert np.isfinite(drawn.logprobs).tolist() == [True, False, True]
            assert 0 <= drawn.tokens[1] < size
    nothing = torch.full((1, size), float("-inf"))
    assert not np.isfinite(draw(nothing, [Asked(SampleSettings())], [0.5]).logprobs[0])


def test_greedy_takes_the_first_of_the_largest() -> None:
    for size in (*SIZES, 256, 512):
        logits = np.zeros(size, np.float32)
        logits[[size - 1, size // 2, size // 2 + 1]] = 1.0
        assert draw(torch.from_numpy(logits)[None], [Asked(SampleSettings(temperature=0.0))], [0.9]).tokens == [size // 2]


def test_a_wide_vocabulary_is_summed_without_drift() -> None:
    """200,000 equal tokens: every hundredth of the line holds a hundredth of them."""
    size = 200_003
    grid = (np.arange(100) + 0.5) / 100
    for settings in ({}, {"temperature": 0.9}):
        tokens = draw(torch.zeros(1, size).expand(100, -1), [Asked(SampleSettings(**settings))] * 100, grid.tolist()).tokens
        assert tokens == [int(number * size) for number in grid]


def test_settings_are_checked_with_and_without_a_vocabulary() -> None:
    check_settings(SampleSettings(logit_bias={5: 1.0}, top_logprobs=1024, top_p=1e-9, min_p=1.0, temperature=100.0))
    for bias in ({-1: 1.0}, {5: float("nan")}):
        with pytest.raises(RecipeError):
            check_settings(SampleSettings(logit_bias=bias))
    with pytest.raises(RecipeError, match="vocabulary of 5"):
        check_settings(SampleSettings(logit_bias={5: 1.0}), 5)
