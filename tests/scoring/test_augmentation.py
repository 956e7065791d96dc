"""Training with translations makes a model find a crystal as likely wherever its origin lies."""

import pytest

import jaxcrystal

#: The smallest that learn something of P1 texts in seconds.
RECIPE = {
    "tokenizer": "compact",
    "steps": 60,
    "mesh": {"fsdp": 1},
    "model": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "dtype": "float32",
    },
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 10},
}


@pytest.mark.slow
def test_a_model_trained_with_translations_has_a_lower_ipt(tmp_path):
    """On some crystals of MP-20 that neither saw, over 20 translations each; the intervals are apart."""
    source = jaxcrystal.read("mp20-val", limit=500)
    jaxcrystal.prepare({"train": source[:420], "held": source[420:]}, tmp_path / "data", max_atoms=6)
    found = {}
    for translate in (True, False):
        name = f"translate_{translate}"
        recipe = RECIPE | {
            "out": str(tmp_path / name),
            "data": {
                "train": str(tmp_path / "data" / "train.parquet"),
                "validation": str(tmp_path / "data" / "held.parquet"),
                "tokens_per_row": 512,
                "rows_per_batch": 4,
            },
            "augment": {"translate": translate, "infill": 0.0, "attribute_probability": 0.0},
        }
        jaxcrystal.train(recipe)
        with jaxcrystal.load(tmp_path / name) as sampler:
            found[translate] = sampler.ipt(jaxcrystal.read(tmp_path / "data" / "held.parquet", limit=20))
    assert found[True].interval[1] < found[False].interval[0]
    assert found[True].mean < found[False].mean / 2
