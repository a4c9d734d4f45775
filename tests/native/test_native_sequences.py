"""Several sequences in a context: each of them is computed as if it were alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from razor_local.model_file import ModelFile
from razor_local.plan import make_plan
from razor_local.profile import Profile, split_heads
from tests.support import arch_models, arch_runs, reference, runner
from tests.support.native_cases import FLASH_F32
from tests.support.sequences import N_CTX_SEQ, N_SEQ, TOLERANCE, Sequences, make_texts
from tests.support.tiny_models import TinySpec

SPEC = TinySpec("llama", 3, 4, 2, 32, seed=31, sharpness=1.0)
MASK = ((0, 1), (0, 0), (1, 0))

PLANS = {
    "window-24": runner.override(reference.make_razor(MASK, 24)),
    "no retrieval heads": runner.override(reference.make_razor(((0, 0),) * 3, 40)),
    "no compensation": runner.override(reference.make_razor(MASK, 30, compensation=False)),
    "several windows": runner.override(
        reference.make_scoped(((24, 0), (130, 60), (60, 24)), N_CTX_SEQ)
    ),
}
PLAN = PLANS["window-24"]
SPLIT = runner.override(
    reference.make_razor(MASK, 24), type_k_local="q8_0", type_v_local="q8_0"
)  # local heads have tensors of their own


@pytest.fixture(scope="module")
def model(tiny) -> Iterator[runner.Model]:
    with runner.Model(tiny(SPEC)) as model:
        yield model


@pytest.fixture(scope="module")
def texts(model):
    return make_texts(model, PLAN)


@pytest.mark.parametrize("flash_attn", FLASH_F32)
@pytest.mark.parametrize("plan", PLANS)
def test_sequences_are_computed_as_if_alone(plan: str, flash_attn: bool, model) -> None:
    """Four sequences of different lengths, in batches that mix them at random."""
    texts = make_texts(model, PLANS[plan], flash_attn=flash_attn)
    with Sequences(model, PLANS[plan], texts, flash_attn=flash_attn) as seqs:
        stats = seqs.ctx.stats()
        assert (stats.active, stats.n_stream, stats.n_ctx) == (1, N_SEQ, N_CTX_SEQ)
        assert seqs.fill([500, 130, 0, 330]) <= TOLERANCE
        assert seqs.lengths() == [500, 130, 0, 330]
        back = [seqs.ctx.seq(s).n_rollback for s in range(N_SEQ)]
        lowest = [max(n - k, 1) - 1 for n, k in zip(seqs.held, back, strict=True)]
        assert [seqs.ctx.pos_min(s) for s in range(N_SEQ)] == [*lowest[:2], -1, lowest[3]]
        assert [seqs.ctx.seq(s).n_tokens for s in range(N_SEQ)] == seqs.held
        folded = [seqs.ctx.seq(s).n_folded for s in range(N_SEQ)]
        assert folded[2] == 0 < folded[1] < folded[3] < folded[0]
        assert seqs.decode([2] * 90) <= TOLERANCE
        for _ in range(5):
            assert seqs.decode([3, 1, 0, 2]) <= TOLERANCE


@pytest.mark.parametrize("flash_attn", FLASH_F32)
@pytest.mark.parametrize("plan", PLANS)
def test_sequences_share_ubatches(plan: str, flash_attn: bool, model) -> None:
    """A token of each sequence at a time, while each of them folds at another time."""
    texts = make_texts(model, PLANS[plan], flash_attn=flash_attn)
    n_ubatches = 0

    @runner.bindings().ggml_backend_sched_eval_callback
    def count(pointer: int, ask: bool, data: object) -> bool:
        nonlocal n_ubatches
        n_ubatches += ask and name_of(pointer) == b"result_output"
        return False

    name_of = runner.bindings()._lib.ggml_get_name
    name_of.argtypes, name_of.restype = [ctypes.c_void_p], ctypes.c_char_p
    with Sequences(model, PLANS[plan], texts, flash_attn=flash_attn, cb_eval=count) as seqs:
        seqs.fill([150, 140, 300, 60])
        for _ in range(80):
            n_ubatches = 0
            assert seqs.decode([0, 1, 2, 3]) <= TOLERANCE
            assert n_ubatches == 1
        for order in ([0] * 5 + [1] * 7 + [2] * 5 + [3] * 9, [1] * 60 + [2] * 60):
            assert seqs.decode(order) <= TOLERANCE


def test_more_sequences_than_an_ubatch_holds(model, texts) -> None:
    """Up to eight of them share an ubatch."""
    with Sequences(model, PLAN, texts, 11) as seqs:
        assert seqs.fill([20 * s for s in range(11)]) <= TOLERANCE
        for _ in range(70):
            assert seqs.decode(range(11)) <= TOLERANCE
        assert seqs.decode([s for s in range(11) for _ in range(s + 1)]) <= TOLERANCE


def test_statistics_of_no_sequence(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        with pytest.raises(ValueError, match="sequence 4 of 4"):
            seqs.ctx.seq(N_SEQ)


@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "granitehybrid"])
def test_bytes_of_sequences(arch: str, flash_attn: bool) -> None:
    """The plan counts the cache of each sequence, as the backends do, with razor and without."""
    path = arch_models.path_of(arch)
    shape = ModelFile(path).shape
    mask = arch_runs.mask_of(shape.n_head_kv)
    heads = split_heads(np.frombuffer(mask, np.uint8), shape.n_head_kv)
    profile = Profile(heads, window_min=64, window_divisor=0)
    params = {"flash_attn": flash_attn, "type_k": "f16", "type_v": "f16"}
    razor = runner.Override(mask, window=64)
    plan = make_plan(
        shape, profile, N_CTX_SEQ, n_ubatch=128, swa_full=False, n_stream=N_SEQ, **params
    )
    assert plan.active
    with runner.Model(path) as model:
        for override, n_bytes in ((razor, plan.kv_bytes), (runner.OFF, plan.kv_bytes_full)):
            with runner.Context(
                model,
                override,
                n_ctx=N_SEQ * N_CTX_SEQ,
                n_ubatch=128,
                swa_full=False,
                n_seq_max=N_SEQ,
                **params,
            ) as ctx:
                stats = ctx.stats()
                assert stats.n_stream == N_SEQ
                assert stats.kv_bytes == n_bytes
                assert stats.kv_bytes_sliding == plan.sliding_bytes
                assert stats.kv_bytes_recurrent == plan.recurrent_bytes
                if not stats.active:
                    continue
                rest = stats.kv_bytes_local + stats.kv_bytes_retrieval
                assert rest == n_bytes - plan.sliding_bytes - plan.recurrent_bytes
                rows = N_SEQ * N_CTX_SEQ * plan.retrieval_kv_heads
                row_bytes = 2 * (shape.head_dim_k + shape.head_dim_v)
                assert stats.kv_bytes_retrieval == rows * row_bytes > 0
                for layer in plan.layers:
                    found = ctx.layer(layer.il)
                    assert (found.bytes_k, found.bytes_v) == (layer.bytes_k, layer.bytes_v)
                    assert found.bytes_sums == layer.bytes_sums


# -- refusals --


def test_unified_sequences_are_refused(model) -> None:
    with pytest.raises(runner.LoadError, match="each of the 4 sequences.*set kv_unified to false"):
        runner.Context(model, PLAN, n_ctx=2048, n_seq_max=4, kv_unified=True)


def test_sequences_for_which_razor_saves_nothing(model) -> None:
    """The size of each sequence counts: upstream's cache runs."""
    with runner.Context(model, PLAN, n_ctx=1024, n_seq_max=4) as ctx:
        assert (ctx.stats().active, ctx.stats().n_stream) == (0, 4)
        assert np.isfinite(ctx.decode_sequences([(0, 0, 1), (3, 0, 2)])).all()


