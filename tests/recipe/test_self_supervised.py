"""The settings of self_supervised, which hold those of an alignment loss."""

import pytest

from prefopt_cli.data.stopwords import find_stopwords
from prefopt_cli.errors import UserError
from prefopt_cli.recipe import dump_recipe
from prefopt_cli.recipe.schema import METHODS, TAKE_LISTS, GPOSettings, SoftSettings
from prefopt_cli.recipe.stopwords import LANGUAGE_NAMES, languages, stopwords_problem

BEST = ["training.load_best_model_at_end=true", "training.save_strategy=epoch"]
EMPTY = "an empty stop list makes one key phrase of all words up to the next punctuation mark"

# (what stands in the place of `levels: 3`, line 15, beside gpo; the message)
MISTAKES = [
    (
        "levels: 1",
        "levels: expected a number at least 2, found 1; with a single level there is nothing to tell",
    ),
    ("levels: 33", "levels: expected a number at most 32, found 33; few responses have so many key phrases"),
    ("levels: 4.0", "levels: expected an integer, found 4.0; write 4"),
    ("levels_per_step: 0", "levels_per_step: expected a number at least 1, found 0"),
    (
        "levels_per_step: 5",
        "levels_per_step: cannot draw 5 of 4 levels; use at most 4, or raise method.levels",
    ),
    ("apply_to: bth", "apply_to: expected both, chosen or rejected, found 'bth'; did you mean 'both'?"),
    ("pooling: max", "pooling: expected last or mean, found 'max'"),
    ("ssl_coef: -1", "ssl_coef: expected a number at least 0.0, found -1"),
    ("ssl_coef: .inf", "ssl_coef: expected a finite number"),
    ("head_learning_rate: 0", "head_learning_rate: expected a number greater than 0.0, found 0"),
    ("stopwords: ''", f"stopwords: {EMPTY}; name a language such as en, a file, or the words"),
    ("stopwords: []", f"stopwords: {EMPTY}"),
    ("stopwords: ['', ' ']", f"stopwords: {EMPTY}"),
    ("stopwords: [the, 1]", "stopwords.1: expected a string, found 1"),
    (
        "stopwords: 3",
        "stopwords: expected a string or a list, found 3; write en, a file with one word per line, or",
    ),
    ("stopwords: english", "found 'english'; did you mean 'en'?"),
    ("stopwords: deutsh", "language codes (en, de, fr, ...), a file or a list of words, found 'deutsh'"),
    ("stopwords: en_US", "found 'en_US'; did you mean 'en'?"),
    ("gamma: 1", "gamma: unknown key; did you mean method.ssl_coef?"),
    ("ssl_weight: 1", "ssl_weight: unknown key; did you mean method.ssl_coef?"),
    ("num_levels: 3", "num_levels: unknown key; did you mean method.levels?"),
    ("head_lr: 1e-3", "head_lr: unknown key; did you mean method.head_learning_rate?"),
    ("stop_words: en", "stop_words: unknown key; did you mean method.stopwords?"),
    ("levls: 3", "levls: unknown key; did you mean 'levels'?"),
    ("beta: 0.1", "beta: unknown key; did you mean method.align.beta?"),
    ("loss: hinge", "loss: unknown key; did you mean method.align.loss?"),
    (
        "alpha: 1",
        "alpha: unknown key; method.align soft has it, gpo does not; valid in method.align: loss, beta, length_nor",
    ),
]

# (what stands in the place of `alpha: 0.1`, line 14, under align; the message)
MISTAKES_OF_ALIGN = [
    ("alhpa: 1", "alhpa: unknown key; did you mean 'alpha'?"),
    ("alpha: 0", "alpha: expected a number greater than 0.0, found 0"),
    ("levels: 3", "levels: unknown key; did you mean method.levels?"),
    ("stop_words: en", "stop_words: unknown key; did you mean method.stopwords?"),
    (
        "beta: 0.1",
        "beta: unknown key; method.align gpo or sequential has it, soft does not; valid here: alpha, kl_coef",
    ),
    ("gamma: 1", "gamma: unknown key; did you mean method.align.mu.gamma or method.ssl_coef?"),
    ("sample_every: 4", "sample_every: unknown key; did you mean method.align.regularizer.sample_every?"),
    ("mu: 0.5", "mu: expected none, found 0.5; write none, or {gamma: 0.1}"),
    ("mu: {gamma: 1, clamp: 3}", "mu.clamp: unknown key"),
    ("regularizer: none", "regularizer: expected a mapping, found 'none'; write {sample_every: 8, ...}"),
    ("regularizer: {num_promts: 3}", "regularizer.num_promts: unknown key; did you mean 'num_prompts'?"),
    (
        "regularizer: {prompts: [{source: x, splitt: a}]}",
        "prompts.0.splitt: unknown key; did you mean 'split'?",
    ),
    (
        "regularizer: {prompts: sandbox:hepful}",
        "regularizer.prompts: sandbox:hepful: the sandbox has no dimension",
    ),
]

