"""The predicted savings against arithmetic done by hand, against real batches and real operation counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefopt_cli.scoring.batches import packed_batch, padded_batch
from prefopt_cli.scoring.packing import Example
from prefopt_cli.scoring.savings import (
    ModelWork,
    Unscored,
    draw_batches,
    forward_operations,
    heaviest_batch,
    packed_positions,
    padded_positions,
    predict_savings,
    training_operations,
)

WORK = ModelWork(trained=1000, frozen=0, head=500, head_is_trained=True, attention=0)
ONE = np.array([[[10, 4, 6]]])
"""One batch of one pair: prompt 10, chosen 4, rejected 6."""


def random_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 50, (count, 3))


def test_an_epoch_holds_every_pair_and_only_full_batches() -> None:
    lengths = np.arange(30).reshape(10, 3)
    batches = draw_batches(lengths, 4)

    assert batches.shape == (3, 4, 3)
    assert {tuple(pair) for batch in batches for pair in batch} == {tuple(pair) for pair in lengths}
    assert (draw_batches(lengths, 4) == batches).all(), "the order is seeded"
    assert (draw_batches(lengths, 4, seed=1) != batches).any()
    assert draw_batches(lengths, 64).shape == (1, 10, 3)


def test_positions_are_those_of_real_batches() -> None:
    batches = draw_batches(random_lengths(24), 4)
    packed, padded = packed_positions(batches), padded_positions(batches)
    for number, batch in enumerate(batches):
        examples = [
            Example(np.zeros(p, int), (np.zeros(c, int), np.zeros(r, int))) for p, c, r in batch.tolist()
        ]
        ours, trl = packed_batch(examples, "pieces", 0), padded_batch(examples, 0)
        assert packed.tokens[number] == ours["input_ids"].numel()
        assert packed.scored[number] == ours["targets"].numel()
        assert padded.tokens[number] == trl["input_ids"].numel()
        assert padded.seen[number] == trl["input_ids"].size(0) * trl["input_ids"].size(1) ** 2


def ragged_lengths(count: int, most: int = 4, seed: int = 0) -> np.ndarray:
    """Lists of two responses or more; 0 where there is none."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 50, (count, 1 + most))
    lengths[:, 1:][np.arange(most) >= draw.integers(2, most + 1, count)[:, None]] = 0
    return lengths


def test_missing_responses_count_for_nothing() -> None:
    batches = draw_batches(ragged_lengths(24), 4)
    packed, padded = packed_positions(batches), padded_positions(batches)
    assert (batches == 0).any()
    for number, batch in enumerate(batches.tolist()):
        examples = [
            Example(np.zeros(prompt, int), [np.zeros(length, int) for length in responses if length])
            for prompt, *responses in batch
        ]
        ours, rows = packed_batch(examples, "pieces", 0), padded_batch(examples, 0)
        assert packed.tokens[number] == ours["input_ids"].numel()
        assert packed.scored[number] == ours["targets"].numel()
        assert padded.tokens[number] == rows["input_ids"].numel()
    wider = np.concatenate((batches, np.zeros_like(batches[:, :, :1])), axis=2)
    one, other = (
        predict_savings(each, WORK, packed=True, cached=True, device="cpu") for each in (batches, wider)
    )
    assert one == other


def test_padding_of_a_ragged_batch_by_hand() -> None:
    """Prompt 10 with 4, 6 and 2; prompt 8 with 5 and 3: five rows of 16, filled with 14, 16, 12, 13 and 11."""
    found = predict_savings(
        np.array([[[10, 4, 6, 2], [8, 5, 3, 0]]]), WORK, packed=True, cached=True, device="cpu"
    )

    assert (found.rows, found.padded_tokens, found.packed_tokens) == (2, 80, 38)
    assert found.response_tokens == 20
    assert found.padding_share == pytest.approx(1 - 66 / 80)


def test_what_a_query_sees_is_what_the_mask_shows() -> None:
    from prefopt_cli.scoring.attention import dense_mask

    example = Example(np.zeros(10, int), (np.zeros(4, int), np.zeros(6, int)))
    batch = packed_batch([example], "mask", 0)
    visible = dense_mask(batch["segments"], batch["branches"])

    assert packed_positions(ONE).seen[0] == int(visible.sum())


