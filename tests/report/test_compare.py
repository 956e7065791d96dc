"""Evaluations side by side: the intervals of differences, what is not compared and why, and what is written."""

import csv
import json
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcrystal import cli
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import wilson
from jaxcrystal.report.compare import as_markdown, as_text, compare
from jaxcrystal.report.comparison import Difference, difference
from jaxcrystal.report.quantities import Measured, Quantity

RATE, LENGTH = Quantity("validity.both", "Valid"), Quantity("x", "Length", unit="Å")


def rate(successes, trials):
    return Measured(RATE, successes / trials, wilson(successes, trials))


# Newcombe, Stat. Med. 17, 873 (1998), table II, method 10; then statsmodels 0.15, confint_proportions_2indep "newcomb".
@pytest.mark.parametrize(
    ("second", "first", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
        ((302, 1000), (250, 900), -0.016696989681442530, 0.064843881729243770),
        ((9998, 10000), (9990, 10000), 0.00010112641121082678, 0.0016523939276465041),
    ],
)
def test_a_difference_of_rates_has_newcombes_interval(second, first, low, high):
    found = difference(rate(*first), rate(*second))
    tolerance = 5.1e-5 if second[1] < 100 else 1e-12  # Newcombe prints four decimals
    assert found.value == pytest.approx(second[0] / second[1] - first[0] / first[1])
    assert found.interval == pytest.approx((low, high), abs=tolerance)


def test_independent_errors_add_in_squares():
    found = difference(Measured(LENGTH, 10.0, (7.0, 13.0)), Measured(LENGTH, 12.0, (8.0, 16.0)))
    assert found == Difference(2.0, interval=(-3.0, 7.0))  # √(3² + 4²) = 5
    uneven = difference(Measured(LENGTH, 0.0, (-1.0, 3.0)), Measured(LENGTH, 0.0, (-4.0, 2.0)))
    assert uneven.interval == pytest.approx((-5.0, 5**0.5))  # down: 4 and 3; up: 2 and 1


def test_nothing_is_made_up_where_an_interval_is_missing():
    found = difference(Measured(LENGTH, 1.0, None), Measured(LENGTH, 3.0, (2.0, 4.0)))
    assert found == Difference(2.0, interval=None) and not found.beyond_chance


counted = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counted, counted)
def test_to_swap_two_runs_is_to_negate_their_difference(one, other):
    there, back = difference(rate(*one), rate(*other)), difference(rate(*other), rate(*one))
    assert there.value == -back.value
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert there.interval[0] <= there.value <= there.interval[1] and -1 <= there.interval[0] + 1e-12
    assert there.beyond_chance == back.beyond_chance


def metrics(valid=0.5, **versions):
    """As an evaluation of everything would find them."""
    numbers = {
        "validity": {"both": valid},
        "uniqueness": {"rate": valid},
        "novelty": {"by_matching": valid},
        "coverage": {"recall": valid, "amsd_recall": 0.25, "cutoffs": "mp_20"},
        "distribution": {"density_wasserstein": 0.5},
        "prediction": {"match_rate": valid},
        "stability": {
            "potential": "P",
            "metastable_rate": valid,
            "relaxation_rmsd": {"median": 0.125},
            "e_above_hull": {"median": 0.0625, "p10": 0.01},
        },
        "sun": {"rate": valid},
        "unheard_of": {"figure": 2.0},
    }
    rates = ["validity.both", "uniqueness.rate", "novelty.by_matching", "coverage.recall", "prediction.match_rate"]
    rates += ["stability.metastable_rate", "sun.rate"]
    files = {name: f"{name}.parquet sha256:{name}" for name in ("train", "reference", "truth", "potential", "hull")}
    return {
        "protocol": "cdvae",
        "counts": {"attempts": 1000},
        **numbers,
        "confidence_95": {
            **{name: [valid - 0.03, valid + 0.03] for name in rates},
            "coverage.amsd_recall": [0.2, 0.3],
            "stability.relaxation_rmsd.median": [0.1, 0.2],
            "stability.e_above_hull.median": [0.05, 0.07],
        },
        "versions": {**files, "relaxation": "until forces are below 0.1 eV/Å", "smact": "4.0.2", **versions},
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def pair(tmp_path):
    def compared(second, first=None, **options):
        write(tmp_path / "one" / "metrics.json", first or metrics())
        write(tmp_path / "two" / "metrics.json", second)
        return compare([tmp_path / "one", tmp_path / "two"], **options)

    return compared


def withheld(comparison):
    """Names of what was not compared, by the reason."""
    return {
        line.quantity.name: change.because
        for line in comparison.lines
        for change in line.differences
        if change is not None and change.value is None
    }


ALL = {
    "validity.both",
    "uniqueness.rate",
    "novelty.by_matching",
    "coverage.recall",
    "coverage.amsd_recall",
    "distribution.density_wasserstein",
    "prediction.match_rate",
    "stability.metastable_rate",
    "stability.relaxation_rmsd.median",
    "stability.e_above_hull.median",
    "stability.e_above_hull.p10",
    "sun.rate",
    "unheard_of.figure",
}
REFERENCE = {"coverage.recall", "coverage.amsd_recall", "distribution.density_wasserstein"}
STABILITY = {name for name in ALL if name.startswith(("stability", "sun"))}


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ("protocol", ALL),
        ("train", {"novelty.by_matching", "sun.rate"}),
        ("reference", REFERENCE),
        ("truth", {"prediction.match_rate"}),
        ("potential", STABILITY),
        ("relaxation", STABILITY),
        ("hull", STABILITY - {"stability.relaxation_rmsd.median"}),
    ],
)
def test_what_means_something_else_is_not_compared(pair, base, names):
    other = metrics(**({} if base == "protocol" else {base: "x sha256:another"}))
    if base == "protocol":
        other["protocol"] = "strict"
    comparison = pair(other)
    # A number that nobody knows here may depend on anything.
    assert withheld(comparison) == dict.fromkeys(names | {"unheard_of.figure"}, f"other {base}")
    assert f"not compared: other {base}" in as_text(comparison)
    assert any(remark.startswith(f"Other {base}: one has ") for remark in comparison.remarks)


