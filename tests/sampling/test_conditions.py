"""What prompts state and the grammar keeps to: spelled as in training, refused with row and value where it is wrong."""

import json

import pytest

from jaxcrystal.config import Augment, Recipe, TextFormat, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.sampling.conditions import Target, Trained, read, targets
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import form_of


def test_a_row_is_a_prompt_and_an_empty_cell_is_not_stated(tmp_path):
    path = tmp_path / "wishes.csv"
    path.write_text(
        "pretty_formula,elements,spacegroup.number,formation_energy_per_atom,band_gap,e_above_hull\n"
        'LiFePO4,,62,-2.5,3.5,0\n"Mg(OH)2", ,,,,\n,"Li, O",,,,\n,Na-Cl,,,,\n,K I,225,,0,\n,,,,,\n'
    )
    assert read(path) == [
        {
            "pretty_formula": "LiFePO4",
            "spacegroup.number": 62,
            "formation_energy_per_atom": -2.5,
            "band_gap": 3.5,
            "e_above_hull": 0.0,
        },
        {"pretty_formula": "Mg(HO)2"},
        {"elements": ["Li", "O"]},
        {"elements": ["Cl", "Na"]},
        {"elements": ["I", "K"], "spacegroup.number": 225, "band_gap": 0.0},
        {},
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"wishes\.csv is empty; expected a header of pretty_formula, elements"),
        ("band_gap\n", "a header and no row"),
        ("formula\nNaCl\n", "the column 'formula'; columns are pretty_formula, elements"),
        ("band_gap,band_gap\n1,2\n", "a column twice"),
        ("band_gap,elements\n1,O\n2\n", r"wishes\.csv, row 2: 1 cells, the header has 2"),
        ("band_gap\n1\nwide\n", r"wishes\.csv, row 2: 'wide' is no value of band_gap"),
        ("spacegroup.number\n225.5\n", "row 1: '225.5' is no value of spacegroup.number"),
        ("spacegroup.number\n231\n", "row 1: space group 231 does not exist"),
        ("band_gap\nnan\n", "row 1: .* is no value of band_gap"),
        ("band_gap\n1e999\n", "row 1: .* is no value of band_gap"),
        ("formation_energy_per_atom,e_above_hull\n1,-inf\n", "row 1: -inf is no value of e_above_hull"),
        ("spacegroup.number\nnan\n", "row 1: 'nan' is no value of spacegroup.number"),
        ("pretty_formula\nnan\n", "row 1: the formula 'nan' cannot be read"),
        ("elements\nnan\n", "row 1: 'nan' is no chemical element"),
        ("elements\nLi Xx\n", "row 1: 'Xx' is no chemical element"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_row_and_value(tmp_path, text, match):
    (tmp_path / "wishes.csv").write_text(text)
    with pytest.raises(UserError, match=match):
        read(tmp_path / "wishes.csv")


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.csv"):
        read(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*bytes\.csv"):
        read(tmp_path / "bytes.csv")
    (tmp_path / "long.csv").write_text("band_gap\n" + "1" * 200_000)
    with pytest.raises(UserError, match=r"cannot read .*long\.csv"):
        read(tmp_path / "long.csv")


def test_what_a_spreadsheet_writes_before_the_first_letter_is_no_part_of_it(tmp_path):
    (tmp_path / "wishes.csv").write_text("band_gap\n1\n", encoding="utf-8-sig")
    assert read(tmp_path / "wishes.csv") == [{"band_gap": 1.0}]


NONE = Constraints()
UNKNOWN = Trained()


def target_of(conditions, constraints=NONE, num_atoms=None, grammar=True, trained=UNKNOWN) -> Target:
    ((target,), _) = targets(conditions, constraints, num_atoms, grammar=grammar, trained=trained)
    return target


def test_one_composition_is_one_prompt_and_one_constraint():
    salt = target_of({"pretty_formula": "NaCl"})
    assert (salt.conditions, salt.constraints) == ({"pretty_formula": "NaCl"}, Constraints(formula="NaCl"))
    for formula in ("ClNa", "Na2Cl2", "Cl3Na3"):
        for name in ("formula", "pretty_formula"):  # as Python's keyword and as a column
            target = target_of({name: formula})
            assert target.conditions == salt.conditions and target.constraints.unit == salt.constraints.unit
    peroxide = target_of({"formula": "OLi"})
    assert peroxide.conditions == {"pretty_formula": "Li2O2"} and peroxide.constraints.unit == {"Li": 1, "O": 1}
    assert target_of({"elements": ["O", "Li", "O"]}).conditions == {"elements": ["Li", "O"]}
    with pytest.raises(UserError, match="row 3: the same as row 1; raise num"):
        targets([{"formula": "ClNa"}, {}, {"pretty_formula": "Na2Cl2"}], Constraints(), grammar=True, trained=Trained())
    with pytest.raises(UserError, match="pretty_formula is stated twice"):
        target_of({"formula": "ClNa", "pretty_formula": "NaCl"})


def test_what_is_stated_of_the_composition_is_kept_to():
    kept = target_of({"elements": ["O", "Li"]}, Constraints(required=("O",), allowed=("Fe", "Li", "O", "P")))
    assert (kept.constraints.required, kept.constraints.allowed) == (("O", "Li"), ("Li", "O"))  # and no others
    with pytest.raises(UserError, match="Fe is required, but it is not"):
        target_of({"elements": ["O", "Li"]}, Constraints(required=("Fe",)))
    for allowed in (("Li",), ("Li", "Fe")):
        with pytest.raises(UserError, match="O is required, but it is not"):
            target_of({"elements": ["O", "Li"]}, Constraints(allowed=allowed))
    assert target_of({"elements": "Li O"}).constraints == Constraints(required=("Li", "O"), allowed=("Li", "O"))
    assert target_of({"spacegroup": 225, "band_gap": 1}).constraints == Constraints()
    assert target_of({"formula": "NaCl"}, grammar=False).constraints is None


def test_a_form_that_states_the_space_group_is_kept_to_it(monkeypatch):
    def implied(self, attribute, value):
        return {"space_groups": (value,)} if attribute == "spacegroup.number" else {}

    monkeypatch.setattr(type(form_of(TextFormat())), "implied", implied)
    assert target_of({"spacegroup": 225}).constraints == Constraints(space_groups=(225,))
    narrow = Constraints(space_groups=(62, 225))
    assert target_of({"spacegroup": 225}, narrow).constraints == Constraints(space_groups=(225,))
    assert target_of({}, narrow).constraints == narrow
    with pytest.raises(UserError, match="no space group is left"):
        target_of({"spacegroup": 1}, narrow)
    assert target_of({"spacegroup": 225}, trained=Trained(())) == Target({}, Constraints(space_groups=(225,)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "wide", None])
def test_numbers_that_are_none_are_refused(value):
    for name in ("formation_energy", "band_gap", "e_above_hull", "spacegroup"):
        with pytest.raises(UserError, match="is no value of"):
            target_of({name: value})


def test_what_a_model_was_not_trained_on_is_never_stated():
    known = Trained({"band_gap", "spacegroup.number"})
    with pytest.raises(UserError, match=r"not trained on e_above_hull; .*knows: spacegroup.number, band_gap"):
        target_of({"e_above_hull": 0.0}, trained=known)
    rows = [{"formula": "NaCl", "band_gap": 5.0}, {"elements": ["Na"]}]
    found, notes = targets(rows, Constraints(), grammar=True, trained=known)
    assert [target.conditions for target in found] == [{"band_gap": 5.0}, {}]
    assert found[0].constraints == Constraints(formula="NaCl")
    assert "not trained on pretty_formula and elements" in notes["unstated"]
    with pytest.raises(UserError, match="row 1: the model was not trained on pretty_formula"):
        targets(rows, Constraints(), grammar=False, trained=known)
    with pytest.raises(UserError, match="it knows: none"):
        target_of({"band_gap": 1.0}, trained=Trained(()))


@pytest.mark.parametrize(
    ("augment", "text", "expected"),
    [
        (Augment(attributes=("band_gap",)), TextFormat(), {"band_gap"}),
        (Augment(attributes=("band_gap",), infill=1.0), TextFormat(), set()),
        (Augment(attributes=("band_gap",), attribute_probability=0.0), TextFormat(), set()),
        (Augment(attributes=("elements", "band_gap")), TextFormat(paper_compat=True), {"band_gap"}),
    ],
)
def test_a_recipe_tells_what_training_stated(tmp_path, augment, text, expected):
    assert Trained.read(tmp_path) == Trained(None, {})
    (tmp_path / "recipe.yaml").write_text(json.dumps(to_dict(Recipe(augment=augment, text=text))))
    assert Trained.read(tmp_path).attributes == expected


def test_a_cell_is_as_large_as_training_had_it_for_such_a_formula():
    trained = Trained(None, {3: (3, 18), 7: (14, 28)})
    for conditions, num_atoms, expected in (
        ({"formula": "H2O"}, None, (3, 18)),
        ({"formula": "LiFePO4"}, None, (14, 28)),
        ({"formula": "LiFePO4"}, "any", (1, None)),
        ({"formula": "LiFePO4"}, 7, (7, 7)),
        ({"formula": "LiFePO4"}, (7, 21), (7, 21)),
        ({"formula": "NaCl"}, None, (1, None)),  # training had none of two atoms
        ({"elements": ["H", "O"]}, None, (1, None)),
        ({}, 5, (5, 5)),
    ):
        assert target_of(conditions, NONE, num_atoms, trained=trained).constraints.num_atoms == expected
    assert target_of({"formula": "H2O"}, Constraints(num_atoms=(6, 6)), trained=trained).constraints.num_atoms == (6, 6)
    assert target_of({"formula": "H2O"}, grammar=False, trained=trained).constraints is None
    _, notes = targets([{"formula": "H2O"}, {"formula": "SiO2"}], NONE, grammar=True, trained=trained)
    assert "(H2O: 3 to 18 and 1 more)" in notes["num_atoms"] and "`any` leaves it to the model" in notes["num_atoms"]
    with pytest.raises(UserError, match="num_atoms is stated twice"):
        target_of({}, Constraints(num_atoms=(6, 6)), 6)
    with pytest.raises(UserError, match="nothing to keep the constraints"):
        target_of({}, num_atoms=6, grammar=False)


def test_a_formula_that_training_had_not_is_said_to_be_extrapolation(tmp_path):
    (tmp_path / "formulas.txt").write_text("ClNa\nHNe\n")
    (tmp_path / "num_atoms.json").write_text('{"2": [2, 20]}')
    trained = Trained.read(tmp_path)

    def said(*formulas, **how):
        rows = [{"formula": formula} for formula in formulas]
        return targets(rows, NONE, grammar=True, trained=trained, **how)[1].get("strange")

    assert said("NaCl") is None and said("Na2Cl2") is None and Trained().formulas is None
    assert said("LiFePO4") == (
        "LiFePO4: not in the training set, whose cells have at most 20 atoms; what is drawn is extrapolation. A "
        "compound of LiFePO4 is known, perhaps of larger cells."
    )
    assert said("NaCl", "LiXeKr", "MgO").startswith("LiXeKr and 1 more: not in the training set")
    assert said("NaCl", "LiXeKr", "MgO").endswith("A compound of MgO is known, perhaps of larger cells.")
    assert "known, perhaps" not in said("LiXeKr")
    _, notes = targets({}, Constraints(formula="LiFePO4"), grammar=True, trained=trained)
    assert "LiFePO4: not in the training set" in notes["strange"]
    _, notes = targets({"formula": "LiFePO4"}, NONE, grammar=False, trained=trained)
    assert "LiFePO4: not in the training set" in notes["strange"]
    (tmp_path / "formulas.txt").write_text("Xx\n")
    with pytest.raises(UserError, match=r"formulas\.txt: 'Xx' of the formula 'Xx' is no chemical element"):
        targets({"formula": "NaCl"}, NONE, grammar=True, trained=Trained.read(tmp_path))
