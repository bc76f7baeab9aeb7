"""Scores of a frozen policy: right, each computed once, and none lost when the work is interrupted."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt_cli.errors import PrefoptError
from prefopt_cli.scoring import frozen
from prefopt_cli.scoring.cache import Policy, ScoreCache
from prefopt_cli.scoring.frozen import FrozenScores, score_frozen
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from tests.cli.conftest import environment
from tests.scoring.build import build, examples, one_by_one

POLICY = Policy("ab" * 16, "the base")
OTHER = Policy("cd" * 16, "another")
LAYOUTS = [Layout(), Layout("pieces"), Layout("mask", width_cost=1.0)]
LENGTHS = [[5, 7, 3], [0, 4, 6], [8, 1, 9], [3, 1, 1], [0, 1, 5], [2, 11, 2], [4, 6, 2, 3], [6, 5]]
RESPONSES = sum(len(each) - 1 for each in LENGTHS)
TOKENS = sum(map(sum, LENGTHS))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scores.sqlite"


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


GIVEN = examples(LENGTHS)


def score(
    model: Any,
    given: Sequence[Example],
    file: Path,
    *,
    layout: Layout = LAYOUTS[1],
    policy: Policy = POLICY,
    **options: Any,
) -> FrozenScores:
    layout.prepare(model)
    with ScoreCache(file) as cache:
        return score_frozen(model, given, policy=policy, cache=cache, layout=layout, **options)


def flat(scores: FrozenScores) -> list[float]:
    """In response-major order."""
    most = max(map(len, scores.logps))
    return [listed[number] for number in range(most) for listed in scores.logps if number < len(listed)]


def close(found: FrozenScores, model: Any, given: Sequence[Example]) -> bool:
    with torch.no_grad():
        expected = one_by_one(model, given)
    return torch.allclose(torch.tensor(flat(found)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_examples", [None, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "pieces", "rows"])
def test_scores_are_those_of_the_models_own_logits(
    model: Any, file: Path, layout: Layout, batch_examples: int | None
) -> None:
    found = score(model, GIVEN, file, layout=layout, batch_examples=batch_examples)

    assert close(found, model, GIVEN)
    assert [len(listed) for listed in found.logps] == [len(example.responses) for example in GIVEN]
    assert (found.responses, found.computed) == (RESPONSES, RESPONSES)
    if layout.way:
        assert found.tokens == TOKENS


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every batch the responses and the tokens in its tensors."""
    seen: list[tuple[int, int]] = []
    whole = Layout.batch

    def noted(self: Layout, given: Sequence[Example], *rest: Any) -> Any:
        batch = whole(self, given, *rest)
        seen.append((sum(len(example.responses) for example in given), batch["input_ids"].numel()))
        return batch

    monkeypatch.setattr(Layout, "batch", noted)
    return seen


@pytest.mark.parametrize("budget", [1, 30])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "pieces", "rows"])
def test_batches_keep_to_the_budget_and_give_the_same(
    model: Any,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[tuple[int, int]],
    layout: Layout,
    budget: int,
) -> None:
    """Only a response that is too long by itself exceeds it."""
    monkeypatch.setitem(frozen.BATCH_TOKENS, "cpu", budget)

    found = score(model, GIVEN, file, layout=layout)

    assert close(found, model, GIVEN)
    assert sum(responses for responses, _ in sizes) == RESPONSES
    assert all(tokens <= budget or responses == 1 for responses, tokens in sizes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "pieces", "rows"])
def test_rows_that_share_one_prompt_do_not_all_go_into_one_batch(
    model: Any, file: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[tuple[int, int]], layout: Layout
) -> None:
    """Data without prompts is such a case: it may have any number of rows."""
    monkeypatch.setitem(frozen.BATCH_TOKENS, "cpu", 100)
    given = examples([[0, 5, 9]] * 50)

    found = score(model, given, file, layout=layout)

    assert close(found, model, given)
    assert sum(responses for responses, _ in sizes) == 100
    assert max(tokens for _, tokens in sizes) <= 100
    assert len(sizes) < 20


