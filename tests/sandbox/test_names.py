"""What ``sandbox:`` names mean, and what is said of those that mean nothing."""

import subprocess
import sys

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.sandbox.names import (
    DIMENSIONS,
    KINDS,
    LARGEST_SEED,
    BaseName,
    PreferencesName,
    parse_dataset,
    parse_model,
)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("base", BaseName(0)),
        ("base/seed=7", BaseName(7)),
        (f"base/seed={LARGEST_SEED}", BaseName(LARGEST_SEED)),
    ],
)
def test_models(name: str, meaning: BaseName) -> None:
    assert parse_model(name) == meaning


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("polite", PreferencesName("polite", 1.0, 0)),
        ("helpful/temperature=0.5", PreferencesName("helpful", 0.5, 0)),
        ("concise/temperature=0", PreferencesName("concise", 0.0, 0)),
        ("polite/seed=3/temperature=2", PreferencesName("polite", 2.0, 3)),
        ("polite/temperature=2/seed=3", PreferencesName("polite", 2.0, 3)),
    ],
)
def test_datasets(name: str, meaning: PreferencesName) -> None:
    assert parse_dataset(name) == meaning


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_kind_of_every_dimension(dimension: str, kind: str | None) -> None:
    assert parse_dataset(dimension, kind).dimension == dimension


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "only model is sandbox:base"),
        ("bass", "only model is sandbox:base"),
        ("polite", "sandbox:polite is a dataset"),
        ("base/sead=1", "Did you mean seed?"),
        ("base/temperature=1", "write seed=... after a slash"),
        ("base/seed", "is no setting"),
        ("base/seed=", "seed must be a whole number"),
        ("base/seed=-1", "seed must be a whole number"),
        ("base/seed=1.0", "seed must be a whole number"),
        ("base/seed=١", "seed must be a whole number"),
        (f"base/seed={LARGEST_SEED + 1}", f"from 0 to {LARGEST_SEED}"),
        (f"base/seed={'9' * 5000}", f"from 0 to {LARGEST_SEED}"),
        ("base/seed=1/seed=2", "seed is given twice"),
    ],
)
def test_models_that_are_none(name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_model(name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("politte", None, "Did you mean polite?"),
        ("zzz", None, "it has helpful, polite, concise"),
        ("base", None, "sandbox:base is the model"),
        ("polite", "rankd", "Did you mean ranked?"),
        ("polite", "zzz", "they come as pairs, best_of_n, ranked"),
        ("polite/temprature=1", None, "Did you mean temperature?"),
        ("polite/temperature=-1", None, "temperature must be a number of at least 0"),
        ("polite/temperature=nan", None, "temperature must be a number"),
        ("polite/temperature=inf", None, "temperature must be a number"),
        ("polite/temperature=warm", None, "temperature must be a number"),
        ("polite/temperature=1/temperature=2", None, "temperature is given twice"),
    ],
)
def test_datasets_that_are_none(name: str, kind: str | None, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_dataset(name, kind)
    assert said in str(caught.value)
    assert f"sandbox:{name}" in str(caught.value)


def test_names_are_judged_before_anything_heavy_is_imported() -> None:
    program = (
        "import sys, prefopt_cli.sandbox.scheme as scheme; scheme.check_model('base'); "
        "scheme.check_dataset('polite', None); "
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