# (what stands in the place of the whole of `align`, from line 12; the message)
OTHER_ALIGNS = [
    ("align: {}", "12  method.align.name: missing; one of gpo, soft, sequential"),
    (
        "align: gpo",
        "12  method.align: expected a mapping, found 'gpo'; write the alignment loss: {name: gpo, ...}",
    ),
    (
        "align: {name: gop}",
        "method.align.name: expected one of gpo, soft, sequential, found 'gop'; did you mean 'gpo'?",
    ),
    ("align: {name: [gpo]}", "method.align.name: expected one of gpo, soft, sequential, found a list"),
    (
        "align: {name: self_supervised, align: {name: gpo}}",
        "method.align.name: self_supervised adds to an alignment loss and cannot be one itself; use one of gpo, soft, "
        "sequential",
    ),
    ("ssl_coef: 1", "10  method.align: missing; write the alignment loss: {name: gpo, ...}"),
]


def _one_mistake(message: str) -> str:
    first, *others = message.splitlines()
    assert first == "my.yaml: 1 mistake", message
    return "\n".join(others)


@pytest.mark.parametrize(("new", "part"), MISTAKES, ids=[new for new, _ in MISTAKES])
def test_a_mistake_in_its_own_settings(refusal, beside_gpo, new, part):
    told = _one_mistake(refusal(beside_gpo.replace("levels: 3", new)))
    assert told.startswith(f"  my.yaml:15  method.{new.partition(':')[0]}")
    assert part in told


@pytest.mark.parametrize(("new", "part"), MISTAKES_OF_ALIGN, ids=[new for new, _ in MISTAKES_OF_ALIGN])
def test_a_mistake_in_the_alignment_loss(refusal, beside_soft, new, part):
    told = _one_mistake(refusal(beside_soft.replace("alpha: 0.1", new)))
    assert told.startswith(f"  my.yaml:14  method.align.{new.partition(':')[0]}")
    assert part in told


@pytest.mark.parametrize(("new", "part"), OTHER_ALIGNS, ids=[new for new, _ in OTHER_ALIGNS])
def test_a_mistake_in_which_alignment_loss(refusal, beside_gpo, new, part):
    told = _one_mistake(refusal(beside_gpo.replace("align:\n    name: gpo\n    beta: 0.1", new)))
    assert part in told


def test_settings_written_flat_are_told_where_they_belong(refusal, sound):
    """As someone would write it who adds a loss to a recipe of gpo."""
    told = refusal(sound.replace("name: gpo", "name: self_supervised")).splitlines()
    assert told == [
        "my.yaml: 3 mistakes",
        "  my.yaml:10  method.align: missing; write the alignment loss: {name: gpo, ...}",
        "  my.yaml:12  method.loss: unknown key; did you mean method.align.loss?",
        "  my.yaml:13  method.beta: unknown key; did you mean method.align.beta?",
    ]


def test_its_keys_under_another_method_name_it(refusal, sound):
    told = _one_mistake(refusal(sound.replace("beta: 0.1", "levels: 4")))
    assert "method.levels: unknown key; method self_supervised has it, gpo does not; valid here: loss" in told


def test_training_fields_of_the_loss_point_into_align(refusal, beside_gpo):
    assert "method.align.beta" in refusal(beside_gpo, "training.beta=0.1")


def test_the_alignment_of_each_method(load, sound, soft, beside_gpo, beside_soft):
    for text, kind in ((sound, GPOSettings), (soft, SoftSettings)):
        method = load(text).method
        assert method.alignment is method
        assert isinstance(method, kind)
    for text, kind in ((beside_gpo, GPOSettings), (beside_soft, SoftSettings)):
        method = load(text).method
        assert method.alignment is method.align
        assert isinstance(method.alignment, kind)
    assert set(TAKE_LISTS) < set(METHODS)


@pytest.mark.parametrize(
    "setting",
    ["method.align.loss=hinge", "method.align={name: soft, mu: {gamma: 0.1}}", "method.stopwords=[a, no]"],
)
def test_it_survives_being_written_down(load, beside_gpo, setting):
    recipe = load(beside_gpo, setting)
    assert load(dump_recipe(recipe)) == recipe


def test_lists_are_those_of_the_alignment_loss(load, refusal, beside_gpo, beside_soft):
    told = _one_mistake(refusal(beside_gpo, "dataset.lists=whole"))
    assert told.endswith(
        "dataset.lists: method.align gpo compares pairs; use all_pairs or adjacent_pairs, or method.align soft"
    )
    load(beside_soft, "dataset.lists=whole")


