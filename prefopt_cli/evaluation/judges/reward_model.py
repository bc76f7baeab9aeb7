"""A judge that scores every reply by itself: a sequence classifier with one label. The higher score wins."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from prefopt_cli.data.examples import Text, plain_text
from prefopt_cli.data.special_tokens import encode, render
from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.judges.judging import JudgingStopped, Question, Verdict
from prefopt_cli.models.loading_errors import loading_errors
from prefopt_cli.models.policy import near_folder
from prefopt_cli.training.reporting import Reporter

KEY = "--judge reward-model"

NO_LIMIT = 10**9
"""Tokenizers that know no limit name one beyond this."""

AFTER_PADDING = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Kinds of models that count positions from the number of their padding token on, so that they have fewer of them."""

Reply = tuple[Text, str]
"""A prompt, and a reply to it."""


class RewardModelJudge:
    """Scores replies, each once: the verdicts in both orders follow from the same two scores."""

    def __init__(self, place: str, *, device: torch.device | None = None, batch_size: int = 8) -> None:
        """Configuration and tokenizer are read; weights wait until `check` or until there is something to score.

        Args:
            place: folder or hub id of a sequence classifier.
            device: where it runs; by default a GPU if there is one.
            batch_size: replies that are scored together.

        Raises:
            UserError: there is no such model, it has more labels than one, or another model's tokenizer.
        """
        self._place, self._local = _resolved(place)
        with _loading(place, "the model", local=self._local):
            self._config = AutoConfig.from_pretrained(self._place, trust_remote_code=False)
        if self._config.num_labels != 1:
            raise UserError(
                f"{KEY}: {place} has {self._config.num_labels} labels, so it is no reward model: one score is needed. "
                "Name a sequence classifier with num_labels 1."
            )
        with _loading(place, "the tokenizer of", local=self._local):
            self._tokenizer = AutoTokenizer.from_pretrained(self._place, trust_remote_code=False)
        self._name = place
        if self._tokenizer.vocab_size > self._vocabulary:
            raise self._foreign(self._tokenizer.vocab_size)
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_size = batch_size
        self._scores: dict[str, float] = {}
        self._cut: set[str] = set()
        self._cut_replies: set[str] = set()

    @property
    def truncated(self) -> int:
        """Different replies that had to lose the beginning of their prompt to be scored."""
        return len(self._cut)

    @property
    def truncated_replies(self) -> int:
        """Different replies that had to lose their whole prompt, and their own beginning."""
        return len(self._cut_replies)

    @property
    def _vocabulary(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    def check(self) -> None:
        """See `Judge`: whether the weights are there and whole; they are not kept.

        Raises:
            UserError: they are not.
        """
        self._load(torch.device("meta"))

    def verdicts(
        self, questions: Sequence[Question], reporter: Reporter, stopping: Callable[[], bool] = lambda: False
    ) -> list[Verdict]:
        """See `Judge`; equal scores tie."""
        replies = [(each.prompt, text) for each in questions for text in (each.first, each.second)]
        scores = self.scores(replies, reporter, stopping)
        return [
            Verdict.TIE if first == second else Verdict.FIRST if first > second else Verdict.SECOND
            for first, second in zip(scores[::2], scores[1::2], strict=True)
        ]

    def scores(
        self, replies: Sequence[Reply], reporter: Reporter, stopping: Callable[[], bool] = lambda: False
    ) -> list[float]:
        """The score of each reply; a reply that was scored before keeps its score.

        Raises:
            UserError: the model cannot be loaded, its chat template refuses a reply, or it lacks a token of a reply.
            PrefoptError: a score is not finite.
            JudgingStopped: a signal came.
        """
        keys = [repr(each) for each in replies]
        new = {key: each for key, each in zip(keys, replies, strict=True) if key not in self._scores}
        if new:
            ids = {key: self._ids(key, *each) for key, each in new.items()}
            # By length, so that little is padded.
            self._score(sorted(ids.items(), key=lambda each: len(each[1])), reporter, stopping)
        return [self._scores[key] for key in keys]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "judge": f"reward-model:{self._name}",
            "scored": len(self._scores),
            "truncated": self.truncated,
            "truncated_replies": self.truncated_replies,
            "max_length": self._limit(),
        }

    def _score(
        self, rows: Sequence[tuple[str, list[int]]], reporter: Reporter, stopping: Callable[[], bool]
    ) -> None:
        model = self._load(self._device)
        padding = _padding_id(self._config, self._tokenizer)
        if padding is not None:
            model.config.get_text_config().pad_token_id = padding  # where the last token is looked for
        size = self._batch_size if padding is not None else 1
        for start in range(0, len(rows), size):
            if stopping():
                raise JudgingStopped
            batch = rows[start : start + size]
            scores = _scores(model, [ids for _, ids in batch], padding or 0, self._device)
            for (key, _), score in zip(batch, scores, strict=True):
                if not torch.isfinite(torch.tensor(score)):
                    raise PrefoptError(
                        f"{KEY}: {self._name} gives a score that is not finite ({score}). Its weights are damaged, or "
                        "it needs another type of numbers."
                    )
                self._scores[key] = score
            reporter.progress("scoring replies", start + len(batch), len(rows))
        del model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, device: torch.device) -> Any:
        with _loading(self._name, "the model", local=self._local):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                self._place,
                output_loading_info=True,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                device_map=device,
            )
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(
                f"{KEY}: {self._name} lacks weights ({', '.join(missing[:3])}), so its scores would be random. Name a "
                "model that was trained as a reward model."
            )
        return model.eval().requires_grad_(False)

    def _foreign(self, token: int) -> UserError:
        return UserError(
            f"{KEY}: the tokenizer of {self._name} has more tokens than its model ({self._vocabulary:,}; it needs "
            f"{token:,} or more), so it is another model's. Put the model's own tokenizer beside it."
        )

    def _ids(self, key: str, prompt: Text, reply: str) -> list[int]:
        """Tokens of prompt and reply; where they are too many, the prompt loses its beginning, then the reply does."""
        tokenizer, text = self._tokenizer, self._text(prompt, reply)
        if self._goes_through_template(prompt):
            ids = list(encode(tokenizer, [text])[0])
        else:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
        if max(ids, default=0) >= self._vocabulary:
            raise self._foreign(max(ids) + 1)
        limit = self._limit()
        if limit is None or len(ids) <= limit:
            return ids
        start = self._start(ids)
        before = encode(tokenizer, [self._text(prompt, None)])[0]
        is_reply_cut = len(ids) - limit > len(before) - self._start(before)
        (self._cut_replies if is_reply_cut else self._cut).add(key)
        return [*ids[:start], *ids[start - limit :]]

    def _goes_through_template(self, prompt: Text) -> bool:
        return not isinstance(prompt, str) and bool(self._tokenizer.chat_template)

    def _text(self, prompt: Text, reply: str | None) -> str:
        """Of a prompt with a reply to it; without one, what stands before any reply."""
        if isinstance(prompt, str) or not self._goes_through_template(prompt):
            return (prompt if isinstance(prompt, str) else f"{plain_text(prompt)}\n\n") + (reply or "")
        answer = [] if reply is None else [{"role": "assistant", "content": reply}]
        try:
            return render(self._tokenizer, [*prompt, *answer], generation_prompt=reply is None)
        except jinja2.TemplateError as error:
            raise UserError(f"{KEY}: the chat template of {self._name} refuses a prompt: {error}") from error

    def _start(self, ids: list[int]) -> int:
        """How many tokens in front are the tokenizer's own, such as [CLS], and must stay."""
        bare, dressed = encode(self._tokenizer, ["a"])[0], list(self._tokenizer("a")["input_ids"])
        own = next((n for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), 0)
        return own if ids[:own] == dressed[:own] else 0

    def _limit(self) -> int | None:
        """The most tokens that the model takes; None where it says nothing."""
        config = self._config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and config.model_type in AFTER_PADDING:
            positions -= (config.pad_token_id or 0) + 1
        limits = [self._tokenizer.model_max_length, positions]
        return min((each for each in limits if each is not None and 0 < each < NO_LIMIT), default=None)


