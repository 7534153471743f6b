"""RayEngine on a real cluster of one node; run in the session ``ray`` of noxfile.py, and nowhere else."""

from collections.abc import Iterator

import pytest
from ray_cluster import cluster, make_engine

from parallel_agents.testing import RemoteEngineContract
from parallel_agents.testing.remote import MakeEngine


@pytest.fixture(scope="session", autouse=True)
def address() -> Iterator[str]:
    with cluster() as address:
        yield address
        import ray  # noqa: PLC0415 - it reads the token when it is imported

        ray.shutdown()


class TestRayEngine(RemoteEngineContract):
    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        return make_engine