def test_a_number_of_relaxed_crystals_depends_on_how_they_were_relaxed(pair):
    """Where the same number `…_as_sampled` stands beside it; that one depends on no potential."""
    both = metrics()
    both["uniqueness"]["rate_as_sampled"] = 0.75
    both["confidence_95"]["uniqueness.rate_as_sampled"] = [0.7, 0.8]
    both["uniqueness"]["rate_of_valid"] = 0.8
    other = json.loads(json.dumps(both))
    other["versions"]["relaxation"] = "until forces are below 0.05 eV/Å"
    found = withheld(pair(other, first=both))
    assert found["uniqueness.rate"] == "other relaxation" and "uniqueness.rate_as_sampled" not in found
    assert found["uniqueness.rate_of_valid"] == "other relaxation" and "novelty.by_matching" not in found
    (line,) = [line for line in pair(other, first=both).lines if line.quantity.name == "uniqueness.rate_as_sampled"]
    assert line.quantity.title == "Unique, as sampled" and line.quantity.is_rate and not line.quantity.headline


def test_other_cutoffs_are_for_rates_of_coverage_only(pair):
    other = metrics()
    other["coverage"]["cutoffs"] = "perov_5"
    assert set(withheld(pair(other))) == {"coverage.recall", "unheard_of.figure"}
    del other["coverage"]["cutoffs"]  # nobody knows what they were
    assert set(withheld(pair(other))) == {"coverage.recall", "unheard_of.figure"}


def test_what_means_the_same_is_compared(pair):
    comparison = pair(metrics(0.625, train="renamed.parquet sha256:train", smact="5.0"))
    assert not withheld(comparison)
    (valid,) = [line for line in comparison.lines if line.quantity.name == "validity.both"]
    assert valid.differences[0].value == 0.125 and valid.differences[0].beyond_chance
    assert {line.quantity.name for line in comparison.lines} == ALL
    assert comparison.remarks == ("one and two were evaluated with smact 4.0.2 and 5.0.",)


def test_a_number_that_one_run_lacks_has_no_difference(pair):
    other = metrics()
    del other["sun"], other["distribution"]
    comparison = pair(other, first={k: v for k, v in metrics().items() if k != "novelty"})
    lacking = {line.quantity.name: line for line in comparison.lines if line.differences == (None,)}
    assert set(lacking) == {"sun.rate", "distribution.density_wasserstein", "novelty.by_matching"}
    assert lacking["sun.rate"].numbers[1] is None and lacking["novelty.by_matching"].numbers[0] is None
    assert "–" in as_text(comparison)


def test_the_same_samples_are_pointed_out(pair):
    comparison = pair(metrics(samples="b.csv sha256:s"), first=metrics(samples="a.csv sha256:s"))
    assert comparison.remarks == ("one and two judge the same file of samples: they are not independent.",)


