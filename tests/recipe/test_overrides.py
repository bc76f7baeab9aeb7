"""Command line over file over defaults."""

import pytest


def test_values_are_yaml_and_typed_like_the_file(load, sound):
    recipe = load(
        sound,
        "method.beta=0.05",
        "training.max_steps=20",
        "training.save_strategy=no",
        "dataset.train.0.limit=100",
        "dataset.eval.helpful.split=test",
        "adapter={type: lora, r: 8}",
        "dataset.max_length=null",
    )
    assert recipe.method.beta == 0.05
    assert recipe.training["max_steps"] == 20
    assert recipe.training["save_strategy"] == "no"
    assert recipe.dataset.train[0].limit == 100
    assert recipe.dataset.eval["helpful"][0].split == "test"
    assert recipe.adapter.r == 8
    assert recipe.dataset.max_length is None


def test_brackets_are_another_way_to_write_an_index(load, sound):
    assert load(sound, "dataset.train[0].limit=3").dataset.train[0].limit == 3


def test_a_later_override_wins(load, sound):
    assert load(sound, "method.beta=0.5", "method.beta=0.7").method.beta == 0.7


def test_a_mapping_is_replaced_as_a_whole(load, sound):
    recipe = load(sound, "method={name: gpo, loss: hinge}")
    assert (recipe.method.loss, recipe.method.beta) == ("hinge", 0.1)
    assert load(sound, "training={seed: 3}").training == {"seed": 3}


def test_mappings_that_do_not_exist_are_made(load, sound):
    recipe = load(
        sound.replace("training:", "x_training:").split("x_training")[0] + "output_dir: x", "training.seed=3"
    )
    assert recipe.training == {"seed": 3}
    assert load(sound, "dataset.eval.more.source=y").dataset.eval["more"][0].source == "y"


@pytest.mark.parametrize(
    "written", ["train: pairs.jsonl", "train: {source: pairs.jsonl}", "train: [pairs.jsonl]"]
)
@pytest.mark.parametrize("index", ["0", "[0]"])
def test_a_lone_source_is_its_own_first_entry(load, sound, written, index):
    text = sound.replace("train:\n    - source: pairs.jsonl\n      limit: 10", written)
    key = "dataset.train" + (index if index.startswith("[") else f".{index}")
    (source,) = load(text, f"{key}.limit=7").dataset.train
    assert (source.source, source.limit) == ("pairs.jsonl", 7)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method.beta", ["expected key.path=value"]),
        ("=3", ["empty part"]),
        ("method..beta=3", ["empty part"]),
        ("method.beta=[", ["not YAML"]),
        ("method.beta=x", ["method.beta", "a number", "'x'"]),
        ("method.betta=1", ["method.betta", "'beta'"]),
        ("training.lerning_rate=1", ["training.lerning_rate", "'learning_rate'"]),
        ("adapter.r=8", ["adapter is 'none'", "adapter={type: lora, r: ...}"]),
        ("method.beta.x=8", ["method.beta is 0.1", "one value"]),
        ("dataset.train.limit=8", ["a list of 1", "dataset.train.0.limit"]),
        ("dataset.train.3.limit=8", ["a list of 1", "no entry 3"]),
        ("dataset.train.-1.limit=8", ["no entry -1"]),
        ("dataset.train.0.limit=0", ["dataset.train.0.limit", "greater than 0"]),
        ("training.fp16=true", ["training.fp16", "at most one"]),
    ],
)
def test_mistakes_are_located_at_the_override(refusal, sound, override, parts):
    message = refusal(sound.replace("training:", "training:\n  bf16: true"), override)
    assert message.splitlines()[0] == "my.yaml: 1 mistake"
    line = message.splitlines()[1]
    assert line.startswith(f"  override {override!r}  "), message
    for part in parts:
        assert part in line


def test_an_override_that_mends_the_file_leaves_no_mistake(load, sound):
    assert load(sound.replace("beta: 0.1", "beta: x"), "method.beta=0.2").method.beta == 0.2


def test_a_section_that_overrides_have_made_has_their_place(refusal, sound):
    override = "quantization.bits=4"
    message = refusal(sound, override, "adapter={type: lora}", "launch.engine=fsdp")
    (line,) = message.splitlines()[1:]
    assert line.startswith(f"  override {override!r}  quantization: fsdp takes weights of 4 bits"), message


def test_a_mistake_of_the_file_beside_an_override_keeps_its_line(refusal, sound):
    message = refusal(sound.replace("loss: logistic", "loss: x"), "method.beta=0.2")
    assert "my.yaml:12  method.loss" in message
