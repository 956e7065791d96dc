"""Model directories: converted, trained on their own, trained as adapters on a base; and what is not one."""

import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig, TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize, param_shardings
from jaxcrystal.texts.sentence_pieces import with_pad
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.checkpoint_map import load_hf, open_checkpoint
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.saved import describe, load_model, written_whole

ONE = MeshConfig(1, 1, 1)
TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
LORA = LoraConfig(rank=2, targets=("v_proj", "down_proj"))


@pytest.fixture
def tokenizer(tmp_path, pieces):
    path = tmp_path / "pieces.model"
    path.write_bytes(pieces)
    return load_tokenizer(path)


def save(directory, step, weights):
    """As a training run saves: the weights beside what only the run itself reads."""
    training = ocp.args.StandardSave({"moments": np.ones(3)})
    with ocp.CheckpointManager((directory / "checkpoints").resolve()) as manager:
        manager.save(step, args=ocp.args.Composite(weights=ocp.args.StandardSave(weights), training=training))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_converted(dtype, checkpoint, pieces, tmp_path):
    _, source = checkpoint(shard="20KB")
    out = tmp_path / "new" / "llama"
    config = convert(source, out, make_mesh(MeshConfig(1, 8, 1)), dtype, pad_token=False, vocab_multiple=1)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    model = load_model(out, mesh)
    stated, params = load_hf(source, make_mesh(ONE), dtype)
    assert model.config == config == stated
    assert (model.lora, model.adapters, model.step, model.text) == (None, None, 0, TextFormat())
    assert_equal(model.variables, {"params": params})
    assert jax.tree.map(lambda x: x.sharding, model.variables) == param_shardings(model.module, mesh)
    assert model.tokenizer.file == pieces
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["llama"]


def extended(model):
    """As crystal-text-llm extends a LLaMA: a row more in embedding and head, the mean of the others."""
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[rows] = weight[:rows].mean(0)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_gets_pad_and_rows_that_are_never_drawn(tied, checkpoint, tmp_path):
    theirs, source = checkpoint(tie_word_embeddings=tied)
    config = convert(source, tmp_path / "out", make_mesh(MeshConfig(1, 2, 4)))
    assert (config.vocab_size, config.padded_vocab_size) == (97, 128)
    mesh = make_mesh(MeshConfig(1, 1, 8))  # 97 rows would not divide
    model = load_model(tmp_path / "out", mesh)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 30))
    tokens[0, :3] = 96
    positions = np.broadcast_to(np.arange(30), tokens.shape)
    with torch.no_grad():
        expected = extended(theirs)(torch.tensor(tokens)).logits.numpy()
    with jax.set_mesh(mesh):
        logits, _ = jax.jit(model.module.apply)(model.variables, tokens, positions)
    assert logits.shape == (2, 30, 128) and expected.shape == (2, 30, 97)
    assert np.abs(logits[..., :97] - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.isneginf(logits[..., 97:]).all()
    ours, torchs = jax.nn.log_softmax(logits)[..., :97], torch.tensor(expected).log_softmax(-1)
    np.testing.assert_allclose(ours, torchs, atol=1e-4 * np.abs(expected).max())
    names = ["embedding"] if tied else ["embedding", "kernel"]
    for name, leaf in zip(
        names, jax.tree.leaves([model.params.get(k) for k in ("embed_tokens", "lm_head")]), strict=True
    ):
        rows = np.asarray(leaf) if name == "embedding" else np.asarray(leaf).T
        np.testing.assert_allclose(rows[96], rows[:96].mean(0), rtol=1e-6, atol=1e-7)
        assert not rows[97:].any()

    tokenizer = model.tokenizer
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.special["pad"]) == (97, 96, ("[PAD]", 96))
    before = load_tokenizer(source / "tokenizer.model")
    assert tokenizer.encode("a [PAD] b") == before.encode("a [PAD] b") and before.pad_id == 0
    assert tokenizer.decode([tokenizer.pad_id]) == ""


