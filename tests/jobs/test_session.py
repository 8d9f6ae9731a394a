"""What is asked of a cluster: the fewest workers must have room, and passes over texts use all that there is."""

import pytest

from rayembed.config.ray import RayConfig
from rayembed.jobs import session


@pytest.fixture
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_resources", lambda: {"CPU": 6.0, "GPU": 2.0})


@pytest.mark.usefixtures("six_cores")
@pytest.mark.parametrize(
    ("workers", "cpus", "use_gpu", "expected"),
    [
        ((1, 4), 1, False, 4),
        ((1, 4), 2, False, 3),
        ((1, 4), 1, True, 2),
        ((3, 4), 4, False, 3),
        (9, 1, False, 9),
    ],
)
def test_as_many_workers_as_there_is_room_for(
    workers: int | tuple[int, int], cpus: int, use_gpu: bool, expected: int
) -> None:
    config = RayConfig(num_workers=workers, cpus_per_worker=cpus, max_failures=1)
    assert session.room_for(config, use_gpu=use_gpu) == expected


@pytest.mark.usefixtures("six_cores")
def test_the_fewest_must_have_room() -> None:
    session._check_resources(RayConfig(num_workers=(2, 9), cpus_per_worker=3))
    with pytest.raises(ValueError, match=r"ray\.num_workers 3 x ray\.cpus_per_worker 3 asks for 9 CPU cores"):
        session._check_resources(RayConfig(num_workers=(3, 9), cpus_per_worker=3))
    session.check_gpus(RayConfig(num_workers=(2, 9)), "ray.use_gpu")
    with pytest.raises(ValueError, match=r"asks for 3 GPUs; there are 2"):
        session.check_gpus(RayConfig(num_workers=(3, 9)), "ray.use_gpu")