def test_the_second_time_nothing_is_computed(model: Any, file: Path) -> None:
    first = score(model, GIVEN, file)

    second = score(Untouchable(model), GIVEN, file)

    assert second.logps == first.logps
    assert (second.responses, second.computed, second.tokens) == (RESPONSES, 0, 0)
    assert second.describe() == f"{RESPONSES} responses, all from the cache"
    assert "from the cache" not in first.describe()
    assert first.describe().startswith(f"{RESPONSES} responses, {RESPONSES} computed in ")


class Untouchable(torch.nn.Module):
    """A model that must not be run."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config, self.forward_of = model.config, model
        self.scores_responses = True

    def get_output_embeddings(self) -> Any:
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was run")


def test_filtered_and_re_ordered_rows_are_not_computed(model: Any, file: Path) -> None:
    first = score(model, GIVEN, file)

    fewer = score(Untouchable(model), GIVEN[::-2], file)

    assert fewer.computed == 0
    assert fewer.logps == first.logps[::-2]


def test_responses_that_change_places_keep_their_scores(model: Any, file: Path) -> None:
    first = score(model, GIVEN, file)
    turned = [Example(example.prompt, list(example.responses)[::-1]) for example in GIVEN]

    assert score(Untouchable(model), turned, file).logps == [listed[::-1] for listed in first.logps]


def test_rows_that_are_there_twice_are_computed_once(model: Any, file: Path) -> None:
    """Also a response that stands beside another one elsewhere."""
    again = Example(GIVEN[0].prompt, [GIVEN[0].responses[1], GIVEN[0].responses[1]])

    found = score(model, [*GIVEN, GIVEN[2], again], file)

    assert (found.responses, found.computed, found.tokens) == (RESPONSES, RESPONSES, TOKENS)
    assert found.logps[-2] == found.logps[2]
    assert found.logps[-1] == [found.logps[0][1]] * 2


def test_only_new_rows_are_computed(model: Any, file: Path) -> None:
    first = score(model, GIVEN[:5], file)
    beside = Example(GIVEN[0].prompt, [GIVEN[0].responses[0], [9, 9, 9]])

    found = score(model, [*GIVEN, beside], file)

    new = sum(len(example.responses) for example in GIVEN[5:]) + 1
    assert (found.responses, found.computed) == (RESPONSES + 1, new)
    assert found.tokens == sum(example.tokens for example in GIVEN[5:]) + len(beside.prompt) + 3
    assert found.logps[:5] == first.logps
    assert close(found, model, [*GIVEN, beside])
    assert f", {RESPONSES + 1 - new} from the cache, {new} computed in " in found.describe()


def test_the_same_tokens_with_another_boundary_are_another_response(model: Any, file: Path) -> None:
    pair = [Example([5, 6], [[7, 8]]), Example([5], [[6, 7, 8]]), Example([], [[5, 6, 7, 8]])]

    found = score(model, pair, file)

    assert found.computed == 3
    assert close(found, model, pair)


def test_another_policy_is_computed_anew(model: Any, file: Path) -> None:
    first = score(model, GIVEN, file)
    other = build("llama", seed=1)

    found = score(other, GIVEN, file, policy=OTHER)

    assert found.computed == RESPONSES
    assert close(found, other, GIVEN)
    assert found.logps != first.logps
    assert score(Untouchable(model), GIVEN, file).logps == first.logps


def test_interrupted_work_is_kept(model: Any, file: Path) -> None:
    told: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        score(model, GIVEN, file, progress=interrupt, batch_examples=1)
    assert model.training

    found = score(model, GIVEN, file)

    assert [total for _, total in told] == [RESPONSES] * 3
    assert found.computed == RESPONSES - told[-1][0]
    assert close(found, model, GIVEN)


def test_progress_ends_with_all_that_was_missing(model: Any, file: Path) -> None:
    told: list[tuple[int, int]] = []
    score(model, GIVEN[:2], file)

    score(model, GIVEN, file, progress=lambda *each: told.append(each), batch_examples=2)

    assert told[-1] == (RESPONSES - 4, RESPONSES - 4)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_eval_mode_and_goes_back(file: Path, training: bool) -> None:
    model = build("llama", attention_dropout=0.5).train(training)

    found = score(model, GIVEN, file)

    assert {module.training for module in model.modules()} == {training}
    assert close(found, model.eval(), GIVEN)


def test_no_gradient_is_made_and_training_goes_on_after_it(file: Path) -> None:
    """What scoring leaves in the model, such as angles of its positions, must be fit for training."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("llama", rope_parameters=rope, max_position_embeddings=8)

    score(model, GIVEN, file)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(input_ids=torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


def test_scores_do_not_depend_on_the_precision_of_others(model: Any, file: Path) -> None:
    found = score(model, GIVEN, file, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.no_grad():
        expected = one_by_one(model, GIVEN)

    difference = torch.tensor(flat(found)) - expected
    assert 1e-3 < difference.abs().max() < 0.05 * expected.abs().max()


def test_without_a_usable_cache_everything_is_computed(model: Any, tmp_path: Path) -> None:
    messages: list[str] = []
    (tmp_path / "in the way").write_text("")
    layout = LAYOUTS[1]
    layout.prepare(model)
    with ScoreCache(tmp_path / "in the way" / "scores.sqlite", messages.append) as cache:
        found = score_frozen(model, GIVEN, policy=POLICY, cache=cache, layout=layout)

    assert found.computed == RESPONSES
    assert close(found, model, GIVEN)
    assert len(messages) == 1


def test_no_examples_are_no_trouble(model: Any, file: Path) -> None:
    found = score(model, [], file)

    assert (found.logps, found.responses, found.computed) == ([], 0, 0)


PROGRAM = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from accelerate import PartialState
from prefopt_cli.scoring.cache import ScoreCache
from tests.scoring.build import build
from tests.scoring.test_frozen import GIVEN, score

state = PartialState(cpu=True)
shares = []
found = score(build("llama"), GIVEN, Path(sys.argv[1]), batch_examples=1, progress=lambda *each: shares.append(each))
again = score(build("llama"), GIVEN, Path(sys.argv[1]))
Path(sys.argv[2] + str(state.process_index)).write_text(json.dumps(
    [found.logps, found.computed, len(shares), shares[-1], again.logps, again.computed]
))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_both_have_all(model: Any, file: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(program), str(file), str(tmp_path / "found")],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = (json.loads((tmp_path / f"found{number}").read_text()) for number in range(2))
    alone = score(model, GIVEN, tmp_path / "alone.sqlite")

    assert left[0] == right[0] == left[4] == right[4]
    assert left[1] == right[1] == RESPONSES
    prompts = {tuple(example.prompt) for example in GIVEN}
    # A batch for every prompt, and the processes take them in turn.
    assert {left[2], right[2]} == {len(prompts) // 2, -(-len(prompts) // 2)}
    assert left[3][1] + right[3][1] == RESPONSES
    assert left[5] == right[5] == 0
    for ours, theirs in zip(left[0], alone.logps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_batch_that_memory_does_not_hold_is_halved(
    model: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sizes = Layout.batch, []

    def limited(self: Layout, examples: Any, *rest: Any) -> Any:
        sizes.append(len(examples))
        if len(examples) > 2:
            raise torch.OutOfMemoryError("too much")
        return whole(self, examples, *rest)

    monkeypatch.setattr(Layout, "batch", limited)
    found = score(model, GIVEN, file)
    monkeypatch.undo()

    assert close(found, model, GIVEN)
    assert max(sizes) > 2


def test_a_single_prompt_that_memory_does_not_hold_is_told(
    model: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Layout, *given: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(Layout, "batch", never)

    with pytest.raises(PrefoptError, match="exhausted while scoring with the reference policy"):
        score(model, GIVEN, file)