def test_runs_are_named_by_as_many_folders_as_tell_them_apart(tmp_path):
    paths = [write(tmp_path / p, metrics()) for p in ("a/r/metrics.json", "b/r/metrics.json", "c/metrics.json")]
    paths += [write(tmp_path / "c" / "old.json", metrics())]
    assert [run.name for run in compare(paths).runs] == ["a/r", "b/r", "c", "old"]
    same = [write(tmp_path / "c" / name, metrics()) for name in ("x.json", "x.txt")]
    assert [run.name for run in compare(same).runs] == [str(path) for path in same]


def test_what_cannot_be_compared_is_refused(tmp_path):
    good = write(tmp_path / "good" / "metrics.json", metrics())
    with pytest.raises(UserError, match=r"needs two metrics\.json or more, not 1"):
        compare([good])
    with pytest.raises(UserError, match="is named twice"):
        compare([good, good.parent])
    with pytest.raises(UserError, match=r"cannot read .*nowhere.*; expected metrics.json, or the folder"):
        compare([good, tmp_path / "nowhere"])
    (tmp_path / "text.json").write_text("[1")
    with pytest.raises(UserError, match=r"text\.json is no JSON"):
        compare([good, tmp_path / "text.json"])
    for name, content, message in (
        ("list", [1], "is not the metrics.json of `jaxcrystal evaluate`: its 'protocol' is not as expected"),
        ("lack", {k: v for k, v in metrics().items() if k != "versions"}, "its 'versions' is not as expected"),
        ("kind", metrics() | {"confidence_95": [1]}, "its 'confidence_95' is not as expected"),
        (
            "interval",
            metrics() | {"confidence_95": {"sun.rate": [0.1]}},
            r"interval of sun.rate is \[0.1\]; expected two",
        ),
    ):
        with pytest.raises(UserError, match=message):
            compare([good, write(tmp_path / f"{name}.json", content)])
    with pytest.raises(UserError, match="cannot write to the folder"):
        compare([good, write(tmp_path / "b" / "metrics.json", metrics())], good)


def test_a_table_and_a_figure_are_written(tmp_path, capsys):
    one = write(tmp_path / "a<b|c" / "metrics.json", metrics())
    two = write(tmp_path / "two" / "metrics.json", metrics(0.625))
    assert cli.main(["compare", str(one), str(two), "--out", str(tmp_path / "new" / "out")]) == 0
    told = capsys.readouterr().out
    (valid,) = [line.split("  ") for line in told.splitlines() if line.startswith("Valid, %")]
    assert [cell.strip() for cell in valid if cell] == ["Valid, %", "50.0", "62.5", "+12.5 (+8.3 to +16.7) *"]
    assert "written to" in told and "of 10 intervals about 1 would" in told
    out = tmp_path / "new" / "out"
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(ALL)
    (row,) = [row for row in rows if row["name"] == "validity.both" and row["run"] == "two"]
    assert (row["value"], row["unit"], row["difference_from_first"]) == ("0.625", "share", "0.125")
    assert float(row["difference_low_95"]) == pytest.approx(0.125 - 0.03 * 2**0.5)
    markdown = (out / "comparison.md").read_text(encoding="utf-8")
    assert "| Valid, % | 50.0 (47.0 to 53.0) | 62.5 (59.5 to 65.5) | +12.5 (+8.3 to +16.7) * |" in markdown
    assert "a<b\\|c" in markdown and markdown == as_markdown(compare([one, two]))
    assert len({line.count(" | ") for line in markdown.splitlines() if line.startswith("|")}) == 1
    figure = ElementTree.fromstring((out / "comparison.svg").read_text(encoding="utf-8"))
    tags = [element.tag.rpartition("}")[2] for element in figure.iter()]
    # A dot for each run above, for each number, and for each difference.
    assert tags.count("circle") == 2 + 2 * len(ALL) + len(ALL)
    texts = ["".join(element.itertext()) for element in figure.iter() if element.tag.endswith("text")]
    assert "a<b|c · 1,000 attempts" in texts and "+12.5 (+8.3 to +16.7) *" in texts


def test_the_figure_says_what_it_does_not_compare(pair, tmp_path):
    pair(metrics(potential="x sha256:another"), out=tmp_path)
    assert (tmp_path / "comparison.svg").read_text(encoding="utf-8").count("not compared: other potential") == 6
