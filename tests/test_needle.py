"""The reference system's parts, tiny: data, model, training, haystacks, what is counted, pictures, the command."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ringmoe

pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("matplotlib")
import itertools

from rich.console import Console

from ringmoe.demo import placement
from ringmoe.needle import command, data, evaluate, experts, machines, model, picture, positions, train
from ringmoe.needle.haystack import OWN, Reader, merged

TINY = model.Config(
    num_local=1,
    num_global=1,
    model_dim=16,
    num_heads=2,
    local_head_dim=8,
    global_head_dim=8,
    window=8,
    expert_hidden_dim=8,
    router=ringmoe.RouterConfig(num_experts=4, noise="learned"),
)
LESSON = data.Lesson(2, 128, 48)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def params():
    return jax.jit(model.init, static_argnums=1)(jax.random.key(0), TINY)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))


def test_symbols_differ_in_every_form():
    for table in (data.glyphs(), data.chords()):
        symbols = table[33:127]
        apart = np.sum((symbols[:, None] - symbols[None]) ** 2, -1) + 9 * np.eye(len(symbols))
        assert apart.min() > (8 * data.NOISE) ** 2 * 0.9
        assert not table[data.NOTHING].any()


def test_what_is_rendered_shows_its_symbol():
    rng = np.random.default_rng(0)
    stretch = data.Stretch(np.repeat([0, 1, 2], 26).astype(np.int8), np.tile(data.LETTERS, 3))
    tokens = data.render(stretch, rng)
    np.testing.assert_array_equal(tokens.byte, np.where(stretch.kind == 0, stretch.symbol, 0))
    assert not tokens.signal[:26].any()
    for kind, table in ((1, data.glyphs()), (2, data.chords())):
        shown = tokens.signal[kind * 26 : (kind + 1) * 26]
        alike = shown @ table.T / np.maximum(np.linalg.norm(table, axis=1), 1)
        assert np.mean(np.argmax(alike[:, data.LETTERS], 1) == np.arange(26)) > 0.9


def test_a_lesson_asks_what_its_context_holds():
    for seed in range(8):
        example = data.batch(data.Lesson(1, 256, 96, cipher=0, chain=0.5), seed)
        (targets,), kind, byte = example.targets, example.tokens.kind[0], example.tokens.byte[0]
        context = bytes(np.where(kind == 0, byte, np.maximum(example.shown[0], 0)).astype(np.uint8))
        room = context[-96:]
        asked = np.flatnonzero(targets >= 0)
        assert len(asked) and all(targets[i] == room[i + 1] for i in asked if i + 1 < 96)
        for line in room.split(b"\n?")[1:-1]:
            links = line[: line.index(b".")].split(b":")
            assert all(data.fact(*pair) in context[:-96] for pair in itertools.pairwise(links))


def test_a_batch_is_the_seed_s():
    one, again, other = (data.batch(LESSON, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (one.tokens.byte != other.tokens.byte).any()


def test_decoys_are_no_facts():
    rng = np.random.default_rng(0)
    decoys = [data.decoy(b"@KQZR:481.", rng) for _ in range(50)]
    assert all(b"@" not in one and len(one) <= data.CELL for one in decoys)
    assert any(b"KQZR:" in one for one in decoys) and len(set(decoys)) == 50
    lesson = data.Lesson(1, 256, 96, cipher=0, decoys=1.0)
    kind, shown = (x[0] for x in (data.batch(lesson, 0).tokens.kind, data.batch(lesson, 0).shown))
    plain = data.batch(dataclasses.replace(lesson, decoys=0.0), 0)
    assert (kind == 0).sum() and (shown != plain.shown[0]).any()


def test_values_begin_alike():
    """Else two digits would tell the third in a short context, and in a long one they don't."""
    rng = np.random.default_rng(0)
    same = [sum(a == b for a, b in zip(data.begun(b"481", rng), b"481")) for _ in range(200)]
    assert set(same) == {0, 1, 2, 3}
    assert all(bytes([c]) in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ" for c in data.begun(b"KQZR", rng))
    facts, _ = data.recall(24, 1, rng)
    begins = [one[6:8] for one in facts]
    assert len(set(begins)) < len(begins)


def test_lookalikes_are_in_the_library():
    text = data.text().tobytes()
    for start in data.lookalikes()[:: len(data.lookalikes()) // 20]:
        four = text[start : start + 4]
        assert four.isalpha() and four.isupper()


def test_noise_is_the_lesson_s():
    lesson = data.Lesson(1, 256, 96)
    loud, quiet = (data.batch(dataclasses.replace(lesson, noise=noise), 0) for noise in (1.0, 0.0))
    spread = np.std((loud.tokens.signal - quiet.tokens.signal)[quiet.tokens.kind > 0])
    assert spread == pytest.approx(1, abs=0.05)


def test_a_cipher_is_a_permutation_in_its_dictionary():
    cells, asked = data.cipher(np.random.default_rng(0), 4)
    meaning = {cell[i + 1]: cell[i + 3] for cell in cells for i in range(0, len(cell), 5)}
    assert sorted(meaning) == sorted(meaning.values()) == sorted(data.LOWER)
    for one in asked:
        assert bytes(meaning[letter] for letter in one.question[2:-1]) == one.answer[: data.WORD]


def test_no_token_sees_the_next(params):
    config = dataclasses.replace(TINY, num_global=1)
    tokens = data.batch(LESSON, 0).tokens
    changed = jax.tree.map(np.copy, tokens)
    changed.kind[:, 100], changed.byte[:, 100] = 0, tokens.byte[:, 100] ^ 1
    run = jax.jit(model.forward, static_argnums=(2, 3))
    one, two = (run(params, t, 48, config)[0] for t in (tokens, changed))
    np.testing.assert_allclose(one[:, :20], two[:, :20], atol=1e-5)
    assert np.abs(one[:, 20:] - two[:, 20:]).max() > 1e-3


def test_the_halo_is_all_that_keys_and_values_depend_on(params):
    tokens = jax.tree.map(lambda x: x[:1], data.batch(LESSON, 0).tokens)
    local = lambda t: model.local_layers(params, model.embed(params, t), TINY)[0]
    run = jax.jit(lambda t: model.keys_values(params, local(t), jnp.arange(t.kind.shape[1]), TINY))
    whole, cut = run(tokens), run(jax.tree.map(lambda x: x[:, 50:], tokens))
    apart = np.max([np.abs(a[0, 50:] - b[0]).max((-1, -2)) for a, b in zip(whole, cut)], 0)
    assert apart[TINY.halo :].max() < 1e-5
    assert apart[: TINY.halo].max() > 1e-3


def test_shares_of_a_softmax_merge():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, n, 1, 8)).astype(np.float32) for n in (3, 20, 20))
    attend = lambda *a: ringmoe.dot_product_attention(*a, return_residual=True)
    parts = merged(attend(q, k[:, :13], v[:, :13]), attend(q, k[:, 13:], v[:, 13:]))
    np.testing.assert_allclose(parts, attend(q, k, v)[0], atol=1e-6)


