"""Data split over two ranks: what sums over examples is of all, what needs their gradients is of each rank's own."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from sharpscope import Objective, per_example_statistics
from torch import nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(70, 5, dtype=torch.float64)
    return model, x, (x[:, 0] > -1).long()


def numbers(statistics):
    noise, alignment = statistics.noise_scale(), statistics.alignment()
    return {
        "noise": torch.tensor([noise.estimate, noise.stderr, noise.trace, noise.squared_norm, noise.low, noise.high]),
        "snr": torch.tensor(list(statistics.snr("parameter", "mean").values())),
        "norms": statistics.norms,
        "alignment": torch.tensor([alignment.mean_cosine, alignment.diversity, alignment.diversity_stderr]),
    }


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, y = make()
    mine = slice(0, 50) if rank == 0 else slice(50, 70)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x[mine], y[mine]), group=dist.group.WORLD)
    statistics = per_example_statistics(objective)
    found = numbers(statistics)
    with pytest.raises(ValueError, match="they lie on several"):
        statistics.noise_scale(torch.eye(objective.num_parameters, dtype=torch.float64))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    model, x, y = make()
    whole = numbers(per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))))
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True, cwd="/")
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    for rank, mine in enumerate((slice(0, 50), slice(50, 70))):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        own = numbers(per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), (x[mine], y[mine]))))
        for name, expected in (whole | {"alignment": own["alignment"]}).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-12, msg=f"rank {rank}: {name}")


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
