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
# # How probable is a crystal?
#
# A language model can be asked the other way round: not for a crystal, but how probable it finds a given one. The
# answer is exact, the probability of the crystal's text, token by token. Two questions can be put to it: does it
# foretell which crystals would exist, and has the model understood that one crystal can be written in many ways?

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from scipy.stats import spearmanr

import jaxcrystal

QUICK = "QUICK" in os.environ  # as the tests run this page

mini = jaxcrystal.load("mini")
held_out = jaxcrystal.read("mp20-test", limit=6 if QUICK else 100)
scored = mini.score(held_out)
print(scored)

# %% [markdown]
# In nats, 2.3 of which are a factor of ten. Large cells of low symmetry have more coordinates to tell and cost more, so
# crystals are compared by the token.

# %%
scored.best(5)[["id", "formula", "num_atoms", "tokens", "log_probability", "log_probability_per_token"]]

# %% [markdown]
# ## Does it foretell stability?
#
# The model knows no energies. Yet of what it draws, is the likelier nearer to the hull? Attempts carry the
# log-probability with which they were drawn, and the evaluation keeps it beside the energy.

# %%
drawn = mini.sample(6 if QUICK else 150, seed=0)
found = jaxcrystal.evaluate(drawn, workers=2)
table = found.table.dropna(subset=["e_above_hull"])
unlikely = -table["log_probability_per_token"]
rank, _ = spearmanr(unlikely, table["e_above_hull"])
print(f"{len(table)} of {len(drawn)} attempts are placed; Spearman's rank correlation is {rank:.2f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.2))
axes.scatter(unlikely, table["e_above_hull"].clip(-0.2, 1.5), s=14, color="#4878a8", alpha=0.7)
axes.axhline(0.1, color="#444", linestyle=":")
axes.set(xlabel="nats a token", ylabel="above the hull, eV/atom")
figure.tight_layout()

# %% [markdown]
# The likelier half, by the token, beside all, in shares of attempts. A relaxation costs much more than a reading: where
# many crystals can be drawn, only the likeliest need be relaxed. `sample --keep 0.5` does that.

# %%
everything = found.table
half = everything.nlargest(len(everything) // 2, "log_probability_per_token")
for name, part in (("all", everything), ("the likelier half", half)):
    metastable = (part["e_above_hull"] <= 0.1).mean()
    print(f"{name}: {metastable:.0%} of {len(part)} are metastable, {part['novel'].fillna(False).mean():.0%} new")

# %% [markdown]
# ## One crystal, many texts
#
# A model that has understood symmetry finds all texts of a crystal as likely. The increase in perplexity under
# transformation (IPT) measures how far it is from that: the mean perplexity over the ways to write a crystal, less the
# least one. 0 is perfect understanding, or none at all.
#
# In the form that `mini` writes, a crystal has one canonical text, and `mini` has hardly seen another. What does it say
# of the other origins and axes, from which the same crystal reads differently?

# %%
ipt = mini.ipt(held_out)
print(ipt)
mini.close()

# %% [markdown]
# It does not know them; nor need it, for it will never be shown one. In the form with all atoms (P1) it matters more:
# there a crystal can be shifted by any vector, and the choice of origin is nobody's. Two small models, which differ in
# one thing: one saw each crystal with its origin drawn anew each time, the other always as the data have it.

# %%
folder = Path(tempfile.mkdtemp())
source = jaxcrystal.read("mp20-val", limit=80 if QUICK else 600)
count = len(source) * 5 // 6
jaxcrystal.prepare({"train": source[:count], "held": source[count:]}, folder / "data", max_atoms=6)

recipe = {
    "tokenizer": "compact",
    "steps": 2 if QUICK else 120,
    "mesh": {"data": 1, "fsdp": 1},
    "model": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 1 if QUICK else 10},
    "data": {
        "train": str(folder / "data/train.parquet"),
        "validation": str(folder / "data/held.parquet"),
        "tokens_per_row": 512,
        "rows_per_batch": 4,
    },
}
held = jaxcrystal.read(folder / "data/held.parquet", limit=4 if QUICK else 32)
found_of = {}
for name, translate in (("with translations", True), ("without", False)):
    augment = {"translate": translate, "infill": 0.0, "attribute_probability": 0.0}
    jaxcrystal.train(recipe | {"out": str(folder / name), "augment": augment})
    with jaxcrystal.load(folder / name) as model:
        found_of[name] = model.ipt(held)
    low, high = found_of[name].interval
    print(f"trained {name}: IPT over 20 translations {found_of[name].mean:.3f} ({low:.3f} to {high:.3f})")

# %%
figure, axes = plt.subplots(figsize=(6, 2.6))
for name, each in found_of.items():
    axes.hist(each.table["ipt"], bins=20, range=(0, 1.5), alpha=0.6, label=f"trained {name}")
axes.set(xlabel="increase in perplexity over translations", ylabel="crystals")
axes.legend()
figure.tight_layout()

# %% [markdown]
# Shown a crystal from everywhere, a model learns that it is the same from everywhere. The canonical text of the
# symmetry form has that by construction, and spends nothing on learning it.
# [docs/likelihood.md](../../docs/likelihood.md) has what the numbers mean, and do not mean; in a terminal they are
#
#     jaxcrystal score crystals.parquet --model mini --out scores.parquet
#     jaxcrystal ipt crystals.parquet --model mini --out ipt.parquet
