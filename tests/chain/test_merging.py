"""A stage's sections are laid over the shared ones, and their places in the file stay known."""

from prefopt_cli.chain.merging import merge

SHARED = {
    "training": {"learning_rate": 1.0, "seed": 0},
    "dataset": {"eval": {"a": {"source": "a.jsonl"}}, "train": ["x", "y"]},
    "adapter": "none",
}


def test_mappings_are_merged_and_all_else_is_replaced():
    stage = {
        "training": {"seed": 1},
        "dataset": {"train": ["z"], "eval": {"b": "b.jsonl"}},
        "adapter": {"type": "lora"},
    }
    merged = merge(SHARED, stage, 1)
    assert merged.data == {
        "training": {"learning_rate": 1.0, "seed": 1},
        "dataset": {"eval": {"a": {"source": "a.jsonl"}, "b": "b.jsonl"}, "train": ["z"]},
        "adapter": {"type": "lora"},
    }


def test_a_value_is_placed_where_it_stands():
    merged = merge(SHARED, {"training": {"seed": 1}, "adapter": {"type": "lora"}}, 1)
    assert merged.place(("training", "seed")) == ("stages", 1, "training", "seed")
    assert merged.place(("training", "learning_rate")) == ("training", "learning_rate")
    assert merged.place(("adapter", "type")) == ("stages", 1, "adapter", "type")
    assert merged.place(("dataset", "train", 0)) == ("dataset", "train", 0)


def test_what_one_stage_changes_no_other_sees():
    first = merge(SHARED, {}, 0)
    first.data["dataset"]["eval"]["a"]["source"] = "other"
    assert merge(SHARED, {}, 1).data["dataset"]["eval"]["a"]["source"] == "a.jsonl"
