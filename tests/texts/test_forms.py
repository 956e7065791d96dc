"""The seam: which form a text has, and what others must be able to do with it."""

import pickle

import pytest

from jaxcrystal.config import Recipe, TextFormat, from_dict, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.p1.form import P1
from jaxcrystal.texts.symmetry.form import Symmetry
from jaxcrystal.training.identity import differing


def test_settings_without_a_form_are_the_papers():
    """As they were written before there was a choice; a run that they began is the same run."""
    recipe = to_dict(Recipe())
    assert recipe["text"].pop("form") == "p1"
    assert from_dict(Recipe, recipe) == Recipe()
    assert differing(from_dict(Recipe, recipe), to_dict(Recipe())) == []
    other = Recipe(text=TextFormat(form="symmetry"))
    assert differing(other, to_dict(Recipe())) == ["text.form is symmetry there, p1 here"]


def test_forms_are_those_of_the_setting():
    assert isinstance(form_of(TextFormat()), P1) and isinstance(form_of(TextFormat(form="symmetry")), Symmetry)
    with pytest.raises(UserError, match="form is 'P1'; it must be one of 'p1', 'symmetry'"):
        TextFormat(form="P1")


def test_a_form_can_be_sent_to_a_worker():
    for name in ("p1", "symmetry"):
        form = form_of(TextFormat(coord_decimals=4, form=name))
        assert pickle.loads(pickle.dumps(form)) == form != form_of(TextFormat(form=name))
