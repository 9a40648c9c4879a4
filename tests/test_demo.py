"""The demo's parts: model, text, placement, checks and picture. The whole program is `make demo`."""

import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringmoe

optax = pytest.importorskip("optax")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from ringmoe.demo import check, data, machines, model, picture, placement, train  # noqa: E402

TINY = dataclasses.replace(
    model.Config(),
    num_layers=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    hidden_dim=48,
    expert_hidden_dim=32,
    router=ringmoe.RouterConfig(num_experts=4, top_k=2, group_size=64, noise="learned"),
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(model.init, static_argnums=1)(jax.random.key(0), TINY)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small tree of sources: 32 files to be read, and two that are not the library's own."""
    root = tmp_path_factory.mktemp("stdlib")
    for i in range(32):
        (root / f"module{i:02}.py").write_bytes(bytes([64 + i]) * 100)
    for folder in ("test", "site-packages"):
        (root / folder).mkdir()
        (root / folder / "other.py").write_bytes(b"~" * 100)
    return root


def test_the_full_size_model_is_what_the_demo_promises():
    config = model.Config()
    shapes = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    experts = [layer["experts"]["in"].shape for layer in shapes["layers"] if "experts" in layer]
    assert len(shapes["layers"]) == 4
    assert [config.has_experts(i) for i in range(4)] == [False, True, False, True]
    assert experts == [(8, config.model_dim, config.expert_hidden_dim)] * 2
    assert config.router.top_k == 2
    assert train.SEQUENCE_LENGTH >= 4096
    assert config.router.noise == "learned"
    # Without experts, equal work for each byte.
    assert config.hidden_dim == config.router.top_k * config.expert_hidden_dim


def test_shapes_and_loss_at_init(params):
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, 256)
    logits, metrics = jax.eval_shape(lambda: model.forward(params, tokens, TINY))
    assert logits.shape == (2, 64, 256)
    assert logits.dtype == jnp.float32
    assert len(metrics) == 1
    total, report = jax.jit(model.loss, static_argnums=3)(params, tokens, tokens, TINY, jax.random.key(2))
    assert report["loss"] == pytest.approx(math.log(256), abs=0.1)
    assert report["expert_load"].shape == (1, 4)
    assert report["expert_load"].sum() == 2 * 64 * 2
    assert total > report["loss"]


def test_no_byte_sees_the_next(params):
    # Dropless: how full an expert is must not tell of later bytes either.
    config = dataclasses.replace(TINY, router=dataclasses.replace(TINY.router, capacity_factor=None))
    tokens = np.random.default_rng(0).integers(0, 255, (2, 64))
    tokens[1] = tokens[0]
    tokens[1, 40] += 1
    one, two = jax.jit(model.forward, static_argnums=2)(params, tokens, config)[0]
    np.testing.assert_allclose(one[:40], two[:40], atol=1e-5)
    assert np.abs(one[40] - two[40]).max() > 1e-3
    assert np.abs(one[41:] - two[41:]).max() > 1e-4


def test_rope_keeps_lengths_and_knows_only_distances():
    key, query = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    rope = jax.jit(model.rope)
    keys, queries = (np.asarray(rope(np.tile(x, (1, 32, 1, 1)), 10_000.0))[0, :, 0] for x in (key, query))
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), np.linalg.norm(key), rtol=1e-5)
    np.testing.assert_allclose(keys[0], key[0, 0, 0], rtol=1e-6)
    scores = queries @ keys.T
    for distance in (0, 1, 7, -5):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)
    assert abs(scores[7, 0] - scores[0, 0]) > 1e-3


def test_rms_norm_ignores_scale():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    y = model.rms_norm(x, jnp.ones(8))
    np.testing.assert_allclose(jnp.mean(y * y, -1), 1, rtol=1e-4)
    np.testing.assert_allclose(model.rms_norm(1000 * x, jnp.ones(8)), y, rtol=1e-4)


