"""Figures of two classes and a score against scikit-learn and scipy, ties included."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from scipy import stats as scipy_stats
from sklearn.calibration import calibration_curve

from fw import metrics
from fw.errors import FwError

close = partial(pytest.approx, rel=1e-12, abs=1e-12)
ZERO: Any = {"zero_division": 0}  # Any, since scikit-learn's inferred type is str


def sample(seed):
    """Labels and probabilities: many ties, none, both ends of 0 … 1, rare classes."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    y = (rng.random(n) < rng.choice([0.5, 0.05])).astype(np.int64)
    y[:2] = 0, 1  # both occur
    p = np.clip(0.4 * y + rng.normal(0.3, 0.3, n), 0, 1)
    return y, np.round(p, int(rng.integers(1, 3))) if seed % 2 else p


@pytest.mark.parametrize("seed", range(12))
def test_every_figure_is_that_of_scikit_learn_or_scipy(seed):
    y, share = sample(seed)
    x = 200 * (share - 0.5)  # from about 37 on, the probability is 1
    p = scipy.special.expit(x)
    found = metrics.binary_report(y, x)
    theirs = {
        "auc": sklearn.metrics.roc_auc_score(y, x),
        "average_precision": sklearn.metrics.average_precision_score(y, x),
        "ks": scipy_stats.ks_2samp(x[y == 1], x[y == 0])[0],
        "log_loss": sklearn.metrics.log_loss(y, p),
        "brier": sklearn.metrics.brier_score_loss(y, p),
        "precision": sklearn.metrics.precision_score(y, p > 0.5, **ZERO),
        "recall": sklearn.metrics.recall_score(y, p > 0.5, **ZERO),
        "f1": sklearn.metrics.f1_score(y, p > 0.5, **ZERO),
        "accuracy": sklearn.metrics.accuracy_score(y, p > 0.5),
    }
    assert {name: found[name] for name in theirs} == {k: close(v) for k, v in theirs.items()}

    every: Any = {"drop_intermediate": False}
    for ours, other in zip(
        metrics.roc_curve(y, x), sklearn.metrics.roc_curve(y, x, **every), strict=True
    ):
        np.testing.assert_allclose(ours, other, rtol=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("by", "strategy"), [("width", "uniform"), ("count", "quantile")])
def test_reliability_is_scikit_learns_calibration_curve(seed, by, strategy):
    y, p = sample(seed)
    curve = metrics.reliability(y, p, 7, by)
    share, mean = calibration_curve(y, p, n_bins=7, strategy=strategy)
    np.testing.assert_allclose(curve[:, :2], np.stack([mean, share], -1), rtol=1e-12)
    assert curve[:, 2].sum() == len(y)
    if by == "width":  # the definition of Guo et al., bin by bin, the right edge in the bin
        error = 0.0
        for low in range(7):
            own = (p > low / 7) & (p <= (low + 1) / 7) | ((p == 0) & (low == 0))
            error += abs(np.sum(p[own] - y[own])) / len(y)
        assert metrics.calibration_error(curve) == pytest.approx(error, abs=1e-9)


def test_scores_of_any_range_order_and_parts_merge():
    y, p = sample(4)
    scores = 100 * p - 70  # logits need not be probabilities to be ranked
    assert metrics.roc_auc(y, scores) == close(sklearn.metrics.roc_auc_score(y, p))
    pairs = np.stack([y, p], -1)
    parts = [{"pairs": metrics.Sample(part)} for part in np.array_split(pairs, 5)]
    merged = metrics.merge(*parts)["pairs"].values
    assert metrics.binary_report(*merged.T) == metrics.binary_report(y, p)


def test_what_cannot_be_scored_is_refused_or_said_to_be_no_number():
    one = np.ones(3)
    assert np.isnan(metrics.roc_auc(one, one)) and np.isnan(metrics.ks_statistic(one, one))
    assert metrics.average_precision(one, one) == 1
    assert np.isnan(metrics.average_precision(0 * one, one))
    for labels, scores, message in (
        (one, np.ones(2), "one vector each"),
        (np.array([]), np.array([]), "not empty"),
        (one * -1, one, "0 and 1 alone"),
        (one, one, "all 3 rows are '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.binary_report(labels, scores)
    with pytest.raises(FwError, match=r"2 of 3 are NaN or infinite, .* lower --learning-rate"):
        metrics.binary_report(np.array([0, 1, 1]), np.array([np.nan, np.inf, 0]))
    with pytest.raises(ValueError, match="expected 0 … 1"):
        metrics.log_loss(one, one * 2)
    with pytest.raises(ValueError, match="width or count"):
        metrics.reliability(one, one, by="rows")