@pytest.mark.sampled
@pytest.mark.parametrize("base", [None, 10_000.0])
def test_chunks_and_shards_give_the_dense_logits(params, mesh, base):
    config = dataclasses.replace(TINY, global_rope_base=base)
    found = machines.agreement(config, params, mesh, length=512, chunk=64, seed=0, count=3)
    assert found.largest > 0.01
    assert max(found.chunks, found.sharded, found.devices) < 1e-4


def test_distances_are_the_same_after_ten_million_tokens():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    turned = lambda x, at: np.asarray(model.rope(x, jnp.array([at]), 100.0))[0, 0, 0]
    for distance in (0, 1, 31):
        near, far = (turned(query, at + distance) @ turned(key, at) for at in (0, 10 * 2**20))
        np.testing.assert_allclose(near, far, atol=1e-5)
    frequency = 100.0 ** -(np.arange(8) / 8)
    x = np.asarray(query)[0, 0, 0]
    expected = x[:8] * np.cos(5 * frequency) - x[8:] * np.sin(5 * frequency)
    np.testing.assert_allclose(turned(query, 5)[:8], expected, atol=1e-5)


def test_a_cache_is_read_in_any_chunks(params):
    stretch = data.haystack(300, 1, np.random.default_rng(0))
    reader = Reader(TINY, 512, 128)
    pieces = list(reader.chunks(stretch, np.random.default_rng(1)))
    assert [first + skip for first, skip, _ in pieces] == [0, 128, 128 + 128 - TINY.halo]
    for (_, _, before), (_, skip, after) in itertools.pairwise(pieces):
        np.testing.assert_array_equal(after.signal[:, :skip], before.signal[:, -skip:])
    _, context = reader.prefill(params, reader.empty(), stretch, np.random.default_rng(1))
    assert context.length == 300
    assert len(context.end.kind) == TINY.halo + OWN
    assert reader.cache_bytes(300) == 300 * 2 * 8 * 2