def test_a_few_steps_on_one_device_reduce_the_loss():
    optimizer = train.make_optimizer(8, peak=2e-2)
    state = jax.jit(lambda: train.init_state(0, TINY, optimizer))()
    step = jax.jit(train.make_train_step(TINY, optimizer))
    text = np.frombuffer(b"for x in range(10): print(x)\n" * 9, np.uint8)[:257].reshape(1, 257).astype(np.int32)
    losses = []
    for _ in range(8):
        state, report = step(state, text[:, :-1], text[:, 1:])
        losses.append(float(report["loss"]))
    assert losses[0] == pytest.approx(math.log(256), abs=0.15)
    assert losses[-1] < losses[0] - 1


def test_windows_are_the_sources_in_order_and_overlap_by_one_byte(sources):
    assert len(data.source_files(sources)) == 32
    corpus = data.load(50, sources)
    windows = corpus.train
    assert windows.dtype == np.uint8
    assert windows.shape[1] == 51
    np.testing.assert_array_equal(windows[:-1, -1], windows[1:, 0])
    assert windows[0, 0] == 64
    assert not np.isin(windows, ord("~")).any()


def test_heldout_files_are_in_no_training_window(sources):
    corpus = data.load(50, sources)
    newline = {ord("\n")}
    assert set(np.unique(corpus.train)).isdisjoint(set(np.unique(corpus.heldout)) - newline)
    assert set(np.unique(corpus.heldout)) - newline == {64 + 15, 64 + 31}


def test_batches_repeat_by_seed_and_visit_every_window_once():
    windows = np.arange(12, dtype=np.uint8)[:, None]

    def epoch(seed):
        return np.concatenate([batch[:, 0] for batch, _ in zip(data.batches(windows, 3, seed), range(4), strict=False)])

    np.testing.assert_array_equal(epoch(0), epoch(0))
    assert not np.array_equal(epoch(0), epoch(1))
    assert sorted(epoch(0)) == list(range(12))


def test_too_little_text_is_told(tmp_path):
    with pytest.raises(ValueError, match="0 source files under"):
        data.load(10, tmp_path)
    with pytest.raises(ValueError, match="expected at least batch_size=2"):
        next(data.batches(np.zeros((1, 5), np.uint8), 2, 0))


def test_the_standard_library_is_enough_text():
    corpus = data.load(train.SEQUENCE_LENGTH)
    assert len(corpus.train) > 500
    assert len(corpus.heldout) >= 8


def test_experts_are_divided_and_the_rest_is_everywhere(params):
    mesh = jax.sharding.AbstractMesh(placement.MESH_SHAPE, placement.AXES)
    state = train.State(params, jax.eval_shape(train.make_optimizer(2).init, params), jnp.int32(0))
    placed = jax.tree_util.tree_leaves_with_path(placement.state_shardings(state, mesh))
    divided = {jax.tree_util.keystr(path) for path, sharding in placed if sharding.spec != jax.sharding.PartitionSpec()}
    assert sum("experts" in path for path in divided) == len(divided) == 3 * 3  # weights and both of Adam's moments


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails(loss):
    check.check_finite(1, 5.0)
    with pytest.raises(check.CheckFailed, match="step 3"):
        check.check_finite(3, loss)


def test_a_loss_above_the_bound_fails():
    assert check.check_loss([5.0, 2.5, 2.5], window=2) == 2.5
    for losses in ([3.0], [5.0, math.nan], []):
        with pytest.raises(check.CheckFailed, match="--steps"):
            check.check_loss(losses)


def test_experts_have_to_be_worth_their_while():
    few, many = [0.01] * 3, [0.01, 0.05, 0.05]
    assert "with experts 2.500 nats per byte, without 2.600; 1.00%" in check.check_experts([2.5] * 3, [2.6] * 3, few)
    for losses, drops in (([2.7] * 3, few), ([2.5] * 3, many), ([math.nan] * 3, few)):
        with pytest.raises(check.CheckFailed, match=r"with experts the loss is .* --steps"):
            check.check_experts(losses, [2.6] * 3, drops, window=2)


