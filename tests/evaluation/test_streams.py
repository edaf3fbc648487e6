from __future__ import annotations

import numpy as np

from megatron_plasticity.evaluation.streams import derived_seed, outputs, question_key, stream_states, uniforms


def test_outputs_are_those_of_splitmix64() -> None:
    # The published test vector of SplitMix64 for the starting state 1234567.
    state = np.array([1234567], dtype=np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [int(outputs(state, n)[0]) for n in range(5)] == expected


def test_a_stream_depends_on_its_question_and_sample_alone() -> None:
    together = stream_states(7, [3, 5, 5, 3], [0, 0, 1, 2])
    alone = [stream_states(7, [question], [sample])[0] for question, sample in [(3, 0), (5, 0), (5, 1), (3, 2)]]
    assert together.tolist() == alone


def test_streams_differ_between_questions_samples_and_seeds() -> None:
    questions, samples = np.divmod(np.arange(10_000), 100)
    states = np.concatenate([stream_states(seed, questions, samples) for seed in (0, 1, -1)])
    assert len(np.unique(states)) == len(states)


def test_each_stream_can_be_at_a_position_of_its_own() -> None:
    states = stream_states(7, [1, 2, 2**64 - 1], [0, 0, 5])
    assert uniforms(states, [4, 0, 9]).tolist() == [uniforms(states, n)[row] for row, n in enumerate((4, 0, 9))]


def test_a_question_s_key_is_64_bits_of_its_id_and_stable() -> None:
    assert question_key("gsm8k/17") == question_key("gsm8k/17") != question_key("gsm8k/18")
    assert question_key("") == int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "little")  # SHA-256 of nothing
    keys = [question_key(str(number)) for number in range(1000)]
    assert max(keys) >= 2**63
    assert len(np.unique(stream_states(0, keys, [0] * 1000))) == 1000


def test_numbers_are_uniform_and_independent_along_each_axis() -> None:
    questions, samples = np.divmod(np.arange(1600), 16)
    numbers = np.stack([uniforms(stream_states(0, questions, samples), n) for n in range(50)]).reshape(50, 100, 16)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers.ravel() * 100).astype(int), minlength=100)
    expected = numbers.size / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 60 < chi_squared < 150  # 99 degrees of freedom: within 3.6 standard deviations
    for axis in range(3):
        before = numbers.take(range(numbers.shape[axis] - 1), axis).ravel()
        after = numbers.take(range(1, numbers.shape[axis]), axis).ravel()
        assert abs(np.corrcoef(before, after)[0, 1]) < 0.015


def test_derived_seeds_differ_by_name_and_are_stable() -> None:
    assert derived_seed(42, "arithmetic") != derived_seed(42, "algebra")
    assert derived_seed(42, "arithmetic") == derived_seed(42, "arithmetic")
    assert derived_seed(42, "arithmetic") != derived_seed(43, "arithmetic")