def test_facts_lie_at_their_depths_and_are_asked_once():
    stretch = data.haystack(4096, 2, np.random.default_rng(0))
    asked = evaluate.hide(stretch, 2, 3, np.random.default_rng(1))
    symbols = stretch.symbol.tobytes()
    assert len(asked) == evaluate.DEPTHS * 3 * 2 + 2 * 3
    assert len({question.question for _, question in asked}) == len(asked)
    for known, question in asked:
        key = question.question[2:-1]
        at = symbols.index(b"@" + key + b":")
        if known["links"] == 1:
            assert symbols[at:].startswith(data.fact(key, question.answer[:-1]))
            assert -0.1 < at * evaluate.DEPTHS / 4096 - known["depth"] < 1.1
            assert model.KINDS[stretch.kind[at]] == known["needle"]
        else:
            links = [key, *question.answer[:-1].split(b":")]
            assert len(links) == known["links"] + 1
            assert all(data.fact(*pair) in symbols for pair in itertools.pairwise(links))


def test_recall_is_counted_from_what_is_said(params, monkeypatch):
    reader = Reader(TINY, 2048, 512)
    monkeypatch.setattr(Reader, "ask", lambda self, *a: [q.answer if i % 2 else b"?" for i, q in enumerate(a[-1])])
    lines = []
    done, costs = evaluate.measure(reader, params, (1024,), 1, 0, lines.append, kinds=(0,))
    assert evaluate.counted(t.right for t in done) == f"{len(done) // 2}/{len(done)}"
    assert all(t.right == (t.said == t.expected) for t in done)
    assert lines[0].startswith("     1,024 tokens of text : 15/30 facts")
    assert costs[0].cache_bytes == reader.cache_bytes(1024)


def test_an_untrained_model_knows_nothing(params):
    done, _ = evaluate.measure(Reader(TINY, 1024, 512), params, (1024,), 1, 0, kinds=(1,))
    assert sum(t.right for t in done) <= 1
    (given, withheld) = evaluate.translate(Reader(TINY, 1024, 512), params, (1024,), 1, 4, 0)
    assert (given.dictionary, withheld.dictionary) == (True, False)
    assert given.letters == 4 * data.WORD and given.right < 6


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (0, 0, 0, 1), (45, 50, 0.7864, 0.9565)]
)
def test_wilson_s_interval(right, count, low, high):
    np.testing.assert_allclose(evaluate.wilson(right, count), (low, high), atol=1e-3)


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CURRICULUM", (((LESSON,), 1.0),))
    monkeypatch.setattr(train, "EVERY", 2)
    start = lambda: train.init_state(0, TINY, 4)
    whole, reports = train.fit(start(), TINY, 4, None, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(data, "batch", lambda lesson, i, make=data.batch: make(lesson, i) if i < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.fit(start(), TINY, 4, tmp_path, QUIET)
    resumed, rest = train.fit(start(), TINY, 4, tmp_path, QUIET)
    assert (len(reports), len(rest)) == (4, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole.params, resumed.params)
    assert reports[-1]["loss"] < reports[0]["loss"] + 0.1


def test_a_loss_that_is_not_finite_stops_training(monkeypatch):
    monkeypatch.setattr(train, "CURRICULUM", (((LESSON,), 1.0),))
    state = train.init_state(0, TINY, 4)
    state.params["unembedding"] = state.params["unembedding"] * math.nan
    with pytest.raises(train.Diverged, match="the loss of step 0 is nan"):
        train.fit(state, TINY, 4, None, QUIET)


def test_lessons_follow_the_curriculum():
    shares = sum(share for _, share in train.CURRICULUM)
    assert shares == pytest.approx(1)
    assert train.lesson_of(0, 1000) == train.CURRICULUM[0][0][0]
    assert {train.lesson_of(i, 1000) for i in (998, 999)} == set(train.CURRICULUM[-1][0])
    assert train.LONGEST == 2048


def test_weights_are_kept_in_a_plain_file(params, tmp_path):
    train.save(tmp_path / "weights.npz", params)
    loaded = train.load(tmp_path / "weights.npz", TINY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), params, loaded)
    with pytest.raises(train.NotWeights, match=r"arrays are not this model's, first .* train anew"):
        train.load(tmp_path / "weights.npz", dataclasses.replace(TINY, model_dim=32))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken"])
def test_a_file_of_something_else_is_told(tmp_path, content):
    (tmp_path / "odd.npz").write_bytes(content)
    with pytest.raises(train.NotWeights, match="is no NumPy archive"):
        train.load(tmp_path / "odd.npz", TINY)


def test_the_weights_that_come_along_are_of_this_model():
    assert command.WEIGHTS.stat().st_size < 5e6
    params = train.load(command.WEIGHTS, model.Config())
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))


