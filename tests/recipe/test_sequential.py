"""The settings of sequential, which names the runs of earlier stages; and the name of a dimension."""

import pytest

from prefopt_cli.recipe import dump_recipe
from prefopt_cli.recipe.schema import TAKE_LISTS, SequentialSettings
from tests.recipe.conftest import OF_GPO

LORA = "adapter={type: lora}"
BEST = ["training.load_best_model_at_end=true", "training.save_strategy=epoch"]

# (what stands in the place of `previous: [runs/a]`, line 12; the message)
MISTAKES_OF_PREVIOUS = [
    ("previous: []", "previous: expected at least one entry, found an empty list"),
    (
        "previous: runs/a",
        "previous: expected a list, found 'runs/a'; name the run folders of the earlier stages in order",
    ),
    ("previous: {a: runs/a}", "previous: expected a list, found a mapping"),
    ("previous: null", "previous: expected a list, found null"),
    ("previous: [runs/a, '']", "previous.1: expected a text that is not empty, found ''"),
    ("previous: [1]", "previous.0: expected a string, found 1"),
]

# (what stands in the place of `lambdas: {a: 0.5}`, line 13; the message)
MISTAKES_OF_LAMBDAS = [
    ("lambdas: -1", "lambdas: expected a number at least 0.0, found -1"),
    ("lambdas: {a: -0.5}", "lambdas.a: expected a number at least 0.0, found -0.5"),
    ("lambdas: '0.5'", "lambdas: expected a number or a mapping, found '0.5'; write "),
    ("lambdas: {a: '0.5'}", "lambdas.a: expected a number, found '0.5'; write 0.5 without quotes"),
    (
        "lambdas: [0.5]",
        "lambdas: expected a number or a mapping, found a list; write one number of at least 0, or one for",
    ),
    ("lambdas: true", "lambdas: expected a number or a mapping, found true"),
    ("lambdas: null", "lambdas: expected a number or a mapping, found null"),
    ("lambdas: .inf", "lambdas: expected a finite number"),
    ("lambdas: {a: .nan}", "lambdas.a: expected a finite number, found nan"),
    ("lambdas: {a: {b: 1}}", "lambdas.a: expected a number, found a mapping"),
    ("lambdas: {1: 0.5}", "lambdas: a key must be a string; put 1 in quotes"),
]

# (what stands in line 14, after all that is needed; the message)
OTHER_MISTAKES = [
    ("adapter_per_stage: old", "adapter_per_stage: expected continue or new, found 'old'"),
    ("beta: 0", "beta: expected a number greater than 0.0, found 0"),
    ("loss: ipo", "'squared'"),
    ("lambda: 0.5", "lambda: unknown key; did you mean 'lambdas'?"),
    ("betas: [0.1]", "betas: unknown key; did you mean 'beta'?"),
    ("dimension: a", "dimension: unknown key; it belongs elsewhere: dimension"),
    (
        "alpha: 1",
        "alpha: unknown key; method soft has it, sequential does not; valid here: loss, beta, length",
    ),
    ("levels: 3", "levels: unknown key; method self_supervised has it, sequential does not"),
]


@pytest.fixture
def sequential(sound: str) -> str:
    """A sound recipe of method sequential, with its name in line 11, previous in line 12 and lambdas in line 13."""
    return sound.replace(OF_GPO, "  name: sequential\n  previous: [runs/a]\n  lambdas: {a: 0.5}\n")


@pytest.fixture
def beside(beside_gpo: str) -> str:
    """A sound recipe of method self_supervised beside sequential, with previous in line 14."""
    inner = "name: sequential\n    previous: [runs/a]\n    lambdas: 0.5"
    return beside_gpo.replace("name: gpo\n    beta: 0.1", inner)


def _one_mistake(message: str) -> str:
    first, *others = message.splitlines()
    assert first == "my.yaml: 1 mistake", message
    return "\n".join(others)


def test_defaults(load, sequential):
    method = load(sequential).method
    assert method.alignment is method
    assert method == SequentialSettings(
        name="sequential",
        loss="logistic",
        beta=0.1,
        length_normalize=False,
        previous=["runs/a"],
        lambdas={"a": 0.5},
        adapter_per_stage="continue",
    )
    assert "sequential" not in TAKE_LISTS