def test_a_sequence_that_is_full(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([N_CTX_SEQ, 20, 0, 0])
        with pytest.raises(RuntimeError, match="the context is full"):
            seqs.ctx.decode_sequences([(1, 20, 1), (0, N_CTX_SEQ, 1)])
        assert seqs.lengths() == seqs.held
        assert seqs.decode([1, 2, 3]) <= TOLERANCE


def test_positions_of_each_sequence_must_follow(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([100, 20, 0, 0])
        for bad in ([(2, 3, 1)], [(1, 20, 1), (2, 1, 1)], [(2, 0, 1), (0, 100, 1), (2, 0, 1)]):
            with pytest.raises(RuntimeError, match="must start at 0 and follow each other"):
                seqs.ctx.decode_sequences(bad)
        assert seqs.lengths() == seqs.held
        assert seqs.decode([0, 1, 2, 1]) <= TOLERANCE


def test_a_token_of_several_sequences(model, texts) -> None:
    llama = runner.bindings()
    with Sequences(model, PLAN, texts) as seqs:
        batch = llama.llama_batch_init(1, 0, 2)
        batch.n_tokens, batch.token[0], batch.pos[0], batch.logits[0] = 1, 1, 0, 1
        batch.n_seq_id[0], batch.seq_id[0][0], batch.seq_id[0][1] = 2, 0, 1
        assert llama.llama_decode(seqs.ctx.ptr, batch) != 0
        llama.llama_batch_free(batch)
        assert "a token of several sequences" in runner.last_error()
        assert seqs.lengths() == [0] * N_SEQ


# -- removals --


def test_rollbacks_of_sequences(model, texts) -> None:
    """A rollback over a fold, in one sequence of several."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 260, 400, 100])
        assert seqs.ctx.seq(1).n_rollback >= 8
        assert seqs.ctx.seq_rm(252, seq_id=1)
        assert not seqs.ctx.seq_rm(50, seq_id=2), "the folded rows are gone"
        assert not seqs.ctx.seq_rm(0, 50, seq_id=2)
        seqs.held[1] = 252
        assert seqs.lengths() == seqs.held
        assert seqs.fill([360, 330, 450, 200], seed=1) <= TOLERANCE


def test_removal_of_a_sequence(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 260, 400, 100])
        for seq_id in (0, 2):
            assert seqs.ctx.seq_rm(-1, -1, seq_id=seq_id)
            seqs.held[seq_id] = 0
        assert seqs.ctx.seq_rm(-1, -1, seq_id=N_SEQ), "a sequence that does not exist is empty"
        assert seqs.lengths() == seqs.held
        assert seqs.ctx.seq(0).n_folded == 0
        assert seqs.fill([200, 300, 330, 200], seed=1) <= TOLERANCE


def test_removal_from_all_sequences(model, texts) -> None:
    """All sequences or none; those that end before it do not matter."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 300, 310, 100])
        assert not seqs.ctx.seq_rm(200, seq_id=-1)
        assert seqs.lengths() == seqs.held
        assert seqs.ctx.seq_rm(305, seq_id=-1)
        seqs.held = [305, 300, 305, 100]
        assert seqs.lengths() == seqs.held
        assert seqs.fill([350, 350, 350, 350], seed=1) <= TOLERANCE
        assert seqs.ctx.seq_rm(-1, -1, seq_id=-1)
        assert seqs.lengths() == [0] * N_SEQ


def test_keeping_one_sequence(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 260, 400, 100])
        seqs.ctx.seq_keep(2)
        seqs.held = [0, 0, 400, 0]
        assert seqs.lengths() == seqs.held
        assert seqs.fill([200, 100, 430, 150], seed=1) <= TOLERANCE


def test_shifts_of_one_sequence(model, texts) -> None:
    """Positions cannot be shifted: the sequence is unusable until it is removed."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([100, 100, 0, 0])
        runner.bindings().llama_memory_seq_div(seqs.ctx.memory, 1, 0, -1, 2)
        with pytest.raises(RuntimeError, match="clear it before the next token is decoded"):
            seqs.ctx.decode_sequences(seqs.batch([0, 1]))
        assert seqs.decode([0, 2]) <= TOLERANCE
        assert seqs.ctx.seq_rm(-1, -1, seq_id=1)
        seqs.held[1] = 0
        assert seqs.decode([1, 0] * 50) <= TOLERANCE


# -- copies --


@pytest.mark.parametrize(
    ("plan", "params"),
    [
        (PLAN, {}),
        (PLAN, {"flash_attn": True, "type_k": "q8_0", "type_v": "q4_0"}),
        (SPLIT, {"flash_attn": True, "type_k": "f16", "type_v": "f16"}),
        (PLANS["several windows"], {"type_k": "f16", "type_v": "f16"}),
        (PLANS["no retrieval heads"], {}),
    ],
    ids=["f32", "q8_0-q4_0", "split", "several windows", "no retrieval heads"],
)
def test_copies_are_bit_identical(plan: runner.Override, params: dict, model, texts) -> None:
    """Each copy continues as the original does, over folds and a rollback."""
    with Sequences(model, plan, texts, **params) as seqs:
        seqs.fill([330, 0, 0, 200])
        seqs.ctx.seq_cp(0, 2)
        seqs.ctx.seq_cp(2, 1)
        seqs.ctx.seq_cp(0, 3, 0, 330)  # over another text
        assert seqs.lengths() == [330] * 4
        assert len({seqs.ctx.seq(s).n_folded for s in range(4)}) == 1
        tokens = texts[0].tokens
        for start, end in ((330, 400), (398, 460), (460, 470)):
            want = seqs.ctx.decode_sequences([(0, p, tokens[p]) for p in range(start, end)])
            for s in (1, 2, 3):
                got = seqs.ctx.decode_sequences([(s, p, tokens[p]) for p in range(start, end)])
                np.testing.assert_array_equal(got, want)
            if end == 400:
                for s in range(4):
                    assert seqs.ctx.seq_rm(398, seq_id=s)


def test_a_copy_of_what_is_removed_next(model, texts) -> None:
    """Rows are copied at the next decoding: what happens to the original until then is harmless."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 260, 0, 0])
        state = seqs.ctx.save(whole=False, seq_id=1)
        seqs.ctx.seq_cp(0, 3)
        seqs.ctx.seq_cp(1, 2)
        assert seqs.ctx.load(state, whole=False, seq_id=0)
        assert seqs.ctx.seq_rm(-1, -1, seq_id=1)
        seqs.text = [texts[1], texts[2], texts[1], texts[0]]
        seqs.held = [260, 0, 260, 330]
        assert seqs.lengths() == seqs.held
        assert seqs.fill([330, 100, 300, 400], seed=1) <= TOLERANCE


def test_a_copy_can_be_saved_at_once(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 0, 0, 0])
        seqs.ctx.seq_cp(0, 2)
        state = seqs.ctx.save(whole=False, seq_id=2)
        seqs.ctx.clear()
        assert seqs.ctx.load(state, whole=False, seq_id=1)
        seqs.text[1], seqs.held = texts[0], [0, 330, 0, 0]
        assert seqs.fill([50, 400, 0, 0], seed=1) <= TOLERANCE


