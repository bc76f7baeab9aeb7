"""Key phrases against the reference numbers, and of real responses."""

import gzip
import json
import re
from pathlib import Path

import pytest

from prefopt_cli.data.degrees import degrade
from prefopt_cli.data.keyphrases import WORD, rake
from prefopt_cli.data.stopwords import find_stopwords

pytestmark = pytest.mark.real

UGLY = re.compile(r"[ \t][,.;?)]|,\s*[,.;:?]|\(\s*[),.]|[.?] *[,;]|“\s*”")


def _responses(shared: Path, name: str) -> list[str]:
    with gzip.open(shared / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [response for row in rows for response in row.get("responses") or (row["chosen"], row["rejected"])]


def test_scores(shared: Path) -> None:
    vectors = json.loads((shared / "vectors" / "rake.json").read_text(encoding="utf-8"))
    assert len(vectors["cases"]) == 4
    for case in vectors["cases"]:
        found = rake(case["text"], frozenset(vectors["stopwords"]))
        assert len(found) == len(dict(found))
        assert dict(found) == pytest.approx(case["scores"], abs=1e-9, rel=0)
        assert [score for _, score in found] == sorted(dict(found).values(), reverse=True)


@pytest.mark.parametrize(
    ("name", "responses", "taking_part"),
    [("hh_helpful_harmless", 9284, 8721), ("pandalm_ranked", 732, 637), ("qa_feedback_ranked", 2000, 2000)],
)
def test_degraded_responses(name: str, responses: int, taking_part: int, shared: Path) -> None:
    stopwords = find_stopwords("en")
    texts = _responses(shared, name)
    degraded = [degrade(text, stopwords, 4) for text in texts]
    assert (len(texts), sum(map(bool, degraded))) == (responses, taking_part)
    uglier = 0
    for text, versions in zip(texts, degraded, strict=True):
        words = len(WORD.findall(text))
        for _, version in versions:
            left = len(WORD.findall(version))
            assert 0 < left < words
            assert version[:1].isspace() == text[:1].isspace()
            words = left
            uglier += len(UGLY.findall(version)) > len(UGLY.findall(text))
    assert uglier == 0