def test_which_experts_serve_which_modality(params):
    found = experts.served(params, TINY, tokens=256)
    assert found.load.shape == (TINY.num_local, 3, 4)
    np.testing.assert_allclose(found.load.sum(-1), 1, rtol=1e-5)
    assert ((found.dropped >= 0) & (found.dropped < 1)).all()


def test_balance_is_measured_with_and_without_its_remedies(monkeypatch):
    monkeypatch.setattr(train, "CURRICULUM", (((LESSON,), 1.0),))
    monkeypatch.setattr(experts, "variants", lambda config, all=experts.variants: dict(list(all(config).items())[2:]))
    found = experts.balance(TINY, 1, 0, QUIET)
    assert [one.what for one in found] == ["noise alone", "neither"]
    assert all(one.busiest >= 1 and 0 <= one.dropped < 1 for one in found)


def test_positions_are_compared(monkeypatch):
    monkeypatch.setattr(positions, "CURRICULUM", (((LESSON,), 1.0),))
    monkeypatch.setattr(
        positions, "variants", lambda config, all=positions.variants: dict(list(all(config).items())[1:])
    )
    found = positions.compare(TINY, 1, (1024,), 1, 0, QUIET)
    assert [(one.what, one.length, one.asked) for one in found] == [
        ("no positions", 1024, 10),
        ("RoPE, log n", 1024, 10),
    ]
    assert all(one.right < 3 for one in found)


def test_variants_of_positions_differ_in_global_layers():
    made = list(positions.variants(TINY).values())
    assert [(v.temperature, v.global_rope_base is None) for v in made] == [(True, True), (False, True), (True, False)]


def test_pictures_are_written(tmp_path):
    trials = [
        evaluate.Trial(kind, needle, length, depth, 1, depth != 3, "", "")
        for kind in model.KINDS for needle in model.KINDS for length in (1024, 2**20) for depth in range(10)
    ]  # fmt: skip
    picture.heat_map(tmp_path / "recall.png", trials, 2048)
    picture.cipher(
        tmp_path / "cipher.png", [evaluate.Translated(1024, given, 9, 3, 3, 0) for given in (True, False)], 2048
    )
    picture.experts(tmp_path / "experts.png", np.full((2, 3, 4), 0.25), np.zeros((2, 3)))
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [picture.named(n) for n in (1024, 2**20, 10 * 2**20)] == ["1K", "1M", "10M"]


def test_programs_are_partitioned(mesh):
    for name, (program, args, keywords) in machines.programs(TINY, mesh, 1024, 256).items():
        assert program.lower(*args, **keywords) is not None, name


def test_the_command_measures_and_writes(monkeypatch, tmp_path, capsys, params):
    monkeypatch.setattr(model, "Config", lambda: TINY)
    monkeypatch.setattr(placement, "use_cpu_devices", lambda: None)
    train.save(tmp_path / "weights.npz", params)
    words = ["--weights", str(tmp_path / "weights.npz"), "--lengths", "1024", "--trials", "1", "--out", str(tmp_path)]
    assert command.main([*words, "--parts", "recall", "--devices", "1"]) == 0
    assert "one fact" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["trials"]) == 3 * 32
    assert (tmp_path / "recall.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0, expected at least 1"),
        (["--devices", "9"], "--devices 9, expected 1 to 8"),
        (["--trials", "0"], "--trials 0, expected at least 1"),
        (["--lengths", "4096", "64"], "--lengths 64, expected at least 1024"),
        (["--weights", "nowhere.npz"], "--weights nowhere.npz, expected a file"),
    ],
)
def test_bad_arguments_are_told(capsys, words, message):
    with pytest.raises(SystemExit):
        command.parse(words)
    assert message in capsys.readouterr().err


def test_only_the_caller_s_mistakes_lose_their_traceback(capsys, tmp_path, monkeypatch):
    (tmp_path / "odd.npz").write_bytes(b"text")
    words = ["--weights", str(tmp_path / "odd.npz"), "--out", str(tmp_path)]
    monkeypatch.setattr(placement, "use_cpu_devices", lambda: None)
    assert command.main(words) == 1
    assert "ringmoe needle failed:" in capsys.readouterr().out
    monkeypatch.setattr(train, "load", lambda *a: (_ for _ in ()).throw(ValueError("a fault of ours")))
    with pytest.raises(ValueError, match="a fault of ours"):
        command.main(words)
    monkeypatch.setattr(placement, "use_cpu_devices", lambda: (_ for _ in ()).throw(RuntimeError("[too] late")))
    assert command.main(words) == 1
    assert "ringmoe needle failed: [too] late" in capsys.readouterr().out


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['orbax'] = None; sys.modules['orbax.checkpoint'] = None; import ringmoe.needle.command"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'ringmoe[examples]'" in done.stderr