def test_a_copy_with_sliding_windows_can_be_saved_at_once() -> None:
    with runner.Model(arch_models.path_of("gemma3")) as model:
        razor = runner.Override(arch_runs.mask_of(model.layers()), window=64)
        texts = make_texts(model, razor, 1, swa_full=False)
        with Sequences(model, razor, texts, swa_full=False) as seqs:
            seqs.fill([330, 0, 0, 0])
            seqs.ctx.seq_cp(0, 2)
            state = seqs.ctx.save(whole=False, seq_id=2)
            seqs.ctx.clear()
            assert seqs.ctx.load(state, whole=False, seq_id=1)
            seqs.held = [0, 330, 0, 0]
            assert seqs.fill([0, 400, 0, 0], seed=1) <= 1e-3


def test_a_copy_is_dropped_by_a_clear(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 200, 0, 0])
        state = seqs.ctx.save(whole=False, seq_id=1)
        seqs.ctx.seq_cp(0, 2)
        seqs.ctx.clear()
        assert seqs.ctx.load(state, whole=False, seq_id=2)
        seqs.text[2], seqs.held = texts[1], [0, 0, 200, 0]
        assert seqs.fill([60, 0, 260, 0], seed=1) <= TOLERANCE


def test_copies_of_a_part_are_refused(model, texts) -> None:
    """The target is empty and cannot be used until it is removed; the others go on."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 100, 0, 0])
        for part in ((0, 100), (50, -1)):
            seqs.ctx.seq_cp(0, 1, *part)
            seqs.held[1] = 0
            assert seqs.lengths() == seqs.held
            with pytest.raises(RuntimeError, match="clear it before the next token is decoded"):
                seqs.ctx.decode_sequences(seqs.batch([0, 1]))
        assert seqs.decode([0, 2, 0]) <= TOLERANCE
        assert seqs.ctx.seq_rm(-1, -1, seq_id=1)
        assert seqs.decode([1, 0] * 40) <= TOLERANCE


def test_copies_of_no_sequence(model, texts) -> None:
    """Sequences that do not exist, and the sequence itself: nothing changes."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([200, 100, 0, 0])
        for source, target in ((0, N_SEQ), (N_SEQ, 0), (-1, 0), (0, 0)):
            seqs.ctx.seq_cp(source, target)
        assert seqs.lengths() == seqs.held
        seqs.ctx.seq_cp(3, 1)  # an empty one
        seqs.held[1] = 0
        assert seqs.lengths() == seqs.held
        assert seqs.decode([0, 1] * 40) <= TOLERANCE


