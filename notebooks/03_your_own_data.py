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
# # A model of your own crystals
#
# `mini` goes on with whatever crystals you have: CIFs, POSCARs, a table, pymatgen's Structures. Here they are the
# tellurides of MP-20's test set, which the model has never seen, written as CIF files, as a colleague might hand them
# over.

# %%
import os
import tempfile
from pathlib import Path

import jaxcrystal
from jaxcrystal.crystals.dataset import load

QUICK = "QUICK" in os.environ  # as the tests run this page
folder = Path(tempfile.mkdtemp())

test = load("mp20-test")
formulas = test.labels["elements"].to_pylist()
tellurides = [i for i, elements in enumerate(formulas) if "Te" in elements][: 12 if QUICK else 400]
(folder / "cifs").mkdir()
for i in tellurides:
    (folder / "cifs" / f"{test.ids[i]}.cif").write_text(test.crystal(i).to_cif())
print(len(tellurides), "CIF files")

# %% [markdown]
# ## Read, checked, reduced, stored
#
# Nothing is dropped in silence: what cannot be used is counted, with its reason.

# %%
print(jaxcrystal.prepare(folder / "cifs", folder / "data"))

# %% [markdown]
# ## Fine-tuned
#
# All weights, ten times over the crystals: a minute or two on two cores. A run that is stopped goes on where it stood.

# %%
report = jaxcrystal.train(
    "mini_finetune",
    {
        "out": str(folder / "mine"),
        "data.train": str(folder / "data/cifs.parquet"),
        "epochs": 1 if QUICK else 10,
    },
)
print(f"{report.steps} steps; nats a token on MP-20's validation set afterwards: {report.validation_loss:.3f}")

# %% [markdown]
# ## What has it learned?
#
# Asked for nothing in particular, how often does each model write a telluride?

# %%
num = 8 if QUICK else 200
for name, place in (("mini", "mini"), ("mine", folder / "mine")):
    with jaxcrystal.load(place) as sampler:
        drawn = sampler.sample(num, seed=0)
    share = sum("Te" in row.crystal.symbols for row in drawn if row.crystal is not None) / num
    print(f"{name}: {share:.0%} of {num} attempts hold tellurium")

# %% [markdown]
# ## Judged
#
# The new model is none of the package's, so it is told with what to compare. What counts as known here are the crystals
# that it was tuned on.

# %%
known = jaxcrystal.read(folder / "cifs")
found = jaxcrystal.evaluate(drawn[: 4 if QUICK else 100], train=known, potential="chgnet", hull="mp", workers=2)
print(found)
found.pictures(12)
