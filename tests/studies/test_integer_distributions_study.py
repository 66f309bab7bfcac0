import gzip

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError
from polyreward.studies.base import StudyConfig
from polyreward.studies.integer_distributions import (
    CATEGORICAL,
    FLOW_LIMIT,
    MIXED,
    SQUARED,
    STUDY,
    Table,
    bicycles,
    counts,
    diabetes,
    digits,
    fit,
    flows,
    mixed,
    run_seed,
    split,
)


def test_tables_of_sklearn():
    pixel, disease = digits(), diabetes()
    assert pixel.features.shape == (1797, 63)
    assert (pixel.targets.min(), pixel.targets.max()) == (0, 16)
    assert disease.features.shape == (442, 10)
    assert (disease.targets.min(), disease.targets.max()) == (25, 346)
    assert disease.dispersion == pytest.approx(5929.9 / 152.13, rel=0.01)
    assert CATEGORICAL in pixel.arms()
    assert CATEGORICAL not in disease.arms()


def test_flows_are_signed_heavy_and_below_the_limit():
    table = flows(np.random.default_rng(0), 4000)
    size = np.abs(table.targets)
    assert table.targets.dtype == np.int64
    assert size.max() < FLOW_LIMIT
    assert (size == FLOW_LIMIT - 1).sum() == 0
    assert size.max() > 1000 * np.median(size)
    assert np.mean(table.targets[table.features[:, 1] > 1] > 0) > 0.85
    assert table.dispersion == 0
    assert "poisson" not in table.arms()


def test_counts_are_over_dispersed():
    table = counts(np.random.default_rng(0))
    assert table.targets.min() >= 0
    assert table.dispersion > 10


def test_bicycles_leave_out_the_parts_of_the_target(tmp_path):
    (tmp_path / "tabular").mkdir()
    text = "season,hr,casual,registered,cnt\n1,0,3,13,16\n1,1,8,32,40\n"
    (tmp_path / "tabular" / "bike.csv.gz").write_bytes(gzip.compress(text.encode()))
    table = bicycles(tmp_path)
    assert table.features.tolist() == [[1, 0], [1, 1]]
    assert table.targets.tolist() == [16, 40]
    with pytest.raises(InvalidInputError, match=r"needs .*bike\.csv\.gz"):
        bicycles(tmp_path / "elsewhere")


def test_split_parts_are_disjoint_and_scaled_by_the_first():
    table = Table("line", np.arange(100.0)[:, None], np.arange(100))
    parts = split(table, 3)
    assert [len(n) for n in parts.n] == [60, 20, 20]
    assert sorted(torch.cat(parts.n).tolist()) == list(range(100))
    assert parts.x[0].mean().item() == pytest.approx(0, abs=1e-6)
    assert parts.x[0].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (parts.stats.low, parts.stats.high) == (0, 99)


def test_training_lowers_the_bits_and_repeats():
    x = np.random.default_rng(0).normal(size=(400, 3))
    table = Table("planted", x, np.round(20 + 5 * x[:, 0]).astype(np.int64))
    parts = split(table, 0)
    before, after = (fit(parts, "dlaplace", 1, 3e-3, 0, steps) for steps in (0, 150))
    assert after["bits"] < before["bits"] - 1
    assert after["rmse"] < 0.5 * before["rmse"]
    assert after == fit(parts, "dlaplace", 1, 3e-3, 0, 150)
    assert fit(parts, SQUARED, 1, 3e-3, 0, 150)["rmse"] < 0.5 * before["rmse"]


def test_a_divergence_is_counted_and_measured_at_the_last_good_step():
    table = Table("planted", np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 7)
    found = fit(split(table, 0), "dnormal", 1, 1e30, 0, 60)
    assert found["diverged"] == 1
    assert np.isfinite(found["bits"])


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    assert "counts: poisson" in figures
    judged = STUDY.judge([figures])
    assert judged.verdict in ("supported", "not supported", "inconclusive")
    assert all(np.isfinite(x) for x in (judged.effect, *judged.interval))


def _run(**changed):
    """Figures that meet the rule; `changed` replaces bits (or, with a trailing underscore, RMSE) of an arm."""
    single = {"dalap": 6.0, "dlaplace": 6.1, "dnormal": 6.2, "danorm": 6.3, "bitwise": 6.6}
    run = {}
    for table in ("pixel", "diabetes", "bicycles", "flows"):
        run[table] = {"dispersion": {"diabetes": 39.0, "bicycles": 174.0}.get(table, 0.0)}
        coded = dict(single) | {mixed(family): 5.5 for family in MIXED}
        if table != "flows":
            coded |= {"poisson": 11.0, "dweib": 6.5}
        coded[mixed("bitwise")] = 5.0
        if table == "flows":
            coded["dnormal"] = 12.0
        errors = dict.fromkeys(coded, 10.0) | {"bitwise": 20.0, SQUARED: 9.0}
        for name, value in changed.items():
            where, _, name = name.partition("_of_")
            if where == table:
                (errors if name.endswith("_") else coded)[name.rstrip("_")] = value
        for name, error in errors.items():
            run[f"{table}: {name}"] = {"rmse": error, "diverged": 0.0} | (
                {"bits": coded[name]} if name in coded else {}
            )
    run["pixel: categorical"] = {"rmse": 1.0, "diverged": 1.0, "bits": 0.5}
    return run


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"bicycles_of_dnormal": 5.9, "bicycles_of_dlaplace": 5.8}, "inconclusive"),
        ({"bicycles_of_dnormal": 5.9}, "not supported"),
        ({"bicycles_of_poisson": 5.9}, "not supported"),
        ({"flows_of_dnormal": 10.0}, "inconclusive"),
        ({"flows_of_dnormal": 5.0}, "not supported"),
        ({"diabetes_of_poisson": 8.0}, "inconclusive"),
        ({"diabetes_of_squared error_": 11.0}, "inconclusive"),
        ({"bicycles_of_poisson_": 30.0}, "inconclusive"),
        ({"pixel_of_bitwise x 8": 5.3}, "inconclusive"),
        ({"flows_of_dweib": 4.0}, "supported"),
    ],
)
def test_rule(changed, verdict):
    judged = STUDY.judge([_run(**changed), _run(**changed)])
    assert judged.verdict == verdict
    if not changed:
        assert judged.effect == pytest.approx(6.0)


def test_the_summary_names_what_diverged():
    assert "rates: pixel: categorical 2." in STUDY.judge([_run(), _run()]).summary
    assert "rates: none." in STUDY.judge([{k: v for k, v in _run().items() if "categ" not in k}]).summary
