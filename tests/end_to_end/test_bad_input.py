"""What a user can get wrong: each is one line that names it, or a counted outcome; nothing is lost, no traceback."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from jaxcrystal.cli import main
from jaxcrystal.config import LlamaConfig, MeshConfig, TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.sentence_pieces import COMPACT
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.checkpoint_map import SHOWN
from jaxcrystal.weights.saved import describe

SALT = Crystal([3.99] * 3, [60] * 3, [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]]).to_cif()
#: A CIF, why `prepare` leaves it out, and what `evaluate` counts it as.
ROWS = {
    "sound": (SALT, "ok"),
    "broken": (SALT[: SALT.index("_atom_site")], "cif_error"),
    "element": (SALT.replace("Na", "Nq"), "unknown_element"),
    "nan": (SALT.replace("0.5", "nan", 1), "not_finite"),
}
#: Nobody can write there, root included: below a regular file, and where the kernel makes no folders.
UNWRITABLE = ["{tmp_path}/file/below", "/proc/jaxcrystal/out"]

#: The smallest model that trains, as words of a command.
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
TINY = [word for key, value in SIZES.items() for word in ("--set", f"model.{key}={value}")]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path) -> Path:
    return write_csv(tmp_path / "set.csv", [{"material_id": name, "cif": cif} for name, (cif, _) in ROWS.items()])


@pytest.fixture
def model(tmp_path) -> Path:
    """A model directory: a tiny LLaMA with random weights and a context of 64 tokens."""
    config = LlamaConfig(
        vocab_size=load_tokenizer("compact").vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    out = tmp_path / "model"
    describe(out, config, None, TextFormat(), load_tokenizer("compact"))
    weights = initialize(Llama(config), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))
    with ocp.CheckpointManager((out / "checkpoints").resolve()) as manager:
        manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(weights)))
    return out


def test_bad_rows_are_left_out_with_their_reason(typed, table, tmp_path):
    told = typed("prepare", table, "--out", tmp_path / "data")
    bad = {name: outcome for name, (_, outcome) in ROWS.items() if outcome != "ok"}
    assert told.startswith("set: 4 rows read, 1 kept ")
    assert all(
        f"left out: 1 {outcome}, first row {row} ({name}): " in told
        for row, (name, outcome) in enumerate(bad.items(), 1)
    )
    with (tmp_path / "data" / "left_out.csv").open(newline="") as file:
        left_out = list(csv.DictReader(file))
    assert {row["id"]: row["reason"] for row in left_out} == bad
    assert [row["row"] for row in left_out] == ["1", "2", "3"] and all(row["message"] for row in left_out)


def test_bad_rows_are_attempts_all_the_same(typed, table, tmp_path):
    told = typed("evaluate", table, "--out", tmp_path / "report")
    outcomes = {outcome: 1 for _, outcome in ROWS.values()}
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["counts"]["attempts"] == 4 and metrics["counts"]["outcomes"] == outcomes
    assert metrics["validity"]["structural"] == 1 / 4
    assert all(f"1 {outcome}" in told for outcome in outcomes if outcome != "ok")


def test_a_set_without_one_sound_row(typed, refused, tmp_path, capsys):
    """Every row is counted; what is left is a set of nothing, which training refuses and evaluation describes."""
    path = write_csv(tmp_path / "set.csv", [{"cif": "data_"}, {"cif": "data_"}])
    assert main(["prepare", str(path), "--out", str(tmp_path / "data")]) == 1
    told = capsys.readouterr().out
    assert (
        told.startswith("set: 2 rows read, 0 kept ")
        and "left out: 2 cif_error, first row 0 (0): the CIF has no" in told
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"out: {tmp_path / 'run'}\ndata: {{train: {tmp_path / 'data' / 'set.parquet'}}}\n")
    assert "the data set is empty" in refused("train", recipe, *TINY)
    typed("evaluate", path, "--out", tmp_path / "report")
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["counts"]["attempts"] == 2 and metrics["validity"]["both"] == 0


@pytest.mark.parametrize("verb", ["prepare", "evaluate"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", "material_id,energy\nmp-1,x\n", "material_id, energy"),
        ("empty.csv", "", "is empty"),
        ("header.csv", "material_id,cif\n", "holds no"),
        ("set.cif.zip", "x", "not known|give a"),
        ("none.csv", None, "cannot read|does not exist"),
        ("cut.csv", 'cif\n"data_a\n', "cannot be read as CSV|as a table"),
        ("set.parquet", "no parquet", "cannot"),
    ],
)
def test_a_file_that_holds_no_set_of_crystals(refused, tmp_path, verb, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    told = refused(verb, path, "--out", tmp_path / "out")
    assert str(path) in told and any(part in told for part in message.split("|"))
    if "column" in told:
        assert "cif" in told  # what would have been right


def test_a_folder_without_cifs_is_empty(refused, tmp_path):
    (tmp_path / "cifs").mkdir()
    for verb in ("prepare", "evaluate"):
        assert f"{tmp_path / 'cifs'}" in refused(verb, tmp_path / "cifs", "--out", tmp_path / "out")


def test_a_checkpoint_with_a_missing_shard_or_a_wrong_shape(refused, llama, tmp_path):
    _, source = llama
    refusal = refused("convert", source, "--out", tmp_path / "llama")
    assert f"{source} has neither tokenizer.model nor tokenizer.json" in refusal
    (source / "tokenizer.model").write_bytes(COMPACT.read_bytes())

    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    tensors = load_file(shards[0])
    shards[0].rename(tmp_path / "aside")
    told = refused("convert", source, "--out", tmp_path / "llama").splitlines()
    missing = [
        f"  {name}: expected {list(tensor.shape)}, missing ({shards[0].name} is not there)"
        for name, tensor in sorted(tensors.items())
    ]
    more = [f"  and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
    assert str(source) in told[0] and told[1:] == [*missing[:SHOWN], *more]

    name, tensor = next((n, t) for n, t in tensors.items() if t.ndim == 2)
    save_file(tensors | {name: tensor[:-1].copy()}, shards[0])
    found = [tensor.shape[0] - 1, tensor.shape[1]]
    told = refused("convert", source, "--out", tmp_path / "llama").splitlines()
    assert told[1:] == [f"  {name}: expected {list(tensor.shape)}, found {found}"]
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    assert f"{shards[0]} is not a readable safetensors file" in refused("convert", source, "--out", tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("optimiser: {}", "steps=5", "recipe.yaml: optimiser is no key of Recipe; did you mean 'optimizer'?"),
        (
            "",
            "optimizer.learning_rat=1",
            "optimizer.learning_rat is no key of OptimizerConfig; did you mean 'learning_rate'",
        ),
        ("", "steps=many", "--set steps=many: steps is 'many'; it must be a whole number"),
        ("", "steps", "--set steps: write key=value"),
        ("", "lora.targets=[q_proj", "--set lora.targets=[q_proj: '[q_proj' is not valid YAML"),
        ("steps: [", "steps=5", "recipe.yaml is not valid YAML"),
        (
            "",
            "lora.targets=[attention]",
            "--set lora.targets=[attention]: lora.targets is ('attention',); 'attention': it must be one of 'q_proj'",
        ),
        ("", "data.train=none.parquet", "cannot read the data set none.parquet"),
        ("", "base=none", "none is not a model directory"),
        ("", "steps=0", "steps is 0; it must lie between 1 and"),
        ("", "log_every=0", "log_every is 0; it must lie between 1 and"),
        ("", "data.validation_rows=0", "data.validation_rows is 0; it must lie between 1 and"),
        ("", "model.head_dim=0", "model.head_dim is 0; it must lie between 1 and"),
    ],
)
def test_a_recipe_that_cannot_be_run(refused, tmp_path, text, override, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    words = [] if text else TINY
    assert message in refused("train", recipe, *words, "--set", f"out={tmp_path / 'run'}", "--set", override)
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_was_not_prepared(refused, table, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"out: {tmp_path / 'run'}\ndata: {{train: {table}}}\n")
    told = refused("train", recipe, *TINY)
    assert f"run `jaxcrystal prepare {table} --out DIR`" in told


def test_a_prompt_longer_than_the_context(refused, model, tmp_path):
    elements = sorted(ELEMENTS[1:61])
    told = refused(
        "sample", "--model", model, "--num", 2, "--out", tmp_path / "s.csv", "--elements", ",".join(elements)
    )
    prompt = generation_prompt(form_of(TextFormat()), {"elements": elements})
    length = 1 + len(load_tokenizer("compact").encode(prompt))  # one more begins the sequence
    assert told.startswith(f"the prompt has {length} tokens") and length > 64
    assert "the model's context holds 64: shorten the prompt" in told
    told = refused("sample", "--model", model, "--num", 2, "--out", tmp_path / "s.csv", "--max-new-tokens", 63)
    assert "63 may follow" in told and "the model's context holds 64" in told
    assert not list(tmp_path.glob("s.csv*"))


def test_a_model_without_its_tokenizer(refused, model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer.model").unlink()
    told = refused("sample", "--model", bare, "--num", 2, "--out", tmp_path / "s.csv")
    assert "bare is not complete: it has no tokenizer" in told
    assert not list(tmp_path.glob("s.csv*"))


@pytest.mark.parametrize("place", UNWRITABLE)
@pytest.mark.parametrize("verb", ["prepare", "convert", "export", "train", "sample", "evaluate"])
def test_a_folder_that_cannot_be_written(refused, request, tmp_path, verb, place):
    (tmp_path / "file").write_text("not a folder")
    out = place.format(tmp_path=tmp_path)
    if verb == "convert":
        _, source = request.getfixturevalue("llama")
        (source / "tokenizer.model").write_bytes(COMPACT.read_bytes())
        typed = [source, "--out", out]
    elif verb == "export":
        typed = ["--model", request.getfixturevalue("model"), "--format", "hf", "--out", out]
    elif verb == "train":
        (tmp_path / "recipe.yaml").write_text("steps: 1\n")
        typed = [tmp_path / "recipe.yaml", *TINY, "--set", f"out={out}"]
    elif verb == "sample":
        typed = ["--model", request.getfixturevalue("model"), "--num", 1, "--out", f"{out}.csv", "--no-grammar"]
    else:
        typed = [request.getfixturevalue("table"), "--out", out]
    told = refused(verb, *typed)
    assert "cannot write" in told and out in told
    assert (tmp_path / "file").read_text() == "not a folder"


def test_an_option_out_of_range(refused, table, tmp_path):
    assert refused("prepare", table, "--out", tmp_path, "--max-atoms", -1).startswith("max_atoms is -1")
    for limit in (0, -1):
        assert refused("evaluate", table, "--out", tmp_path, "--limit", limit).startswith(f"limit is {limit}")
    assert "num is 0" in refused("sample", "--model", tmp_path, "--num", 0, "--out", tmp_path / "s.csv")


def test_debug_shows_where_it_happened(tmp_path):
    typed = ["prepare", str(tmp_path / "none.csv"), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"none\.csv"):
        main([*typed, "--debug"])
    plain = subprocess.run([sys.executable, "-m", "jaxcrystal.cli", *typed], capture_output=True, text=True)
    assert plain.returncode == 1 and plain.stdout == ""
    assert plain.stderr.startswith("jaxcrystal prepare: ") and plain.stderr.count("\n") == 1
    debug = subprocess.run([sys.executable, "-m", "jaxcrystal.cli", *typed, "--debug"], capture_output=True, text=True)
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "UserError" in debug.stderr