def test_weights_need_pairs_to_compare(load, refusal, beside_soft):
    weighted = beside_soft.replace("alpha: 0.1", "mu: {gamma: 1}")
    told = _one_mistake(refusal(weighted, "training.per_device_train_batch_size=1"))
    assert told.startswith(
        "  my.yaml:14  method.align.mu: weighs the pairs that go through the model together"
    )
    load(weighted)


def test_beside_soft_no_data_are_scored_with_the_reference(load, refusal, beside_gpo, beside_soft):
    told = _one_mistake(refusal(beside_soft, "training.precompute_ref_log_probs=true"))
    assert told.endswith("method.align soft never scores the data with the reference policy; leave it out")
    load(beside_gpo, "training.precompute_ref_log_probs=true")


@pytest.mark.parametrize(
    "stopwords", ["de", "EN", "no", "words.txt", "lists/mine", "words", "[the, of]", "zh"]
)
def test_languages_files_and_lists_of_stop_words(load, beside_gpo, stopwords, tmp_path, monkeypatch):
    """`no` is Norwegian. What a file holds is found out where it is read."""
    (tmp_path / "lists").mkdir()
    for name in ("words.txt", "lists/mine", "words"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    method = load(beside_gpo, f"method.stopwords={stopwords}").method
    assert method.stopwords == (["the", "of"] if stopwords.startswith("[") else stopwords)


@pytest.mark.parametrize("setting", ["words.txt", "~nosuchuser/x", "lists", "lists/", "x" * 300 + ".txt"])
def test_a_file_that_is_not_there_is_told_when_it_is_read(load, beside_gpo, setting, tmp_path, monkeypatch):
    """Not with the recipe: that of an earlier run is read again, perhaps in another folder."""
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load(beside_gpo, f"method.stopwords={setting}").method.stopwords == setting
    with pytest.raises(UserError, match=r"^method\.stopwords: "):
        find_stopwords(setting)


def test_an_unknown_language_is_told_with_all_other_mistakes(refusal, beside_gpo):
    """In the words of the function that looks for its stop words."""
    told = refusal(beside_gpo.replace("levels: 3", "stopwords: norsk\n  levels: 1")).splitlines()
    assert told[0] == "my.yaml: 2 mistakes"
    with pytest.raises(UserError) as raised:
        find_stopwords("norsk")
    assert told[1] == f"  my.yaml:15  {raised.value}".removesuffix(".")


def test_every_language_is_known_by_its_name():
    assert set(LANGUAGE_NAMES.values()) == set(languages())
    for name, code in LANGUAGE_NAMES.items():
        for written in (name, name.title(), f"{name}s"):
            assert stopwords_problem(written).endswith(f", found '{written}'; did you mean '{code}'?")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("norweigan", "'no'"),
        ("chineese", "'zh'"),
        ("pt-BR", "'pt'"),
        ("eng", "'en'"),
        ("ger", "'de'"),
        ("lat", "'la' or 'lv'"),
        ("english_US", "'en'"),
    ],
)
def test_languages_that_may_be_meant(written, meant):
    assert stopwords_problem(written).endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    "written", ["javanese", "guarani", "albanian", "nepali", "deutsch", "xq", "klingon", "english words"]
)
def test_other_languages_are_not_taken_for_their_neighbours(written):
    assert stopwords_problem(written).endswith(f"found '{written}'")


@pytest.mark.parametrize(
    ("metric", "of_gpo", "of_soft"),
    [
        ("loss", True, True),
        ("ssl/loss", True, True),
        ("ssl/accuracy", True, True),
        ("ssl/accuracy_level_2", True, True),
        ("ssl/accuracy_level_3", False, False),  # levels: 3 are 0, 1 and 2
        ("align/loss", False, False),  # an evaluation calls it loss
        ("gpo/gradient_weight", True, False),
        ("soft/gradient_weight", False, True),
    ],
)
def test_the_best_model_goes_by_both_losses(load, refusal, beside_gpo, beside_soft, metric, of_gpo, of_soft):
    chosen = f"training.metric_for_best_model=helpful_{metric}"
    for text, reported in ((beside_gpo, of_gpo), (beside_soft, of_soft)):
        if reported:
            load(text, *BEST, chosen)
        else:
            assert "expected a metric of one eval set" in _one_mistake(refusal(text, *BEST, chosen))


def test_mistaken_levels_cause_no_follow_up_mistakes(refusal, sound, beside_gpo):
    mistaken = beside_gpo.replace("levels: 3", "levels: '8'")
    more = ["method.levels_per_step=6", *BEST, "training.metric_for_best_model=helpful_ssl/accuracy_level_7"]
    assert "method.levels: expected an integer" in _one_mistake(refusal(mistaken, *more))
    unknown = beside_gpo.replace("name: gpo", "name: gop")
    assert "method.align.name" in _one_mistake(
        refusal(unknown, *BEST, more[-1].replace("level_7", "level_2"))
    )
    assert "ssl/accuracy" in _one_mistake(refusal(sound, *BEST, more[-1]))