def test_operations_by_hand() -> None:
    """20 packed tokens of which 10 are scored; 2 rows of 16 padded.

    Forward 2 x 1000 per token and 2 x 500 per scored one; backward twice that, and the head's forward again.
    """
    packed, padded = packed_positions(ONE), padded_positions(ONE)

    assert forward_operations(WORK, packed)[0] == 20 * 2000 + 10 * 1000
    assert training_operations(WORK, packed)[0] == 3 * 20 * 2000 + 4 * 10 * 1000
    assert training_operations(WORK, packed, kept=10)[0] == 3 * 20 * 2000 + 3 * 10 * 1000
    assert training_operations(WORK, packed, kept=4)[0] == 3 * 20 * 2000 + 3 * 10 * 1000 + 6 * 1000
    assert training_operations(WORK, padded)[0] == 3 * 32 * 2000 + 4 * 32 * 1000


def test_frozen_weights_spare_one_product_and_checkpointing_adds_a_forward() -> None:
    frozen = ModelWork(trained=0, frozen=1000, head=500, head_is_trained=False, attention=0)
    again = ModelWork(trained=1000, frozen=0, head=500, head_is_trained=True, attention=0, checkpointing=True)
    positions = packed_positions(ONE)

    assert training_operations(frozen, positions)[0] == 2 * 20 * 2000 + 3 * 10 * 1000
    assert (training_operations(again, positions) - training_operations(WORK, positions))[0] == 20 * 2000


def test_attention_by_hand() -> None:
    """Prompt 10 x 11 / 2, chosen 4 x 10 + 4 x 5 / 2, rejected 6 x 10 + 6 x 7 / 2; padded 2 rows of 16 x 16."""
    work = ModelWork(trained=0, frozen=0, head=0, head_is_trained=False, attention=7)

    assert packed_positions(ONE).seen[0] == 55 + 50 + 81
    assert forward_operations(work, packed_positions(ONE))[0] == 4 * 7 * 186
    assert training_operations(work, padded_positions(ONE))[0] == 3 * 4 * 7 * 512


def test_speed_up_by_hand() -> None:
    found = predict_savings(ONE, WORK, packed=True, cached=True, device="cpu")
    own, trl, reference = 3 * 20 * 2000 + 4 * 10 * 1000, 3 * 32 * 2000 + 4 * 32 * 1000, 32 * 3000

    assert (found.padded_tokens, found.packed_tokens, found.response_tokens) == (32, 20, 10)
    assert found.padding_share == pytest.approx(1 - 30 / 32)
    assert found.speedup == pytest.approx((trl + reference) / own)
    assert found.speedup_precomputed == pytest.approx(trl / own)


def test_on_cuda_trl_scores_responses_only() -> None:
    cpu, cuda = (predict_savings(ONE, WORK, packed=True, cached=True, device=at) for at in ("cpu", "cuda"))
    own, trl = 3 * 20 * 2000 + 4 * 10 * 1000, 3 * 32 * 2000 + 4 * 10 * 1000

    assert cuda.speedup_precomputed == pytest.approx(trl / own)
    assert cuda.speedup < cpu.speedup


def test_padded_rows_save_the_reference_pass_and_on_cuda_nothing_else() -> None:
    batches = draw_batches(random_lengths(40), 8)
    found = predict_savings(batches, WORK, packed=False, cached=True, device="cuda")
    same = predict_savings(batches, WORK, packed=False, cached=False, device="cuda")

    assert found.speedup_precomputed == pytest.approx(1)
    assert 1.2 < found.speedup < 1.5
    assert same.speedup == pytest.approx(1)


def test_a_reference_pass_in_every_step_costs() -> None:
    batches = draw_batches(random_lengths(40), 8)
    cached, each = (
        predict_savings(batches, WORK, packed=True, cached=cached, device="cpu") for cached in (True, False)
    )

    assert each.speedup < cached.speedup
    assert each.speedup > cached.speedup / 1.5


def test_the_heaviest_batch_of_either_layout() -> None:
    batches = np.array([[[40, 1, 1], [1, 1, 1]], [[20, 9, 9], [20, 9, 9]]])

    assert (heaviest_batch(batches, packed=True) == batches[1]).all()
    assert (heaviest_batch(batches, packed=False) == batches[0]).all()


def test_the_heaviest_padded_batch_of_lists_has_most_rows_times_width() -> None:
    """Three rows of 12 against two of 15."""
    batches = np.array([[[5, 10, 10, 0]], [[4, 8, 8, 8]]])

    assert (heaviest_batch(batches, packed=False) == batches[1]).all()


