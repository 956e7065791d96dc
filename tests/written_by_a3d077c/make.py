"""Writes one small thing of each kind with the verbs of the version whose folder is on PYTHONPATH; see README.md."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from jaxcrystal.crystals.sentence_pieces import COMPACT
from monty.serialization import dumpfn
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.entries.computed_entries import ComputedEntry

SAMPLE = "sample --model run --num 3 --max-new-tokens 120 --num-atoms 1-3 --out"
RECIPE = """\
out: run
base: model
lora: {rank: 1, targets: [q_proj]}
data: {train: data/crystals.parquet, validation: data/crystals.parquet, tokens_per_row: 256, rows_per_batch: 1, \
validation_rows: 1}
optimizer: {learning_rate: 1e-2, warmup_steps: 1}
mesh: {fsdp: 1}
steps: 4
log_every: 1
validate_every: 2
checkpoint_every: 2
keep_checkpoints: 1
"""
#: A sampler that is interrupted behind its second attempt.
INTERRUPTED = """\
import sys
from jaxcrystal.cli import main
from jaxcrystal.sample.ledger import Ledger
append = Ledger.append
def interrupted(self, attempt):
    append(self, attempt)
    if attempt.index == 1:
        raise KeyboardInterrupt
Ledger.append = interrupted
assert main(sys.argv[1:]) == 130
"""


def cubic(group: str, a: float, *symbols: str) -> Structure:
    places = [[0, 0, 0], [0.5, 0.5, 0.5]][: len(symbols)]
    return Structure.from_spacegroup(group, Lattice.cubic(a), symbols, places).get_primitive_structure()


CRYSTALS = {
    "NaCl": cubic("Fm-3m", 5.69, "Na", "Cl"),
    "MgO": cubic("Fm-3m", 4.24, "Mg", "O"),
    "LiF": cubic("Fm-3m", 4.05, "Li", "F"),
    "KCl": cubic("Fm-3m", 6.30, "K", "Cl"),
    "Si": cubic("Fd-3m", 5.44, "Si"),
    "CsCl": cubic("Pm-3m", 4.15, "Cs", "Cl"),
}
#: eV/atom, about as PBE has them.
ELEMENTS = {"Na": -1.3, "Cl": -1.8, "Mg": -1.6, "O": -4.9, "Li": -1.9, "F": -1.9, "K": -1.1, "Si": -5.4, "Cs": -0.9}
COMPOUNDS = {"NaCl": -3.4, "MgO": -5.96, "LiF": -4.85, "KCl": -3.4, "CsCl": -3.3}


def table(path: str, names: list[str]) -> None:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["material_id", "cif", "pretty_formula", "band_gap"])
        for name in names:
            rows.writerow([f"mp-{name}", CRYSTALS[name].to(fmt="cif"), name, "" if name == "Si" else 1.5])
        rows.writerow(["mp-broken", "no CIF", "", ""])


def verb(typed: str) -> None:
    subprocess.run([sys.executable, "-m", "jaxcrystal.cli", *typed.split()], check=True)


if __name__ == "__main__":
    table("crystals.csv", list(CRYSTALS))
    verb("prepare crystals.csv --out data")
    torch.manual_seed(0)
    shape = dict(vocab_size=448, hidden_size=8, intermediate_size=8, num_hidden_layers=1, max_position_embeddings=512)
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained("hf")
    shutil.copy(COMPACT, "hf/tokenizer.model")
    verb("convert hf --out model")
    Path("recipe.yaml").write_text(RECIPE)
    verb("train recipe.yaml")
    verb(f"{SAMPLE} samples.parquet")
    verb(f"{SAMPLE} samples")
    subprocess.run([sys.executable, "-c", INTERRUPTED, *f"{SAMPLE} unfinished.parquet".split()], check=True)
    totals = ELEMENTS | {formula: 2 * energy for formula, energy in COMPOUNDS.items()}
    gga = {"run_type": "GGA"}
    dumpfn([ComputedEntry(Composition(x), energy, parameters=gga) for x, energy in totals.items()], "entries.json")
    verb("hull build entries.json --out hull.parquet")
    verb("hull build data/crystals.parquet --potential chgnet --workers 1 --out labelled_hull.parquet")
    table("generated.csv", ["NaCl", "Si", "MgO"])
    verb(
        "evaluate generated.csv --out evaluation --train data/crystals.parquet --reference data/crystals.parquet "
        "--potential chgnet --hull labelled_hull.parquet --workers 1"
    )
    shutil.rmtree("hf")
    Path("evaluation/report.html").unlink()