# -- states --


@pytest.mark.parametrize("flash_attn", FLASH_F32)
def test_state_of_a_sequence_in_another_one(flash_attn: bool, model) -> None:
    texts = make_texts(model, PLAN, flash_attn=flash_attn)
    with Sequences(model, PLAN, texts, flash_attn=flash_attn) as seqs:
        seqs.fill([330, 260, 0, 100])
        state = seqs.ctx.save(whole=False, seq_id=0)
        for target in (3, 2):  # one that holds another text, and one that is empty
            assert seqs.ctx.load(state, whole=False, seq_id=target)
            seqs.text[target], seqs.held[target] = texts[0], 330
        assert seqs.lengths() == seqs.held
        assert seqs.fill([400, 300, 420, 410], seed=1) <= TOLERANCE


def test_state_of_all_sequences(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 260, 0, 100])
        state = seqs.ctx.save()
    with Sequences(model, PLAN, texts) as other:
        other.fill([20, 30, 90, 200])
        assert other.ctx.load(state)
        other.held = [330, 260, 0, 100]
        assert other.lengths() == other.held
        assert other.fill([400, 300, 200, 180], seed=1) <= TOLERANCE


def test_state_of_an_empty_sequence(model, texts) -> None:
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 200, 0, 0])
        state = seqs.ctx.save(whole=False, seq_id=2)
        assert seqs.ctx.load(state, whole=False, seq_id=1)
        seqs.held[1] = 0
        assert seqs.lengths() == seqs.held
        assert seqs.decode([1, 0] * 60) <= TOLERANCE