@pytest.mark.parametrize(
    ("setting", "lambdas"),
    [
        ("method.lambdas=0.5", 0.5),
        ("method.lambdas=0", 0),
        ("method.lambdas=1e-2", 0.01),
        ("method.lambdas={a: 0, helpful.v2: 3}", {"a": 0, "helpful.v2": 3}),
    ],
)
def test_lambdas_are_one_number_or_one_for_each_dimension(load, sequential, setting, lambdas):
    """Which dimensions there are is known once the runs are looked at."""
    recipe = load(sequential, setting, "method.loss=hinge", "method.adapter_per_stage=new", LORA)
    assert recipe.method.lambdas == lambdas
    assert load(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(("new", "part"), MISTAKES_OF_PREVIOUS, ids=[new for new, _ in MISTAKES_OF_PREVIOUS])
def test_a_mistake_in_the_earlier_runs(refusal, sequential, new, part):
    told = _one_mistake(refusal(sequential.replace("previous: [runs/a]", new)))
    assert told.startswith("  my.yaml:12  method.previous")
    assert part in told


@pytest.mark.parametrize(("new", "part"), MISTAKES_OF_LAMBDAS, ids=[new for new, _ in MISTAKES_OF_LAMBDAS])
def test_a_mistake_in_the_weights(refusal, sequential, new, part):
    told = _one_mistake(refusal(sequential.replace("lambdas: {a: 0.5}", new)))
    assert told.startswith("  my.yaml:13  method.lambdas")
    assert part in told


@pytest.mark.parametrize(("new", "part"), OTHER_MISTAKES, ids=[new for new, _ in OTHER_MISTAKES])
def test_another_mistake(refusal, sequential, new, part):
    told = _one_mistake(refusal(sequential.replace("lambdas: {a: 0.5}", f"lambdas: 1\n  {new}")))
    assert told.startswith(f"  my.yaml:14  method.{new.partition(':')[0]}: ")
    assert part in told


def test_both_keys_of_its_own_are_needed(refusal, sound):
    told = refusal(sound.replace("name: gpo", "name: sequential")).splitlines()
    assert told == [
        "my.yaml: 2 mistakes",
        "  my.yaml:10  method.previous: missing; name the run folders of the earlier stages in order: [runs/helpful]",
        "  my.yaml:10  method.lambdas: missing; write one number of at least 0, or one for every earlier dimension: "
        "{helpful: 0.5}",
    ]


@pytest.mark.parametrize("key", ["previous: [a]", "lambdas: 1", "adapter_per_stage: new"])
def test_its_keys_under_another_method_name_it(refusal, sound, soft, key):
    name = key.partition(":")[0]
    for text, old, other in ((sound, "beta: 0.1", "gpo"), (soft, "alpha: 0.1", "soft")):
        told = _one_mistake(refusal(text.replace(old, key)))
        assert f"method.{name}: unknown key; method sequential has it, {other} does not; valid here: " in told


@pytest.mark.parametrize(("written", "meant"), [("seqential", "sequential"), ("sequental", "sequential")])
def test_its_name_is_suggested(refusal, sequential, written, meant):
    told = _one_mistake(refusal(sequential.replace("name: sequential", f"name: {written}")))
    assert told.startswith(
        "  my.yaml:11  method.name: expected one of gpo, soft, sequential, self_supervised"
    )
    assert f"did you mean '{meant}'?" in told


def test_a_new_adapter_needs_one(load, refusal, sequential):
    new = "method.adapter_per_stage=new"
    told = _one_mistake(refusal(sequential, new))
    assert "method.adapter_per_stage: there is no adapter in this recipe; set adapter: {type: lora" in told
    assert load(sequential, new, LORA).method.adapter_per_stage == "new"
    load(sequential, "method.adapter_per_stage=continue")  # the default, and nothing to go on with
    told = _one_mistake(refusal(sequential, new, "adapter={type: lorra}"))
    assert "adapter.type: expected lora" in told


def test_earlier_policies_are_always_asked_before(load, refusal, sequential, beside):
    wanted = "scores the data with all earlier policies before it trains; leave it out"
    setting = "training.precompute_ref_log_probs=false"
    assert f"precompute_ref_log_probs: method sequential {wanted}" in _one_mistake(
        refusal(sequential, setting)
    )
    assert f"precompute_ref_log_probs: method.align sequential {wanted}" in _one_mistake(
        refusal(beside, setting)
    )
    load(sequential, "training.precompute_ref_log_probs=true")
    load(sequential, "training.precompute_ref_batch_size=2")


def test_it_compares_pairs(load, refusal, sequential):
    told = _one_mistake(refusal(sequential, "dataset.lists=whole"))
    assert (
        "dataset.lists: method sequential compares pairs; use all_pairs or adjacent_pairs, or method soft"
        in told
    )
    load(sequential, "dataset.lists=all_pairs")


def test_beside_self_supervised(load, refusal, beside):
    method = load(beside).method
    assert isinstance(method.alignment, SequentialSettings)
    assert method.alignment is method.align
    for setting, part in {
        "method.align.lambdas=-1": "method.align.lambdas: expected a number at least 0.0, found -1",
        "method.align.previous=[]": "method.align.previous: expected at least one entry",
        "method.align.adapter_per_stage=new": "method.align.adapter_per_stage: there is no adapter",
        "method.lambdas=3": "method.lambdas: unknown key; did you mean method.align.lambdas?",
    }.items():
        assert part in _one_mistake(refusal(beside, setting))


@pytest.mark.parametrize(
    ("metric", "reported"),
    [
        ("loss", True),
        ("rewards/accuracies", True),
        ("sequential/gradient_weight", True),
        ("gpo/gradient_weight", False),
        ("soft/gradient_weight", False),
    ],
)
def test_metrics_for_the_best_model(load, refusal, sequential, metric, reported):
    chosen = f"training.metric_for_best_model=helpful_{metric}"
    if reported:
        load(sequential, *BEST, chosen)
    else:
        assert "expected a metric of one eval set" in _one_mistake(refusal(sequential, *BEST, chosen))


# --- The name of a dimension ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["helpful", "x.y-z_1", "2nd", "A"])
def test_a_dimension_may_have_a_name_with_any_method(load, sound, soft, sequential, name):
    for text in (sound, soft, sequential):
        recipe = load(text, f"dimension='{name}'")
        assert recipe.dimension == name
        assert load(dump_recipe(recipe)) == recipe


def test_without_one_it_is_left_to_the_run(load, sound):
    assert load(sound).dimension is None
    assert load(sound, "dimension=null").dimension is None


@pytest.mark.parametrize("name", ["a/b", "-x", ".x", "", "a b", "a\\n", "größe"])
def test_names_that_no_file_should_have(refusal, sound, name):
    told = _one_mistake(refusal(sound + f'dimension: "{name}"\n'))
    assert told.startswith("  my.yaml:18  dimension: a dimension's name must consist of letters, digits, '_'")


def test_a_number_is_no_name(refusal, sound):
    assert "dimension: expected a string, found 3" in _one_mistake(refusal(sound, "dimension=3"))
