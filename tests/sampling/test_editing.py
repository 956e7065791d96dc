"""Edits of a crystal: what is kept is its own to the last digit, whatever a model of random weights writes beside."""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, replace

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from some_crystals import SALT

import jaxcrystal
from jaxcrystal.config import LlamaConfig, MeshConfig, TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.errors import UserError
from jaxcrystal.interface.editing import edit, one_crystal
from jaxcrystal.interface.sampler import Sampler
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.sampling.sampler import SamplerSettings
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.kept import Kept
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import describe, save_weights

P1 = form_of(TextFormat())
ONE_DEVICE = make_mesh(MeshConfig(1, 1, 1))
FORMS = {"p1": "compact", "symmetry": "compact-symmetry"}
SETTINGS = {"max_new_tokens": 130, "slots": 64, "temperature": 1.0, "top_p": 1.0}
#: BaTiO3, tetragonal (space group 99), with more digits than texts have.
TITANATE = Crystal(
    [3.9945123, 3.9945123, 4.0335987],
    [90, 90, 90],
    [56, 22, 8, 8, 8],
    [[0, 0, 0.0012345], [0.5, 0.5, 0.5156789], [0.5, 0.5, 0.9731234], [0.5, 0, 0.4857891], [0, 0.5, 0.4857891]],
)
TRICLINIC = Crystal(
    [4.123456, 5.234567, 6.345678],
    [81.23456, 97.34567, 105.45678],
    [3, 3, 8, 17],
    [[0.1234567, 0.2345678, 0.3456789], [0.98765, 0.87654, 0.76543], [0.54321, 0.43219, 0.32198], [0.999, 0.5, 0.004]],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random weights, a model of each form."""
    found = {}
    for form, name in FORMS.items():
        config = LlamaConfig(
            vocab_size=load_tokenizer(name).vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
        )
        found[form] = tmp_path_factory.mktemp(form) / "model"
        describe(found[form], config, None, TextFormat(form=form), load_tokenizer(name))
        save_weights(found[form], initialize(Llama(config), jax.random.key(0), ONE_DEVICE))
    return found


@pytest.fixture(scope="module")
def samplers(models):
    with ExitStack() as opened:
        yield {
            form: opened.enter_context(Sampler(model, SamplerSettings(**SETTINGS), ONE_DEVICE))
            for form, model in models.items()
        }


def atoms(crystal: Crystal) -> list[tuple[int, tuple[float, ...]]]:
    """As the grid has them."""
    return [(int(z), tuple(x)) for z, x in zip(crystal.species, crystal.frac_coords.tolist(), strict=True)]


def read(cif: str) -> Crystal:
    (row,) = jaxcrystal.read(cif)
    return row.crystal


EDITS = [
    dict(sites=(1, 3)),
    dict(sites=(0,), cell=True, num_atoms=(2, 6)),
    dict(cell=True, elements=True, num_atoms=(1, 5)),
    dict(composition=True),
    dict(composition=True, sites=(2,), cell=True),
]


def check(found: Crystal, crystal: Crystal, form: str, kept: dict) -> None:
    """What an edit made has the kept part."""
    whole = crystal if form == "p1" else symmetrize(crystal).crystal.to_crystal()
    sites = kept.get("sites", ())
    if form == "p1":
        assert atoms(found)[: len(sites)] == [atoms(crystal)[i] for i in sites]
    else:
        there = Counter(z for z, x in set(atoms(whole)) & set(atoms(found)))
        assert all(there[z] >= n for z, n in Counter(crystal.species[list(sites)].tolist()).items())
    if kept.get("cell"):
        assert found.lengths.tolist() == whole.lengths.tolist() and found.angles.tolist() == whole.angles.tolist()
    if kept.get("elements"):
        assert set(found.symbols) == set(crystal.symbols)
    if kept.get("composition"):
        assert sorted(found.species) == sorted(crystal.species)


@pytest.mark.parametrize("num", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_its_own_to_the_last_digit(samplers, form, num):
    """1,000 edits of a form, where there is time; all of their texts are crystals."""
    for crystal in (TITANATE, TRICLINIC):
        for seed, kept in enumerate(EDITS):
            rows = samplers[form].edit(crystal, num, seed=seed, **kept)
            assert [row.status for row in rows] == ["ok"] * num and len({row.text for row in rows}) > 1
            for row in rows:
                check(row.crystal, crystal, form, kept)
            assert read(rows[0].cif) == rows[0].crystal
            assert max(row.grammar_log_probability for row in rows) < 0


def test_a_kept_group_is_stated_in_every_text(samplers):
    rows = samplers["symmetry"].edit(TITANATE, 8, group=True, num_atoms=(1, 6))
    assert [row.written_group for row in rows] == [99] * 8
    assert {json.loads(row.asked)["spacegroup.number"] for row in rows} == {99}


@pytest.mark.parametrize("form", FORMS)
def test_with_everything_free_an_edit_is_a_sample(samplers, form):
    plain = samplers[form].sample(8, seed=4)
    free = samplers[form].sample(8, seed=4, constraints=Constraints(kept=Kept()))
    assert [asdict(row) for row in free] == [asdict(row) for row in plain]


def test_what_is_kept_weighs_as_the_model_gave_it(samplers):
    """Where all of a text is kept, its weight is its probability."""
    (drawn,) = samplers["p1"].sample(1, seed=2, num_atoms=1)
    given = P1.keeping(drawn.crystal, (0,), True, False, 0.1).kept
    (row,) = samplers["p1"].sample(1, num_atoms=1, constraints=Constraints(kept=given))
    assert row.text == drawn.text and row.log_probability == row.grammar_log_probability
    assert row.log_probability == pytest.approx(drawn.log_probability, abs=1e-4)
    assert drawn.grammar_log_probability > row.grammar_log_probability


def test_a_ledger_goes_on_and_belongs_to_its_edit(models, tmp_path, capsys):
    source, out = tmp_path / "c.cif", tmp_path / "e.parquet"
    source.write_text(TITANATE.to_cif())

    def run(num, **kept):
        return edit(models["p1"], source, num, out, **SETTINGS, mesh=ONE_DEVICE, **kept)

    report = run(6, sites=(1, 3, 4), cell=True, resample=3)
    assert report.counts == {"ok": 6} and 1 <= report.effective_number <= 6
    assert "the new cell has 5 atoms, as the given one" in capsys.readouterr().err
    rows = pq.read_table(out).to_pylist()
    assert sum(row["resampled"] for row in rows) == 3
    for row in rows:
        found = read(row["cif"])
        assert len(found) == 5 and atoms(found)[:3] == [atoms(TITANATE)[i] for i in (1, 3, 4)]
    report = run(8, sites=(1, 3, 4), cell=True, resample=3)
    assert report.resumed == 6
    assert [row["cif"] for row in pq.read_table(out).to_pylist()][:6] == [row["cif"] for row in rows]
    with pytest.raises(UserError, match="belongs to another run: grammar was"):
        run(8, sites=(1, 3, 4), resample=3)


def test_guidance_presses_what_is_stated(models, tmp_path):
    """Kept elements are stated, kept sites are not."""

    def texts(**request):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        edit(models["p1"], TITANATE, 6, out, mesh=ONE_DEVICE, **SETTINGS, **request)
        return list(pd.read_csv(out)["text"])

    # What random weights say hardly depends on the prompt: it takes a thousand times the difference.
    plain, pressed = (texts(elements=True, guidance=guidance) for guidance in (1.0, 1000.0))
    assert plain != pressed and plain == texts(elements=True)
    with pytest.raises(UserError, match="guidance weighs what the prompt states, and prompt 1 states nothing"):
        texts(sites=(1,), guidance=2.0)


@pytest.mark.parametrize(
    "form, crystal, kept, message",
    [
        ("p1", TITANATE, dict(sites=[5]), "there is no site 5: BaO3Ti has 5, from 0 to 4"),
        ("p1", TITANATE, dict(sites=[-1]), "there is no site -1"),
        ("p1", TITANATE, dict(), "nothing of the crystal is kept"),
        ("p1", TITANATE, dict(sites=range(5), cell=True), "nothing is left to be written"),
        ("symmetry", TITANATE, dict(sites=(0, 1, 2, 3), cell=True, num_atoms=5), "nothing is left to be written"),
        ("p1", TITANATE, dict(group=True), "a P1 text does not state its space group"),
        ("p1", TITANATE, dict(composition=True, num_atoms=5), "leave one of the two out"),
        (
            "p1",
            TITANATE,
            dict(sites=[1], constraints=Constraints(forbidden=("Ti",))),
            "Ti is kept, but it is forbidden",
        ),
        ("symmetry", TITANATE, dict(sites=[1], constraints=Constraints(space_groups=(1,))), "space_groups is empty"),
        ("symmetry", replace(SALT, frac_coords=np.zeros((2, 3)), species=[11, 11]), dict(sites=[1]), "no space group"),
        (
            "p1",
            Crystal([9] * 3, [90] * 3, [6] * 40, np.random.default_rng(0).random((40, 3))),
            dict(sites=range(30)),
            "max_new_tokens is 130",
        ),
        (
            "symmetry",
            Crystal([9] * 3, [90] * 3, [6] * 40, np.random.default_rng(0).random((40, 3))),
            dict(sites=range(30)),
            "max_new_tokens is 130",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_kept_is_said(samplers, form, crystal, kept, message):
    with pytest.raises(UserError, match=message) as error:
        samplers[form].edit(crystal, 2, **kept)
    assert "\n" not in str(error.value)


def test_an_edit_needs_the_grammar_and_one_crystal(models, tmp_path):
    with jaxcrystal.load(models["p1"], grammar=False) as free, pytest.raises(UserError, match="kept by the grammar"):
        free.edit(SALT, 1, cell=True)
    (tmp_path / "two.cif").write_text(SALT.to_cif() + TITANATE.to_cif())
    (tmp_path / "none.cif").write_text("data_x\n")
    for name, message in (("two", "holds several crystals"), ("none", "holds no crystal"), ("gone", "gone.cif")):
        with pytest.raises(UserError, match=message):
            one_crystal(str(tmp_path / f"{name}.cif"))
