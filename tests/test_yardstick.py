"""What a model's crystals are compared with goes with the model, and with its ledgers."""

import json

import pytest

from jaxcrystal import yardstick
from jaxcrystal.errors import UserError
from jaxcrystal.interface.tables import Attempts
from jaxcrystal.yardstick import Yardstick


def test_what_lies_beside_the_model_moves_with_it(tmp_path):
    told = Yardstick("round 1 of runs/x", ("mp20", "synthetic.parquet"), hull="mp", potential="chgnet")
    (tmp_path / "a").mkdir()
    yardstick.write(tmp_path / "a", told)
    assert yardstick.read(tmp_path / "a") == told and yardstick.read(tmp_path) is None
    (tmp_path / "a/synthetic.parquet").touch()
    (tmp_path / "a").rename(tmp_path / "b")
    found = yardstick.read(tmp_path / "b")
    assert found.train == ("mp20", str(tmp_path / "b/synthetic.parquet")) and found.potential == "chgnet"
    assert Attempts([], yardstick=found)[:0].yardstick == found


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"model": "x"}), json.dumps({"train": ["mp20"], "maxi": 1})])
def test_one_that_cannot_be_read_is_told(text, tmp_path):
    (tmp_path / "yardstick.json").write_text(text)
    with pytest.raises(UserError, match=r"yardstick\.json cannot be read .*; remove it, and name the training set"):
        yardstick.read(tmp_path)
