"""Fixtures that several rooms' tests use."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports the hub's client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# Tiny tensors: a second thread costs more than it brings, above all when tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GOMP_SPINCOUNT"] = "2000"  # as the command line sets it; the sandbox is built by two threads

# Ignored in what a script starts in the background, and then in all that the tests start, whose Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Neither reads nor fills the user's own. The sandbox takes a minute or two to build, so it is kept between runs;
# scores are not, or those of yesterday's code would hide a fault of today's.
KEPT = Path(__file__).resolve().parents[1] / "build" / "test-cache" / "sandbox"
KEPT.mkdir(parents=True, exist_ok=True)
CACHE = tempfile.TemporaryDirectory(prefix="prefopt-tests-")
Path(CACHE.name, "sandbox").symlink_to(KEPT)
os.environ["PREFOPT_CACHE"] = CACHE.name

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real data are left out only where there is none."""
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason="../shared is not there"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, real model and reference numbers."""
    return SHARED


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model (`model/`) and made-up pairs (`pairs.jsonl`, `heldout.jsonl`)."""
    from tests.tiny import build

    folder = tmp_path_factory.mktemp("tiny")
    build(folder)
    return folder


@pytest.fixture(scope="session")
def sandbox() -> Any:
    """The sandbox's world of seed 0, built at its first use: only for tests marked slow."""
    from prefopt_cli.sandbox.world import open_world

    return open_world(0)


@pytest.fixture
def toy_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names `toy:...` besides `sandbox:...`, served by tests/toy_scheme.py."""
    from prefopt_cli.recipe.schemes import SCHEMES

    monkeypatch.setitem(SCHEMES, "toy", "tests.toy_scheme")
