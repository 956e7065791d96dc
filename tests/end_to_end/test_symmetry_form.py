"""The symmetry form, typed as a user types it: prepare, train, sample with every wish that it has, evaluate."""

import json

import pandas as pd
import pytest

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.wyckoff import group
from jaxcrystal.reader.reading import read
from jaxcrystal.texts.symmetry.text import parse

RECIPE = """
tokenizer: compact-symmetry
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
  head_dim: 16, tie_word_embeddings: true}
text: {form: symmetry, length_decimals: 2}
augment: {translate: false, infill: 0.2, descriptions: true, attributes: [pretty_formula, spacegroup.number]}
data: {tokens_per_row: 256, rows_per_batch: 2, validation_rows: 2}
optimizer: {learning_rate: 3e-3, warmup_steps: 2}
mesh: {fsdp: 1}
steps: 6
"""


@pytest.mark.slow
def test_the_whole_way(typed, refused, cdvae_csv, tmp_path):
    told = typed("prepare", cdvae_csv, "--out", tmp_path / "data", "--symprec", "0.05")
    assert "36 rows read, 36 kept" in told
    data, run, recipe = tmp_path / "data/crystals.parquet", tmp_path / "run", tmp_path / "recipe.yaml"
    assert set(pd.read_parquet(data)["symmetry.symprec"]) == {0.05}
    recipe.write_text(RECIPE)
    places = ["--set", f"data.train={data}", "--set", f"data.validation={data}", "--set", f"out={run}"]
    assert typed("train", recipe, *places).startswith("6 steps, loss ")

    def drawn(name: str, *options: object) -> pd.DataFrame:
        out = tmp_path / f"{name}.parquet"
        typed("sample", "--model", run, "--num", 12, "--out", out, "--slots", 8, *options)
        table = pd.read_parquet(out)
        assert set(table["status"]) <= {"ok", "higher_symmetry"}
        for row in table.to_dict("records"):
            crystal = parse(row["text"])
            assert crystal.space_group == row["written_group"]
            if row["status"] == "ok":
                assert row["higher_symmetry"] or group(int(row["space_group"])).order <= crystal.group.order
        return table

    free = drawn("free")
    assert free["written_group"].nunique() > 3
    of_two = drawn("of_two", "--space-groups", "216,225")
    assert set(of_two["written_group"]) == {216, 225}
    stated = drawn("stated", "--spacegroup", "221", "--formula", "SrTiO3", "--num-atoms", 5)
    assert set(stated["written_group"]) == {221} and set(stated["conditions"].map(lambda x: len(json.loads(x)))) == {2}
    assert {tuple(parse(text).composition.items()) for text in stated["text"]} == {(("Sr", 1), ("Ti", 1), ("O", 3))}
    alloys = drawn("alloys", "--allow", "Ni,Al", "--num-atoms", "2-4", "--lengths", "3-6")
    for text in alloys["text"]:
        crystal = parse(text)
        assert set(crystal.composition) <= {"Ni", "Al"} and 2 <= sum(crystal.composition.values()) <= 4
        assert ((crystal.lengths >= 3) & (crystal.lengths <= 6)).all()
    assert all(ELEMENTS[orbit.species] in ("Ni", "Al") for text in alloys["text"] for orbit in parse(text).orbits)

    # One atom a cell: whatever F-43m says of it, it is Fm-3m.
    lone = ("--space-groups", "216,225", "--allow", "Ni", "--num-atoms", 1)
    more = drawn("more", *lone)
    assert set(more["space_group"]) == {225} and (more["higher_symmetry"] == (more["written_group"] == 216)).all()
    exact = drawn("exact", *lone, "--exact-symmetry")
    assert (exact["text"] == more["text"]).all()  # the same draws
    assert ((exact["status"] == "higher_symmetry") == (exact["written_group"] == 216)).all()
    assert set(exact["space_group"]) == {225} and set(exact["formula"]) == {"Ni"}  # what was found is still told
    assert (exact["cif"].isna() == (exact["status"] == "higher_symmetry")).all()
    again = drawn("again", *lone, "--exact-symmetry", "--num-valid", 3)
    assert (again["status"] == "ok").sum() == 3 and (again["text"] == exact["text"][: len(again)]).all()

    rows = read(tmp_path / "of_two.parquet").rows
    assert sum(row.crystal is not None for row in rows) == 12
    typed("evaluate", tmp_path / "of_two.parquet", "--out", tmp_path / "report", "--workers", 1)
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["counts"]["attempts"] == metrics["counts"]["constructed"] == 12

    wish = ("sample", "--model", run, "--num", 2, "--out", tmp_path / "no.parquet")
    assert "231" in refused(*wish, "--spacegroup", "231")
    told = refused(*wish, "--formula", "LiFePO4", "--spacegroup", "225", "--num-atoms", "7")
    assert "225" in told and "LiFePO4" in told
    assert not (tmp_path / "no.parquet").exists()
