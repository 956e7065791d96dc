# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Crystals with wishes
#
# What is wished for is said to the model in its prompt, and kept to by the grammar while it writes. Some wishes are
# therefore met in every attempt, by construction: composition, elements, size, space group. The model decides all else.

# %%
import os
from collections import Counter

import pandas as pd
from pymatgen.analysis.structure_matcher import StructureMatcher

import jaxcrystal
from jaxcrystal.crystals.dataset import load

QUICK = "QUICK" in os.environ  # as the tests run this page
FEW, MANY = (2, 4) if QUICK else (20, 60)

mini = jaxcrystal.load("mini")

# %% [markdown]
# ## A formula: predicting structures
#
# LiCoO₂ is the cathode of the first lithium-ion batteries: layers of CoO₆ octahedra with lithium between them, space
# group R-3m. MP-20 has it in its *test* set; what the model has seen of this formula are a spinel and a monoclinic
# cell.

# %%
drawn = mini.sample(FEW, formula="LiCoO2", seed=0)
print(Counter(row.space_group for row in drawn))

truth = load("mp20-test")
names = truth.labels["pretty_formula"].to_pylist()
layered = truth.crystal(names.index("LiCoO2")).to_structure()
matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
same = [i for i, structure in enumerate(drawn.structures()) if matcher.fit(layered, structure)]
print(f"{len(same)} of {len(drawn)} attempts are the layered phase, {truth.ids[names.index('LiCoO2')]}")

# %%
drawn.pictures(12)

# %% [markdown]
# ## A space group, elements, a size
#
# Wishes go together. Here: cubic perovskite's group, these elements among others, five atoms.

# %%
cubic = mini.sample(FEW, spacegroup=221, num_atoms=5, constraints=jaxcrystal.Constraints(required=("O",)), seed=1)
assert all(row.written_group == 221 and row.crystal.formula.count("O") for row in cubic if row.crystal is not None)
cubic.pictures(12)

# %% [markdown]
# The text states the group; what symmetry finds in the crystal can be higher, never lower. Each row says both.

# %%
pd.DataFrame(
    {"formula": row.formula, "stated": row.written_group, "found": row.space_group, "higher": row.higher_symmetry}
    for row in cubic
).value_counts(["stated", "found", "higher"])

# %% [markdown]
# ## Only formulas that training did not have
#
# The composition comes first, so that a known one can be drawn again at once. A lower temperature makes likelier
# crystals; the composition may have a temperature of its own, so that variety is not what is lost.

# %%
with jaxcrystal.load("mini", new=True, temperature=0.7, composition_temperature=1.0) as sampler:
    new = sampler.sample(MANY, seed=2)
print(sum(row.redraws or 0 for row in new), "compositions were drawn again")
found = jaxcrystal.evaluate(new, workers=2)
stability = found.metrics["stability"]
print(f"metastable: {stability['metastable_rate']:.0%} of {len(new)} attempts, all with formulas new to training")
found.pictures(12)

# %% [markdown]
# ## A wish that no crystal can meet
#
# is refused before anything is computed, and the message says what could be met.

# %%
try:
    mini.sample(1, formula="SrTiO3", spacegroup=225, num_atoms=5)
except jaxcrystal.UserError as error:
    print(error)

# %% [markdown]
# And what is possible, but beyond what the model knows, is said to be so. Olivine LiFePO₄ has 28 atoms in its cell;
# MP-20 stops at 20.

# %%
olivine = mini.sample(1, formula="LiFePO4", num_atoms=28, seed=3)
print(olivine[0].text)
mini.close()
