"""What each of two processes over gloo really holds, beside the estimate: a model of 56 million numbers."""

import pytest

from benchmarks.memory_engines import COUNTED, EngineCase, run_case

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    [EngineCase("ddp"), EngineCase("fsdp"), EngineCase("fsdp", accumulation=2)],
    ids=lambda case: case.name,
)
def test_parts_and_peak(case: EngineCase) -> None:
    ratio = run_case(case)["ratio"]

    for part in COUNTED:
        assert ratio[part] == pytest.approx(1, abs=0.01), part
    assert ratio["peak"] == pytest.approx(1, abs=0.15)
