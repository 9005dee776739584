"""Comparison of methods: ranks and tests against scipy and hand-made tables."""

import math
from dataclasses import asdict

import jsonschema
import numpy as np
import pytest
from scipy import stats

from making import networks as tiny
from medseg.cli.schema import schema_of
from medseg.errors import BadConfig, BadFile
from medseg.evaluation.comparison import compare, holm
from medseg.evaluation.ranking import ranking_figure, write_ranking

CASES = [f"case_{n}" for n in range(12)]


def save(path, values, column="dice", structure="liver", cases=CASES):
    path.parent.mkdir(exist_ok=True)
    lines = [f"{case},{structure},ok,{value}" for case, value in zip(cases, values)]
    path.write_text(f"case,structure,status,{column}\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def three(tmp_path):
    random = np.random.default_rng(1)
    base = random.uniform(0.6, 0.8, len(CASES))
    values = {
        "good": base + 0.1,
        "poor": base - 0.1,
        "noisy": base + random.normal(0, 0.05, len(CASES)),
    }
    return values, [save(tmp_path / name / "scores.csv", column) for name, column in values.items()]


def test_ranking_tests_and_stability(three):
    values, paths = three
    result = compare(paths)
    assert [row["method"] for row in result.methods] == ["good", "noisy", "poor"]
    assert [row["rank"] for row in result.methods] == [1, 2, 3] and result.n_cases == 12
    assert result.methods[0]["mean"] == pytest.approx(values["good"].mean())
    tests = {(row["first"], row["second"]): row for row in result.tests}
    expected = stats.wilcoxon(values["good"], values["noisy"]).pvalue
    assert tests["good", "noisy"]["p"] == pytest.approx(expected)
    assert [row["p_holm"] for row in result.tests] == pytest.approx(
        holm([row["p"] for row in result.tests])
    )
    assert result.methods[0]["share_first"] > 0.95 and 0.9 < result.kendall_tau["mean"] <= 1
    assert compare(paths) == result
    assert compare(paths[::-1]).methods == result.methods


def test_holm_of_known_values():
    # Holm 1979: the smallest of 4 is multiplied by 4, the next by 3, and none gets smaller than one
    # before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]


def test_less_is_better_for_distances_and_infinite_ones_rank_last(tmp_path):
    near, far = np.linspace(1, 2, 12), np.linspace(2, 3, 12)
    near[3] = np.inf
    paths = [
        save(tmp_path / f"{name}.csv", column, "hausdorff95_mm")
        for name, column in (("near", near), ("far", far))
    ]
    result = compare(paths, "hausdorff95_mm")
    assert [row["method"] for row in result.methods] == ["near", "far"]
    assert [row["n_inf"] for row in result.methods] == [1, 0]
    assert result.methods[0]["mean_rank"] == pytest.approx((11 + 2) / 12)
    assert result.methods[0]["mean"] == pytest.approx(near[np.isfinite(near)].mean())
    assert 0 < result.tests[0]["p"] < 0.05


def test_signed_differences_count_by_their_size(tmp_path):
    small, large = np.full(12, -1.0), np.full(12, -5.0)
    paths = [
        save(tmp_path / f"{n}.csv", column, "volume_difference_mm3")
        for n, column in (("s", small), ("l", large))
    ]
    assert compare(paths, "volume_difference_mm3").methods[0]["method"] == "s"


def save_structures(path, values, column):
    """A table in which every case has the same values of structures."""
    lines = [f"{case},{name},ok,{value}" for case in CASES for name, value in values.items()]
    path.write_text(f"case,structure,status,{column}\n" + "\n".join(lines) + "\n")
    return path


def test_too_much_of_one_structure_does_not_make_up_for_too_little_of_another(tmp_path):
    column = "volume_difference_mm3"
    far = save_structures(tmp_path / "far.csv", {"liver": 1000, "spleen": -1000}, column)
    near = save_structures(tmp_path / "near.csv", {"liver": 10, "spleen": 10}, column)
    result = compare([far, near], column)
    assert [row["method"] for row in result.methods] == ["near", "far"]
    assert [row["mean"] for row in result.methods] == [10, 0]  # a bias has a sign
    assert result.tests[0]["difference"] == 990


def test_scores_that_are_equal_but_for_rounding_are_ties(tmp_path):
    some = {"a": 0.1, "b": 0.2, "c": 0.3}
    paths = [save_structures(tmp_path / "one.csv", some, "dice")]
    paths.append(save_structures(tmp_path / "two.csv", dict(zip("abc", (0.3, 0.2, 0.1))), "dice"))
    result = compare(paths)
    assert result.tests[0]["p"] == 1 and [row["rank"] for row in result.methods] == [1, 1]
    # Differences of 0.1 in binary: 0.3 - 0.2 is not 0.2 - 0.1.
    first, second = [0.3, 0.2, 0.4, 0.5, 0.6, 0.9], [0.2, 0.1, 0.3, 0.4, 0.5, 1.0]
    paths = [
        save(tmp_path / f"{n}.csv", one, cases=CASES[:6]) for n, one in zip("xy", (first, second))
    ]
    assert compare(paths).tests[0]["p"] == pytest.approx(14 / 64)  # of all 64 choices of signs


def test_an_infinite_difference_is_no_number(tmp_path):
    lacking, there = np.full(12, np.inf), np.full(12, 3.0)
    lacking[:3] = 1
    paths = [
        save(tmp_path / f"{name}.csv", column, "hausdorff95_mm")
        for name, column in (("lacking", lacking), ("there", there))
    ]
    result = compare(paths, "hausdorff95_mm", bootstrap=0)
    assert result.tests[0]["difference"] is None and result.tests[0]["p"] < 0.05
    jsonschema.validate(asdict(result), schema_of("comparison"))


def test_missing_cases_are_named_and_undefined_ones_counted(tmp_path):
    one = save(tmp_path / "one.csv", [0.5, float("nan"), 0.7, 0.8], cases=CASES[:4])
    two = save(tmp_path / "two.csv", [0.4, 0.5, 0.6], cases=CASES[:3])
    result = compare([one, two])
    assert result.n_cases == 2 and result.n_excluded == 1
    assert result.problems == ["two has no score of case_3, which one has; not compared"]


def test_structures_that_a_method_lacks_are_named(tmp_path):
    both = save_structures(tmp_path / "both.csv", {"liver": 0.5, "spleen": 0.6}, "dice")
    one = save_structures(tmp_path / "one.csv", {"liver": 0.7}, "dice")
    assert compare([both, one]).problems == [
        "one has no score of spleen in 12 cases, which both has; not compared"
    ]


def test_infinities_of_both_signs_have_no_mean(tmp_path):
    paths = [
        save_structures(tmp_path / f"{name}.csv", {"a": math.inf, "b": sign * math.inf}, "gain")
        for name, sign in (("one", 1), ("two", -1))
    ]
    with pytest.raises(BadConfig, match="gain of case_0 is infinite in both directions"):
        compare(paths, "gain")
    assert [one["method"] for one in compare(paths, "gain", "b").methods] == ["one", "two"]


def test_equal_methods_do_not_differ(tmp_path):
    paths = [save(tmp_path / f"{name}.csv", [0.5, 0.6, 0.7]) for name in "ab"]
    result = compare(paths)
    assert result.tests[0]["p"] == result.tests[0]["p_holm"] == 1
    assert [row["rank"] for row in result.methods] == [1, 1]


def test_what_cannot_be_compared_says_why(three, tmp_path):
    _, paths = three
    with pytest.raises(BadConfig, match="two methods or more"):
        compare(paths[:1])
    with pytest.raises(BadConfig, match="given twice"):
        compare([paths[0], paths[0]])
    with pytest.raises(BadConfig, match="no score 'iou'"):
        compare(paths, "iou")
    with pytest.raises(BadConfig, match="no structure 'brain'"):
        compare(paths, structure="brain")
    with pytest.raises(BadConfig, match="fewer than two cases"):
        compare([paths[0], save(tmp_path / "x.csv", [0.5], cases=["other"])])
    bad = tmp_path / "bad.csv"
    for text, words in (
        ("name,value\na,1\n", "not a table of scores"),
        ("case,structure,dice\na,b,good\n", "no number"),
        ("case,structure,dice\n", "no scores"),
    ):
        bad.write_text(text)
        with pytest.raises(BadFile, match=words):
            compare([paths[0], bad])


def test_the_picture_shows_ranks_and_their_intervals_best_above(three):
    result = compare(three[1])
    (axes,) = ranking_figure(result).axes
    lines = [line.get_xydata() for line in axes.lines]
    for place, row in enumerate(result.methods):
        interval, dot = lines[2 * place : 2 * place + 2]
        assert interval[:, 0].tolist() == row["rank_ci95"]
        assert dot.tolist() == [[row["rank"], place]] and (interval[:, 1] == place).all()
    texts = [text.get_text() for text in axes.texts]
    assert texts[::2] == ["good", "noisy", "poor"]
    assert texts[1].startswith(f"mean {result.methods[0]['mean']:.4g}, first in ")
    low, high = axes.get_ylim()
    assert low > high  # the best is above
    assert axes.get_title(loc="left") == "Dice, 12 cases"


def test_a_picture_comes_of_a_comparison_without_resampling_and_of_odd_names(tmp_path):
    names = ("方法", "$\\frac{", "a name that is much too long for a picture of methods to hold")
    paths = [save(tmp_path / f"{name}.csv", np.linspace(0.5, 0.9, 12)) for name in names]
    result = compare(paths, bootstrap=0)
    write_ranking(tmp_path / "one.png", result)
    write_ranking(tmp_path / "two.png", result)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    figure = ranking_figure(result)
    assert "method 1" in [text.get_text() for text in figure.axes[0].texts]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_command_draws_the_ranking(three, tmp_path):
    ran = tiny.medseg("compare", *three[1], "--png", tmp_path / "ranking.png")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Dice: 12 cases")
    assert (tmp_path / "ranking.png").read_bytes()[:4] == b"\x89PNG"
    ran = tiny.medseg("compare", *three[1], "--png", tmp_path / "ranking.pdf")
    assert ran.code != 0 and "give a name that ends in .png" in ran.err
    assert not (tmp_path / "ranking.pdf").exists()