@torch.no_grad()
def _scores(model: Any, rows: Sequence[list[int]], padding: int, device: torch.device) -> list[float]:
    """(B,) scores of token lists, padded on the right."""
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(input_ids)
    for number, ids in enumerate(rows):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        mask[number, : len(ids)] = 1
    logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
    found: list[float] = logits[:, 0].double().tolist()
    return found


def _padding_id(config: Any, tokenizer: Any) -> int | None:
    """A token that fills rows up, known to the model; None where there is none, so that rows go one by one."""
    vocabulary = config.get_text_config().vocab_size
    for wanted in (config.get_text_config().pad_token_id, tokenizer.pad_token_id):
        if wanted is not None and 0 <= wanted < vocabulary:
            return int(wanted)
    return None


@contextmanager
def _loading(place: str, what: str, *, local: bool) -> Iterator[None]:
    """As `loading_errors`, for a model whose own code is never run."""
    try:
        with loading_errors(place, f"{KEY}: {what}", local=local):
            yield
    except UserError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{KEY}: {place} brings its own code, which is not run for a judge. Name another model."
        ) from error


def _resolved(place: str) -> tuple[str, bool]:
    """The folder or hub id, and whether it is a folder."""
    path = Path(place).expanduser()
    if place and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{KEY}: the folder {place} holds no model (it has no config.json).")
        return str(path), True
    if not place or path.exists() or place.count("/") > 1 or place.startswith(("/", ".", "~")):
        raise UserError(f"{KEY}: there is no folder {place or '(empty)'} in {Path.cwd()}.{near_folder(path)}")
    return place, False
