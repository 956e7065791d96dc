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
# # New crystals, and which of them would exist
#
# `mini` is a small language model that comes with jaxcrystal. It has read the 27,108 crystals of MP-20's training set,
# each as a few words: what is in the cell, the space group, the occupied Wyckoff positions, the lattice. Asked for
# another one, it writes it in the same words.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import jaxcrystal

QUICK = "QUICK" in os.environ  # as the tests run this page

mini = jaxcrystal.load("mini")
drawn = mini.sample(6 if QUICK else 100, seed=0)
print(drawn[0].text)

# %% [markdown]
# A grammar sees to it that every text is a crystal: the letters belong to the space group, no site is taken twice, and
# what the sites hold adds up to the composition. So every attempt is one. Here are some, in their conventional cells:

# %%
drawn.pictures(18)

# %% [markdown]
# Each is a row with all that is known of it: pymatgen's `structure`, the `cif`, the model's own `log_probability`.

# %%
row = drawn[0]
print(row.structure)
print(f"space group {row.space_group}, log p = {row.log_probability:.1f}")

# %% [markdown]
# ## Which of them would exist?
#
# Everything that can be asked offline: are the atoms apart and could the charges balance; is it new, compared with all
# that the model was trained on; where does it relax to under CHGNet, a potential that comes with its weights; and how
# far is its energy above the hull of the known phases of the Materials Project? `mini`'s crystals know with what they
# are to be compared. Rates are of *all* attempts, with 95 % intervals.

# %%
found = jaxcrystal.evaluate(drawn, workers=2)
print(found)

# %% [markdown]
# The nearest to the hull among those that are new, as they relaxed. Below zero means that the potential holds them for
# more stable than everything known: take it as a reason to compute them properly, not as a discovery.

# %%
found.pictures(12)

# %%
table = found.table
distances = table["e_above_hull"].dropna()
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.hist(distances.clip(-0.2, 1.0), bins=40, color="#4878a8")
axes.axvline(0.1, color="#444", linestyle=":")
axes.set(xlabel="above the hull, eV/atom (all beyond 1 at 1)", ylabel="crystals")
figure.tight_layout()

# %% [markdown]
# Left of the dotted line they count as metastable. As files, for other programs:

# %%
folder = Path(tempfile.mkdtemp())
paths = found.best(5).write(folder / "best", "poscar")
print(*(path.name for path in paths), sep="\n")

# %% [markdown]
# `found.report` is a page with every number, every distribution and every crystal in three dimensions;
# `found.save(...)` keeps it. On the command line the same is
#
#     jaxcrystal sample --model mini --num 100 --out drawn.parquet
#     jaxcrystal evaluate drawn.parquet --out report