def test_state_of_an_empty_sequence_with_sliding_windows() -> None:
    """It empties the sliding part of its target too, which upstream keeps."""
    with runner.Model(arch_models.path_of("gemma3")) as model:
        razor = runner.Override(arch_runs.mask_of(model.layers()), window=64)
        texts = make_texts(model, razor, 2, swa_full=False)
        with Sequences(model, razor, texts, 2, swa_full=False) as seqs:
            state = seqs.ctx.save(whole=False, seq_id=0)
            seqs.fill([330, 200])
            assert seqs.ctx.load(state, whole=False, seq_id=1)
            seqs.held[1] = 0
            assert seqs.lengths() == seqs.held
            assert seqs.fill([360, 120], seed=1) <= 1e-3


def test_state_of_a_sequence_is_refused(model, texts) -> None:
    """By a sequence that does not exist, and by a context with another number of sequences."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 260, 0, 0])
        state, whole = seqs.ctx.save(whole=False), seqs.ctx.save()
        assert not seqs.ctx.load(state, whole=False, seq_id=N_SEQ)
        assert "no sequence 4" in runner.last_error()
        assert seqs.lengths() == seqs.held
        for n_seq in (1, 3):
            with Sequences(model, PLAN, texts, n_seq) as other:
                other.fill([200] * n_seq)
                for bad in (state, whole):
                    assert not other.ctx.load(bad, whole=bad is whole)
                    assert "number of sequences" in runner.last_error()
                assert other.lengths() == other.held
                assert other.decode([0]) <= TOLERANCE
        assert seqs.decode([0, 1]) <= TOLERANCE


def test_damaged_state_of_a_sequence(model, texts) -> None:
    """It leaves its own sequence empty or as it was, and all others alone."""
    with Sequences(model, PLAN, texts) as seqs:
        seqs.fill([330, 260, 100, 0])
        state = seqs.ctx.save(whole=False)
        for end in range(20, len(state), len(state) // 23):
            for bad in (state[:end], state[:200].ljust(end, b"\xff")[:end]):
                assert not seqs.ctx.load(bad, whole=False, seq_id=1)
                assert seqs.ctx.pos_max(1) + 1 in (0, seqs.held[1])
                seqs.held[1] = seqs.ctx.pos_max(1) + 1
                assert seqs.lengths() == seqs.held
        assert seqs.held[1] == 0
        assert seqs.fill([360, 200, 150, 100], seed=1) <= TOLERANCE


# -- aborts --


@pytest.mark.parametrize("seq_id", [0, 2])
def test_abort_in_a_batch_of_sequences(seq_id: int, model, texts) -> None:
    """At many nodes of a batch whose ubatches fold in several sequences."""
    with Sequences(model, PLAN, texts) as seqs:
        for nodes in range(0, 1600, 37):
            seqs.ctx.clear()
            seqs.held = [0] * N_SEQ
            seqs.fill([190, 150, 318, 0], seed=nodes)
            order = [seq_id, 1, 3] + [0] * 10 + [2] * 10
            seqs.ctx.abort_after(nodes)
            try:
                seqs.ctx.decode_sequences(seqs.batch(order))
                aborted = False
            except RuntimeError:
                aborted = True
            seqs.ctx.abort_after(None)
            now = seqs.lengths()
            for s in range(N_SEQ):
                most = seqs.held[s] + order.count(s)
                assert seqs.held[s] <= now[s] <= most
                assert aborted or now[s] == most
            seqs.held = now
            assert seqs.decode([0, 1, 2, 3]) <= TOLERANCE
        assert not aborted, "more nodes are needed"


def test_abort_that_loses_a_sequence(model) -> None:
    """The rows that were to be folded are overwritten: the sequence is cleared, the other stays."""
    plan = runner.override(reference.make_razor(MASK, 568))
    params = {"n_ctx": 1024}
    texts = make_texts(model, plan, 2, 900, **params)
    with Sequences(model, plan, texts, 2, **params) as seqs:
        assert seqs.ctx.stats().block == 128
        seqs.fill([768, 100])
        seqs.ctx.abort_after(40)
        with pytest.raises(RuntimeError, match="returned 2"):
            seqs.ctx.decode_sequences(seqs.batch([0] * 128))
        seqs.ctx.abort_after(None)
        seqs.held[0] = 0
        assert seqs.lengths() == seqs.held
        assert seqs.fill([150, 800], seed=1) <= TOLERANCE


# -- all operations --


def test_random_operations_on_sequences() -> None:
    from tests.fuzz import sequences

    archs = ("gemma3", "gpt-oss", "granitehybrid", "qwen35")
    assert sum(sequences.run(1600, seed=1, archs=archs).values()) >= 1600


def test_random_operations_on_a_tiny_model() -> None:
    """Every kind of operation comes up, with logs of all kinds."""
    from tests.fuzz import memories, sequences

    done = sequences.run(2400, seed=1, archs=("tiny",))
    damages = {"decode_on_a_full_disk", "lose_log"}
    assert set(done) == set(sequences.OPERATIONS) - (set() if memories.HAS_PROC else damages)