def test_rows_of_padding_are_neither_trained_nor_drawn():
    config = dataclasses.replace(TINY, vocab_size=60, vocab_multiple=64, num_hidden_layers=1)
    params = initialize(Llama(config), jax.random.key(0), make_mesh(ONE))["params"]
    tokens = np.arange(20).reshape(2, 10)
    positions = np.broadcast_to(np.arange(10), tokens.shape)

    @jax.jit
    def loss(params):
        logits, _ = Llama(config).apply({"params": params}, tokens, positions)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1).mean(), logits

    gradient, logits = jax.grad(loss, has_aux=True)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    head = gradient["lm_head"]["kernel"]
    assert head.shape == (32, 64) and np.abs(head[:, :60]).min() > 0 and not head[:, 60:].any()
    drawn = jax.random.categorical(jax.random.key(0), logits[0, 0], shape=(20_000,))
    assert set(np.unique(drawn)) == set(range(60))


def test_what_already_has_padding_keeps_its_rows(checkpoint, pieces, tmp_path):
    """A tokenizer with a piece for padding, and a checkpoint that crystal-text-llm has extended before."""
    theirs, source = checkpoint()
    (source / "tokenizer.model").write_bytes(with_pad(pieces))
    with pytest.raises(UserError, match=r"tokenizer.model has 97 pieces, but the model has rows for 96"):
        convert(source, tmp_path / "none")
    extended(theirs).save_pretrained(source)
    for i, model in enumerate((with_pad(pieces), pieces)):
        (source / "tokenizer.model").write_bytes(model)
        config = convert(source, tmp_path / f"{i}", vocab_multiple=10)
        saved = load_model(tmp_path / f"{i}")
        assert (config.vocab_size, config.padded_vocab_size) == (97, 100)
        assert saved.tokenizer.file == with_pad(pieces) == with_pad(with_pad(pieces))
        np.testing.assert_array_equal(
            saved.params["embed_tokens"]["embedding"][:97], theirs.get_input_embeddings().weight.detach().numpy()
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [97, 128, 352])
def test_rows_that_pad_the_sources_vocabulary_are_never_drawn(rows, tied, checkpoint, tmp_path):
    """As a model whose vocabulary was resized to a multiple; the logits of the others are transformers'."""
    theirs, source = checkpoint(vocab_size=rows, tie_word_embeddings=tied)
    mesh = make_mesh(MeshConfig(1, 2, 4))
    config = convert(source, tmp_path / "ours", mesh, vocab_multiple=8)
    assert (config.vocab_size, config.padded_vocab_size) == (97, 104)
    model = load_model(tmp_path / "ours", mesh)
    assert model.config == config and model.tokenizer.vocab_size == 97
    assert convert(source, tmp_path / "bare", pad_token=False, vocab_multiple=1).padded_vocab_size == 96
    assert load_model(tmp_path / "bare").params["embed_tokens"]["embedding"].shape == (96, 32)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    with jax.set_mesh(mesh):
        logits, _ = jax.jit(model.module.apply)(model.variables, tokens, np.broadcast_to(np.arange(30), tokens.shape))
    assert np.abs(logits[..., :97] - expected[..., :97]).max() < 1e-4 * np.abs(expected).max()
    assert np.isneginf(logits[..., 97:]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (353, r"has 96 pieces, but the model has 353 rows, more than padding explains \(at most 256\); put the "),
        (95, r"has 96 pieces, but the model has rows for 95; it is another model's"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(rows, message, checkpoint, tmp_path):
    _, source = checkpoint(vocab_size=rows)
    with pytest.raises(UserError, match=rf"tokenizer.model {message}"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_llama2s_tokenizer_is_no_other_models(shared, checkpoint, tmp_path):
    sizes = dict(hidden_size=8, head_dim=2, intermediate_size=8, num_hidden_layers=1)
    for rows in (32000, 32001, 32064, 32256, 49152):
        _, source = checkpoint(vocab_size=rows, **sizes)
        shutil.copy(shared / "tokenizer" / "llama2" / "tokenizer.model", source)
        if rows == 49152:
            with pytest.raises(UserError, match="has 32000 pieces, but the model has 49152 rows"):
                convert(source, tmp_path / f"{rows}")
        else:
            config = convert(source, tmp_path / f"{rows}")
            assert (config.vocab_size, config.padded_vocab_size) == (32001, 32128)


def test_a_model_that_was_converted_with_a_logit_for_every_row_gets_none_for_them(checkpoint, tmp_path):
    """As version a3d077c converted: vocab_size was the rows', whatever pieces the tokenizer had."""
    _, source = checkpoint()
    convert(source, tmp_path / "ours", vocab_multiple=128)
    path = tmp_path / "ours" / "model.json"
    description = json.loads(path.read_text())
    description["model"]["vocab_size"] = 120
    path.write_text(json.dumps(description))
    model = load_model(tmp_path / "ours")
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (97, 128)
    tokens = np.ones((1, 3), int)
    logits, _ = model.module.apply(model.variables, tokens, np.arange(3)[None])
    assert np.isfinite(logits[..., :97]).all() and np.isneginf(logits[..., 97:]).all()
    shutil.copy(source / "tokenizer.model", tmp_path / "ours")
    description["model"]["vocab_size"] = 95
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"has 96 pieces, but the model has rows for 95"):
        load_model(tmp_path / "ours")


def test_the_host_holds_less_than_one_layer(checkpoint, tmp_path):
    """200 MB of weights; counted is what numpy allocates, which neither the devices' arrays nor mapped files are."""
    sizes = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12, head_dim=64)
    theirs, directory = checkpoint(**sizes, num_hidden_layers=7)
    torch.save(theirs.state_dict(), directory / "pytorch_model.bin")
    layer = sum(weight.nbytes for weight in theirs.model.layers[0].parameters())
    for stem in ("model.safetensors", "pytorch_model.bin"):
        assert (directory / stem).stat().st_size > 190e6
        for _ in range(2):  # the first time, what is compiled counts as well
            tracemalloc.start()
            params = dict(open_checkpoint(directory).load(make_mesh(MeshConfig(1, 2, 1))))
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert params["layers/mlp/up_proj/kernel"].nbytes == 7 * 768 * 2048 * 4
        assert 768 * 2048 * 4 < peak < layer
        (directory / stem).unlink()


def test_the_latest_step_of_a_run(tmp_path, tokenizer):
    run, text = tmp_path / "run", TextFormat(coord_decimals=4)
    unrolled = dataclasses.replace(TINY, scan_layers=False)  # training's way, not the model's
    describe(run, unrolled, LORA, text, tokenizer)
    first, last = (initialize(Llama(TINY, LORA), jax.random.key(i), make_mesh(ONE)) for i in range(2))
    save(run, 9, first)
    save(run, 10, last)
    model = load_model(run)
    assert (model.module.config, model.lora, model.text, model.step) == (TINY, LORA, text, 10)
    assert model.config == unrolled  # by which ledgers know it
    assert_equal(model.variables, last)
    assert model.module.apply(model.variables, np.ones((1, 3), int), np.arange(3)[None])[0].shape == (1, 3, 96)


def test_adapters_on_a_base_move_with_it(tmp_path, tokenizer, monkeypatch):
    base, run = tmp_path / "there" / "base", tmp_path / "there" / "runs" / "adapted"
    describe(base, TINY, None, TextFormat(), tokenizer)
    params = initialize(Llama(TINY), jax.random.key(0), make_mesh(ONE))
    save(base, 0, params)
    monkeypatch.chdir(tmp_path)
    describe(run, TINY, LORA, TextFormat(), tokenizer, base="there/base")
    adapters = initialize(Llama(TINY, LORA), jax.random.key(1), make_mesh(ONE), ["lora"])
    save(run, 5, adapters)
    assert_equal(load_model(run).variables, params | adapters)
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    assert_equal(load_model(tmp_path / "elsewhere" / "runs" / "adapted").variables, params | adapters)
    shutil.rmtree(tmp_path / "elsewhere" / "base")
    with pytest.raises(UserError, match=r"the base of .*adapted: .*elsewhere/base/checkpoints holds no checkpoint"):
        load_model(tmp_path / "elsewhere" / "runs" / "adapted")


def test_describing_again(tmp_path, tokenizer):
    run = tmp_path / "run"
    describe(run, TINY, LORA, TextFormat(), tokenizer)
    before = (run / "model.json").stat().st_mtime_ns
    describe(run, TINY, LORA, TextFormat(), tokenizer)
    assert (run / "model.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"already holds another model \(lora is .*'rank': 2.*'rank': 3"):
        describe(run, TINY, dataclasses.replace(LORA, rank=3), TextFormat(), tokenizer)


def test_directories_that_are_not_ours(checkpoint, tmp_path, tokenizer):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.tex' and no model.json"):
        describe(foreign, TINY, None, TextFormat(), tokenizer)
    _, source = checkpoint()
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        convert(source, foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    # Below a file no directory can be made, whoever asks; permissions would not stop a test that runs as root.
    with pytest.raises(UserError, match=r"cannot write the model directory .*Not a directory"):
        describe(foreign / "thesis.tex" / "run", TINY, None, TextFormat(), tokenizer)
    with pytest.raises(UserError, match=r"cannot write the directory .*thesis.tex"):
        convert(source, foreign / "thesis.tex" / "run")


def test_a_conversion_that_fails_leaves_nothing(checkpoint, full_disk, tmp_path):
    _, source = checkpoint()
    out = tmp_path / "models" / "out"
    out.parent.mkdir()
    (source / "tokenizer.model").rename(source / "tokenizer")
    with pytest.raises(
        UserError, match=r"has neither tokenizer.model nor tokenizer.json; put the model's tokenizer there"
    ):
        convert(source, out)
    (source / "tokenizer").rename(source / "tokenizer.model")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither model.safetensors"):
        convert(source, out)
    assert not list(out.parent.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(checkpoint, full_disk, tmp_path):
    _, source = checkpoint()
    out = tmp_path / "models" / "out"
    with full_disk(10_000), pytest.raises(UserError, match=r"cannot write the directory .*models/out") as error:
        convert(source, out)
    assert "\n" not in str(error.value) and not out.parent.exists()
    convert(source, out)


def test_what_a_link_leads_to_is_filled_and_what_a_kill_left_is_removed(tmp_path):
    """As on clusters, where a home's folder is a link to a large disk."""
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    (tmp_path / "disk/.out.99999.partial/checkpoints").mkdir(parents=True)
    (tmp_path / "disk/.out.other.99999.partial").mkdir()  # of an output called out.other, which may be being written
    with written_whole(tmp_path / "out") as partial:
        (partial / "x").write_text("whole")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/out/x").read_text() == "whole"
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"out", ".out.other.99999.partial"}


def test_what_cannot_be_read_is_no_fault_of_the_directory_that_is_written(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read /there/x: Permission denied$"), written_whole(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", "/there/x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_with_the_verb_that_makes_it(tmp_path, tokenizer):
    with pytest.raises(
        UserError, match=r"nowhere is not a model directory: model.json: No such file.*`jaxcrystal convert`"
    ):
        load_model(tmp_path / "nowhere")
    run = tmp_path / "run"
    describe(run, TINY, None, TextFormat(), tokenizer)
    with pytest.raises(UserError, match=r"run/checkpoints holds no checkpoint; .*`jaxcrystal train`"):
        load_model(run)
    (run / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"run is not complete: it has no tokenizer"):
        load_model(run)
    (run / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"model.json is not valid JSON"):
        load_model(run)


def test_a_checkpoint_that_does_not_fit_is_told_parameter_by_parameter(tmp_path, tokenizer):
    run = tmp_path / "run"
    describe(run, dataclasses.replace(TINY, vocab_multiple=50, tie_word_embeddings=True), None, TextFormat(), tokenizer)
    save(run, 0, initialize(Llama(TINY), jax.random.key(0), make_mesh(ONE)))
    with pytest.raises(UserError) as error:
        load_model(run)
    assert str(error.value).split("\n  ")[1:] == [
        "params/embed_tokens/embedding: expected [100, 32], found [96, 32]",
        "params/lm_head/kernel: expected nothing, found [32, 96]",
    ]


@pytest.mark.parametrize("damage", ["data", "metadata"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path, tokenizer):
    run = tmp_path / "run"
    describe(run, TINY, None, TextFormat(), tokenizer)
    save(run, 3, initialize(Llama(TINY), jax.random.key(0), make_mesh(ONE)))
    weights = run / "checkpoints" / "3" / "weights"
    if damage == "metadata":
        (weights / "_METADATA").write_text(json.dumps({})[:1])
    else:
        for path in weights.rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*checkpoints/3/weights: .*remove it"):
        load_model(run)