# --- texts that are read but not scored

TEXTS = Unscored(*(np.array([[each]]) for each in (1.5, 4.5, 9.0)))
"""Beside `ONE`: half of the times a text of 3 tokens, and always one of 3."""


def test_unscored_texts_by_hand() -> None:
    """4.5 tokens more, each of which sees the 10 of the prompt; padded, one and a half rows of 16 more."""
    packed, padded = packed_positions(ONE, TEXTS), padded_positions(ONE, TEXTS)

    assert (packed.tokens[0], packed.scored[0]) == (24.5, 10)
    assert packed.seen[0] == 186 + 45 + 9
    assert (padded.tokens[0], padded.seen[0]) == (3.5 * 16, 3.5 * 256)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_unscored_texts_cost_by_hand(device: str) -> None:
    """Both layouts score 10 tokens; the padding is what 30 tokens, 1.5 prompts and 4.5 tokens leave of 3.5 rows."""
    found = predict_savings(ONE, WORK, packed=True, cached=True, device=device, unscored=TEXTS)  # type: ignore[arg-type]
    head, without = 4 * 10 * 1000, 3 * 20 * 2000
    own = 3 * 24.5 * 2000 + head

    assert (found.padded_tokens, found.packed_tokens, found.response_tokens) == (56, 24.5, 10)
    assert found.unscored_tokens == 4.5
    assert found.padding_share == pytest.approx(1 - (30 + 15 + 4.5) / 56)
    assert found.speedup == found.speedup_precomputed == pytest.approx((3 * 56 * 2000 + head) / own)
    assert found.unscored_cost == pytest.approx(own / (without + head) - 1)


def test_unscored_texts_on_padded_rows_and_before_a_reference() -> None:
    """The reference in every step reads them as well."""
    padded = predict_savings(ONE, WORK, packed=False, cached=True, device="cpu", unscored=TEXTS)
    each = predict_savings(ONE, WORK, packed=True, cached=False, device="cpu", unscored=TEXTS)
    head = 4 * 10 * 1000 + 10 * 1000

    assert padded.speedup == 1
    assert padded.unscored_cost == pytest.approx((3 * 56 * 2000 + 40_000) / (3 * 32 * 2000 + 40_000) - 1)
    assert each.unscored_cost == pytest.approx((4 * 24.5 * 2000 + head) / (4 * 20 * 2000 + head) - 1)


def test_without_unscored_texts_nothing_is_said_of_them() -> None:
    found = predict_savings(ONE, WORK, packed=True, cached=True, device="cpu")
    assert (found.unscored_tokens, found.unscored_cost) == (None, None)


def test_positions_of_unscored_texts_are_those_of_real_batches() -> None:
    draw = np.random.default_rng(0)
    lengths = np.hstack((draw.integers(20, 50, (12, 3)), draw.integers(0, 20, (12, 2))))
    batches = draw_batches(lengths, 4)
    texts = batches[:, :, 3:]
    unscored = Unscored((texts > 0).sum(2), texts.sum(2), (texts * (texts + 1) / 2).sum(2))
    packed, padded = (each(batches[:, :, :3], unscored) for each in (packed_positions, padded_positions))
    for number, batch in enumerate(batches.tolist()):
        examples = [
            Example(
                np.zeros(p, int), (np.zeros(c, int), np.zeros(r, int)), [np.zeros(n, int) for n in more if n]
            )
            for p, c, r, *more in batch
        ]
        ours, rows = packed_batch(examples, "pieces", 0), padded_batch(examples, 0)
        assert packed.tokens[number] == ours["input_ids"].numel()
        assert packed.scored[number] == ours["targets"].numel()
        assert padded.tokens[number] == rows["input_ids"].numel()


def test_forward_operations_are_those_that_torch_counts() -> None:
    """A padded forward pass of a small Llama, whose attention is computed in full."""
    from transformers import LlamaForCausalLM

    from prefopt_cli.training.forecast import model_work
    from tests.training.test_memory import llama

    model = LlamaForCausalLM(llama(attn_implementation="eager"))
    batch = padded_batch([Example([1] * 10, ([1] * 4, [1] * 6))], 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    predicted = forward_operations(model_work(model, checkpointing=False), padded_positions(ONE))[0]

    # Torch counts the products with the rotary frequencies too.
    assert predicted == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert predicted <= counter.get_total_flops()
