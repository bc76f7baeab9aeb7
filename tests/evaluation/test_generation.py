"""Replies: of the policies that are named, to the prompts that are meant, the same for the same seed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.asking import (
    NO_ROOM,
    Asked,
    Prompts,
    choose,
    find_prompts,
    held_out_prompts,
    looks_like_path,
)
from prefopt_cli.evaluation.generation import Drawing, Reply, SamplingStopped, Writer, draw, find_writers
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Silent
from tests.tiny import build_model
from tests.training.conftest import LORA, Run, make_recipe, run, shared_run  # noqa: F401
from tests.training.test_sampling import draw as draw_tokens
from tests.training.test_sampling import mild, next_token

TEXTS = (
    "Human: Tell me about cats.\nAssistant:",
    "tea",
    "Say something about the snow and the rain, please.",
)


TRAINED = (LORA, "training.max_steps=4", "training.learning_rate=0.1")


def writer(world: Path) -> Writer:
    return find_writers(str(world / "model"), None, Silent(), RunFinder())[0]


def chosen(one: Writer, *texts: Any, limit: int = 8, max_new_tokens: int | None = 12) -> Asked:
    return choose(Prompts("a test", texts or TEXTS), limit, [one.reader], max_new_tokens, Silent())


def drawn(one: Writer, drawing: Drawing, asked: Asked | None = None, **options: Any) -> list[list[Reply]]:
    asked = asked or chosen(one)
    return draw(
        one,
        asked.texts,
        asked.ids[0],
        drawing,
        max_new_tokens=asked.max_new_tokens,
        stop_ids=asked.stop_ids[0],
        reporter=Silent(),
        **options,
    )


def test_the_same_seed_gives_the_same_replies_whatever_the_batch_and_the_other_prompts(
    tiny_world: Path,
) -> None:
    one = writer(tiny_world)
    all_at_once = drawn(one, Drawing(per_prompt=3, batch_size=16))

    assert drawn(one, Drawing(per_prompt=3, batch_size=2)) == all_at_once
    assert drawn(one, Drawing(per_prompt=3, batch_size=1)) == all_at_once
    assert drawn(one, Drawing(per_prompt=1), chosen(one, TEXTS[2]))[0] == all_at_once[2][:1]
    assert drawn(one, Drawing(per_prompt=3, seed=1)) != all_at_once
    assert all(len({reply.text for reply in each}) == 3 for each in all_at_once)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_streams_of_their_own_draw_from_the_policy(temperature: float, top_p: float) -> None:
    model, prompt, count = mild(), [20, 21, 22], 6000
    responses = draw_tokens(
        model,
        [prompt] * count,
        seed=list(range(count)),
        max_new_tokens=1,
        stop_ids=(),
        temperature=temperature,
        top_p=top_p,
    )
    probabilities = next_token(model, prompt)
    wanted = probabilities ** (1 / temperature)
    wanted = wanted / wanted.sum()
    order = wanted.argsort(descending=True)
    kept = order[: int((wanted[order].cumsum(0) - wanted[order] < top_p).sum())]
    drawn_ids = torch.tensor([tokens[0] for tokens in responses])

    assert set(drawn_ids.tolist()) <= set(kept.tolist())
    expected = count * wanted[kept] / wanted[kept].sum()
    found = drawn_ids.bincount(minlength=len(wanted))[kept]
    statistic = ((found - expected).square() / expected)[expected > 5].sum()
    freedom = int((expected > 5).sum()) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_one_seed_for_all_knows_the_temperature_too() -> None:
    model = mild()
    sharp = [draw_tokens(model, temperature=1e-5, seed=seed) for seed in (0, 1)]
    assert sharp[0] == sharp[1] == draw_tokens(model, temperature=0)
    assert draw_tokens(model, seed=0) != draw_tokens(model, seed=1)


def test_greedy_replies_know_no_seed(tiny_world: Path) -> None:
    one = writer(tiny_world)

    assert drawn(one, Drawing(temperature=0)) == drawn(one, Drawing(temperature=0, seed=5, batch_size=1))
    assert drawn(one, Drawing(top_p=1e-6)) == drawn(one, Drawing(temperature=0))
    with pytest.raises(UserError, match="temperature 0 all replies"):
        Drawing(per_prompt=2, temperature=0).require_different_replies()


def test_replies_that_are_cut_off_are_known(tiny_world: Path) -> None:
    one = writer(tiny_world)
    asked = chosen(one, "tea", max_new_tokens=3)
    stop = {each for each in range(400) if each % 3 == 0}
    whole = draw(
        one,
        asked.texts,
        asked.ids[0],
        Drawing(per_prompt=20),
        max_new_tokens=3,
        stop_ids=tuple(stop),
        reporter=Silent(),
    )[0]

    assert {reply.finished for reply in whole} == {True, False}
    for reply in whole:
        assert reply.tokens == 3 or reply.finished


def test_a_signal_stops_between_batches(tiny_world: Path) -> None:
    with pytest.raises(SamplingStopped):
        drawn(writer(tiny_world), Drawing(), stopping=lambda: True)


def test_prompts_are_the_first_different_ones_that_fit(tiny_world: Path) -> None:
    one = writer(tiny_world)  # its context holds 256 tokens
    asked = chosen(one, "x " * 300, "tea", "cats", "maps", limit=2)

    assert asked.texts == ("tea", "cats")
    assert asked.left_out == {NO_ROOM: 1}
    assert asked.describe() == f"Prompts: 2 of 4 from a test (1 left out: {NO_ROOM})."
    assert chosen(one, "tea", max_new_tokens=None).max_new_tokens == 128
    with pytest.raises(UserError, match="--max-new-tokens lower"):
        chosen(one, "tea", max_new_tokens=400)


def test_prompts_are_the_tokens_of_training(tiny_world: Path) -> None:
    one = writer(tiny_world)
    tokenizer = one.tokenizer
    chat = [{"role": "user", "content": "tea"}]

    (plain,), (as_chat,) = chosen(one, "tea").ids[0], chosen(one, chat).ids[0]

    assert tokenizer.decode(plain) == "<s>tea"
    assert tokenizer.decode(as_chat) == "<s><|user|>tea</s><|assistant|>"
    assert Prompts("", ("tea", "maps")).as_chats().texts[0] == chat


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("rows", ["prompt alone", "pairs", "transcripts"])
def test_any_format_gives_its_prompts(tmp_path: Path, rows: str, zipped: bool) -> None:
    asked = [f"\n\nHuman: {thing}?\n\nAssistant:" for thing in ("tea", "maps", "tea")]
    made = {
        "prompt alone": [{"prompt": each} for each in asked],
        "pairs": [{"prompt": each, "chosen": f" yes {n}", "rejected": " no"} for n, each in enumerate(asked)],
        "transcripts": [
            {"chosen": f"{each} yes {n}", "rejected": f"{each} no"} for n, each in enumerate(asked)
        ],
    }[rows]
    text = "".join(json.dumps(row) + "\n" for row in made)
    file = tmp_path / ("p.jsonl.gz" if zipped else "p.jsonl")
    file.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())

    found = find_prompts(str(file), None, Silent())

    assert found.texts == tuple(asked[:2])
    assert not found.are_loose


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("tea\n\n  maps\ntea\n")
    found = find_prompts(str(file), None, Silent())
    assert found.texts == ("tea", "  maps")
    assert found.are_loose
    file.write_bytes("one\u2028line\r\nan\x0bother\x85one\rstill\n".encode())
    assert find_prompts(str(file), None, Silent()).texts == ("one\u2028line", "an\x0bother\x85one\rstill")
    file.write_text("\n")
    with pytest.raises(UserError, match="one on each line"):
        find_prompts(str(file), None, Silent())


def test_a_kind_of_file_that_cannot_be_read_is_told_all_that_can(tmp_path: Path) -> None:
    for name in ("prompts.md", "prompts.txt.gz", "prompts"):
        (tmp_path / name).write_text("tea\n")
        with pytest.raises(UserError, match=r"known are \.txt, .*\.jsonl"):
            find_prompts(str(tmp_path / name), None, Silent())


def test_a_split_is_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("tea\n")
    for wanted in ("tea?", str(tmp_path / "p.txt")):
        with pytest.raises(UserError, match="--split is of a data set"):
            find_prompts(wanted, "test", Silent())
    (tmp_path / "p.jsonl").write_text('{"prompt": "tea"}\n{"prompt": "maps"}\n')
    assert find_prompts(str(tmp_path / "p.jsonl"), "train[:1]", Silent()).texts == ("tea",)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"not UTF-8 text from character 5 on"):
        find_prompts("tea \udcff", None, Silent())


@pytest.mark.parametrize("temperature", [float("inf"), float("nan")])
def test_a_temperature_is_a_number(temperature: float) -> None:
    with pytest.raises(UserError, match="--temperature"):
        Drawing(temperature=temperature).require_finite()


def test_what_is_no_file_is_a_prompt_unless_it_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "word " * 300
    for text in (
        "tea",
        long,
        long + "1/2",
        "~nobody is at home",
        "zero \0 byte",
        "What is in data.json?",
        "either / or",
        "Human: what is 1/2 of tea?",
        "a\n/b",
    ):
        assert find_prompts(text, None, Silent()).texts == (text,)
    for path in ("my/prompts/x", "p.txt", "p.jsonl.gz", "../p", "/nowhere", "my/p.jsonl"):
        assert looks_like_path(path)
        with pytest.raises(UserError, match=r"no file|no such file"):
            find_prompts(path, None, Silent())
    with pytest.raises(UserError, match="empty"):
        find_prompts(" ", None, Silent())


def test_held_out_sets_take_turns(make_recipe: Any, tiny_world: Path) -> None:  # noqa: F811
    both = f"dataset.eval={{a: {tiny_world}/heldout.jsonl, b: {tiny_world}/pairs.jsonl}}"
    found = held_out_prompts(make_recipe("run", both), "RUN", Silent())

    assert found.texts[0].endswith("(2-0).\nAssistant:")  # of heldout.jsonl
    assert found.texts[1].endswith("(1-0).\nAssistant:")
    assert len(found.texts) == 96 + 24
    share = held_out_prompts(make_recipe("run", "dataset.eval={}", "dataset.holdout=0.2"), "RUN", Silent())
    assert 0 < len(share.texts) < 50
    with pytest.raises(UserError, match="no held-out prompts"):
        held_out_prompts(make_recipe("run", "dataset.eval={}"), "RUN", Silent())


def test_every_kind_of_policy_replies(shared_run: Run, tiny_world: Path, tmp_path: Path) -> None:  # noqa: F811
    adapter = shared_run("adapter", *TRAINED).run.path
    policies = [str(adapter), str(adapter / "model"), str(tiny_world / "model")]
    replies = [
        drawn(find_writers(each, None, Silent(), RunFinder())[0], Drawing(per_prompt=2)) for each in policies
    ]

    assert replies[0] == replies[1] != replies[2]  # the run's policy is its adapter's


def test_the_reference_is_what_the_run_began_with(
    shared_run: Run,  # noqa: F811
    tiny_world: Path,
) -> None:
    place = str(shared_run("adapter", *TRAINED).run.path)
    own, reference = find_writers(place, "reference", Silent(), RunFinder())

    assert own.run is not None
    assert own.run_id
    assert reference.name == "reference"
    base = drawn(writer(tiny_world), Drawing())
    assert drawn(reference, Drawing()) == base != drawn(own, Drawing())
    with pytest.raises(UserError, match="is a model, not a run"):
        find_writers(str(tiny_world / "model"), "reference", Silent(), RunFinder())


def test_a_policy_beside_itself_has_another_name(tiny_world: Path) -> None:
    place = str(tiny_world / "model")
    names = [each.name for each in find_writers(place, place, Silent(), RunFinder())]
    assert names == [place, f"{place} (2)"]


def test_missing_policies_are_named_by_their_argument(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^RUN: there is no folder"):
        find_writers(str(tmp_path / "none"), None, Silent(), RunFinder())
    with pytest.raises(UserError, match=r"^--against: there is no folder"):
        find_writers(str(tiny_world / "model"), str(tmp_path / "none"), Silent(), RunFinder())


def test_a_prompt_must_fit_both_policies(tiny_world: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "small", hidden=16)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["max_position_embeddings"] = 40
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    both = find_writers(str(tiny_world / "model"), str(tmp_path / "small"), Silent(), RunFinder())
    readers = [each.reader for each in both]

    asked = choose(Prompts("a test", ("tea " * 30, "tea")), 8, readers, None, Silent())

    assert asked.texts == ("tea",)
    assert asked.max_new_tokens == 20
    assert len(asked.ids) == 2