def test_a_dense_model_has_no_experts_and_trains():
    config = dataclasses.replace(TINY, router=None)
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), config)
    assert not any("experts" in layer for layer in params["layers"])
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, 256)
    total, report = jax.jit(model.loss, static_argnums=3)(params, tokens, tokens, config, jax.random.key(2))
    assert set(report) == {"loss"} and total == report["loss"]


def test_noise_is_for_training_alone(params):
    tokens = np.random.default_rng(0).integers(0, 255, (2, 64))
    run = jax.jit(model.forward, static_argnums=2)
    calm, again, noisy, other = (
        run(params, tokens, TINY, key)[0] for key in (None, None, *jax.random.split(jax.random.key(0)))
    )
    np.testing.assert_array_equal(calm, again)
    assert (calm != noisy).any() and (noisy != other).any()


@pytest.mark.parametrize("error", [2e-4, math.nan])
def test_logits_that_differ_fail(error):
    dense, targets = np.zeros((1, 2, 4), np.float32), np.zeros((1, 2), np.int32)
    assert check.compare(dense + np.float32(5e-5), dense, targets, 1.0).heldout_loss == pytest.approx(math.log(4))
    wrong = dense.copy()
    wrong[0, 1, 2] = error
    with pytest.raises(check.CheckFailed, match="expected at most 1e-04"):
        check.compare(wrong, dense, targets, 1.0)


def test_the_clearest_sequences_are_compared(params):
    sequences = np.random.default_rng(0).integers(0, 256, (4, 65)).astype(np.int32)
    margins = np.asarray(jax.jit(check.routing_margin, static_argnums=2)(params, sequences[:, :-1], TINY))
    chosen, margin = check.clearest(params, sequences, 2, TINY)
    best = np.argsort(-margins)[:2]
    np.testing.assert_array_equal(chosen, sequences[best])
    assert margin == pytest.approx(margins[best].min(), rel=1e-2)
    assert 0 < margin < 1


def test_a_failed_check_is_told_and_exits_with_1(monkeypatch, capsys, tmp_path):
    def run(arguments, console):
        raise check.CheckFailed("the loss is [too] high")

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(placement, "use_cpu_devices", lambda: None)
    assert train.main(["--out", str(tmp_path)]) == 1
    assert "demo failed: the loss is [too] high" in capsys.readouterr().out


def test_too_few_devices_are_told(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setattr(jax, "devices", lambda: [jax.local_devices()[0]])
    for name in placement._ENVIRONMENT:
        monkeypatch.setenv(name, "")  # put back afterwards
    assert train.main([]) == 1
    assert "demo failed: JAX has 1 cpu devices, the demo needs 8" in capsys.readouterr().out


def test_bad_arguments_and_help(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--steps", "0"])
    assert exit.value.code == 2
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--steps", "--out", "--seed", "--no-targets"))


@pytest.mark.parametrize("missing", ["optax", "matplotlib"])
def test_a_missing_extra_is_named(missing):
    # A module that is None in sys.modules is one that isn't installed; the ops are not needed to find that out.
    code = f"import sys; sys.modules[{missing!r}] = None; import ringmoe.demo.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'ringmoe[examples]'" in done.stderr
    assert missing in done.stderr


@pytest.mark.parametrize("steps", [1, 30])
def test_the_picture_is_written(tmp_path, steps):
    load = np.random.default_rng(0).integers(1, 100, (steps, 2, 8))
    path = tmp_path / "demo.png"
    picture.save(
        path, np.linspace(5.5, 2.5, steps), np.full(steps, 0.1), load, np.linspace(5.5, 2.6, steps), check.LOSS_BOUND
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_summary_counts_the_collectives_of_a_schedule():
    mesh = placement.make_mesh(jax.devices("cpu"))
    spec = jax.sharding.PartitionSpec
    total = jax.shard_map(lambda x: jax.lax.psum(x, "seq"), mesh=mesh, in_specs=spec("seq"), out_specs=spec())
    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=jax.sharding.NamedSharding(mesh, spec("seq")))
    line = machines.summary(jax.jit(total).lower(x).compile(), "cpux8", mesh)
    assert line.startswith("1 all-reduce;") and "% of that exposed" in line and "MiB" in line
