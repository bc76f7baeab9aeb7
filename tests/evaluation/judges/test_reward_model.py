"""A sequence classifier as a judge: what it is asked, padding, truncation, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.judges.judging import JudgingStopped, Question, Verdict
from prefopt_cli.evaluation.judges.reward_model import RewardModelJudge
from prefopt_cli.training.reporting import Silent
from tests.tiny import build_tokenizer

PLAIN = [("tea?", " With pleasure: tea."), ("tea?", " No."), ("What about the maps and the snow?", " Maps.")]
CHAT = [{"role": "user", "content": "tea?"}]


def build_reward_model(
    folder: Path, *, labels: int = 1, context: int = 128, vocabulary: int | None = None
) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = context
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
        initializer_range=0.3,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reward_model(tmp_path_factory.mktemp("reward"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    found = json.loads((folder / name).read_text())
    found.update(changes)
    (folder / name).write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def by_hand(folder: Path, text: str, *, special: bool = True) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = build_tokenizer()(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


def test_scores_are_the_models_own_whatever_stands_beside_them(place: Path) -> None:
    expected = [by_hand(place, prompt + reply) for prompt, reply in PLAIN]

    for size in (1, 3):
        scores = RewardModelJudge(str(place), batch_size=size).scores(PLAIN, Silent())
        assert scores == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3


def test_chats_go_through_the_models_template(place: Path) -> None:
    (score,) = RewardModelJudge(str(place)).scores([(CHAT, "Tea.")], Silent())
    text = "<s><|user|>tea?</s><|assistant|>Tea.</s>"
    assert score == pytest.approx(by_hand(place, text, special=False), abs=1e-5)


def test_chats_without_a_template_are_plain_text(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder, "tokenizer_config.json", chat_template=None)

    (score,) = RewardModelJudge(str(folder)).scores([(CHAT, "Tea.")], Silent())
    assert score == pytest.approx(by_hand(place, "tea?\n\nTea."), abs=1e-5)


@pytest.mark.parametrize("in_tokenizer", [False, True])
def test_a_missing_padding_token_is_made_up_for(place: Path, tmp_path: Path, in_tokenizer: bool) -> None:
    folder = shutil.copytree(place, tmp_path / "unpadded")
    edit(folder, "config.json", pad_token_id=None)
    if not in_tokenizer:
        edit(folder, "tokenizer_config.json", pad_token=None)

    scores = RewardModelJudge(str(folder), batch_size=3).scores(PLAIN, Silent())
    assert scores == pytest.approx([by_hand(place, prompt + reply) for prompt, reply in PLAIN], abs=1e-5)


def test_long_prompts_lose_their_beginning_but_not_the_bos(place: Path) -> None:
    judge = RewardModelJudge(str(place))
    long = "tea and maps " * 100
    (score,) = judge.scores([(long, " With pleasure.")], Silent())

    tokenizer = build_tokenizer()
    whole = tokenizer(long + " With pleasure.")["input_ids"]
    kept = tokenizer.decode([whole[0], *whole[-127:]])
    assert kept.endswith(" With pleasure.")
    assert score == pytest.approx(by_hand(place, kept, special=False), abs=1e-5)
    assert judge.truncated == judge.to_dict()["truncated"] == 1
    judge.scores([(long, " With pleasure."), *PLAIN], Silent())
    assert judge.truncated == 1
    assert judge.to_dict()["scored"] == 4


@pytest.mark.parametrize("chat", [False, True])
def test_long_replies_lose_their_beginning_too_and_are_counted_apart(place: Path, chat: bool) -> None:
    judge = RewardModelJudge(str(place))
    prompt, long = CHAT if chat else "tea?", "tea and maps " * 100
    judge.scores([(prompt, long)], Silent())
    assert (judge.truncated, judge.truncated_replies) == (0, 1)
    prompt = [{"role": "user", "content": long}] if chat else long
    judge.scores([(prompt, " With pleasure.")], Silent())
    told = judge.to_dict()
    assert (told["truncated"], told["truncated_replies"]) == (1, 1)


def test_positions_that_begin_after_the_padding_token_are_fewer(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 10**30
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = RewardModelJudge(str(tmp_path))

    assert judge.to_dict()["max_length"] == 40 - tokenizer.pad_token_id - 1
    assert len(judge.scores([("tea and maps " * 100, " With pleasure."), *PLAIN], Silent())) == 4


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    place = build_reward_model(tmp_path / "small", vocabulary=100)
    with pytest.raises(UserError, match=r"has more tokens than its model \(100;"):
        RewardModelJudge(str(place))


def test_a_token_that_was_added_and_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    place = build_reward_model(tmp_path / "added")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(place)
    judge = RewardModelJudge(str(place))
    assert judge.scores(PLAIN, Silent())
    with pytest.raises(UserError, match="has more tokens than its model"):
        judge.scores([("tea?", "<more>")], Silent())


def test_weights_are_looked_at_before_there_is_anything_to_score(place: Path, tmp_path: Path) -> None:
    RewardModelJudge(str(place)).check()
    folder = shutil.copytree(place, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or cut off"):
        RewardModelJudge(str(folder)).check()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in safetensors format"):
        RewardModelJudge(str(folder)).check()


def test_verdicts_follow_from_the_scores_and_the_order(place: Path) -> None:
    judge = RewardModelJudge(str(place))
    (prompt, kind), (_, rude) = PLAIN[:2]
    high, low = judge.scores([(prompt, kind), (prompt, rude)], Silent())
    questions = [Question(prompt, kind, rude), Question(prompt, rude, kind), Question(prompt, kind, kind)]

    own = Verdict.FIRST if high > low else Verdict.SECOND
    other = Verdict.SECOND if high > low else Verdict.FIRST
    assert judge.verdicts(questions, Silent()) == [own, other, Verdict.TIE]
    assert judge.to_dict()["scored"] == 2


def test_more_labels_than_one_are_refused(tmp_path: Path) -> None:
    two = build_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(UserError, match=r"has 2 labels.*num_labels 1"):
        RewardModelJudge(str(two))


def test_a_language_model_without_a_head_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_world / "model", tmp_path / "headless")
    with pytest.raises(UserError, match="has 2 labels"):
        RewardModelJudge(str(folder))
    edit(folder, "config.json", num_labels=1, id2label={"0": "A"}, label2id={"A": 0})
    with pytest.raises(UserError, match=r"lacks weights \(score.weight\)"):
        RewardModelJudge(str(folder)).check()
    with pytest.raises(UserError, match=r"lacks weights \(score.weight\)"):
        RewardModelJudge(str(folder)).scores(PLAIN, Silent())


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for wanted in (str(tmp_path / "none"), "./none", ""):
        with pytest.raises(UserError, match="there is no folder"):
            RewardModelJudge(wanted)
    with pytest.raises(UserError, match="holds no model"):
        RewardModelJudge(str(tmp_path))


def test_code_of_a_model_is_never_run(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place, tmp_path / "own-code")
    (folder / "own.py").write_text("raise SystemExit('run')")
    edit(folder, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(UserError, match="brings its own code, which is not run"):
        RewardModelJudge(str(folder))


def test_a_score_that_is_not_finite_is_an_error(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    model = AutoModelForSequenceClassification.from_pretrained(place)
    model.score.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    with pytest.raises(PrefoptError, match="not finite"):
        RewardModelJudge(str(folder)).scores(PLAIN, Silent())


def test_a_signal_stops_it(place: Path) -> None:
    with pytest.raises(JudgingStopped):
        RewardModelJudge(str(place)).scores(PLAIN, Silent(), lambda: True)
