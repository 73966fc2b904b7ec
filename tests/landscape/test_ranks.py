"""Data split over ranks, DistributedDataParallel and FSDP2: two processes give what one process gives."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharpscope import GGN, GradientCovariance, Hessian, Objective
from torch import nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(70, 5, dtype=torch.float64), torch.randint(0, 3, (70,))


def quantities(objective):
    v = torch.linspace(-1, 1, objective.num_parameters, dtype=torch.float64)
    return {
        "loss": torch.tensor(objective.loss()),
        "gradient": objective.gradient(),
        "hessian": Hessian(objective, engine="double-backward") @ v,
        "forward": Hessian(objective, engine="forward-over-reverse") @ v,
        "differences": Hessian(objective, engine="finite-difference") @ v,
        "ggn": GGN(objective) @ v,
        "covariance": GradientCovariance(objective) @ v,
    }


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, y = make()
    mine = slice(0, 50) if rank == 0 else slice(50, 70)
    data = [(x[mine][:15], y[mine][:15]), (x[mine][15:], y[mine][15:])]
    results = {}
    criterion = nn.CrossEntropyLoss()
    results["group"] = quantities(Objective.supervised(model, criterion, data, group=dist.group.WORLD))
    results["ddp"] = quantities(
        Objective.supervised(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), criterion, data)
    )
    from torch.distributed.fsdp import fully_shard

    sharded = copy.deepcopy(model)
    fully_shard(sharded[0])
    fully_shard(sharded)
    before = sharded(x[:4]).detach()
    results["fsdp2"] = quantities(Objective.supervised(sharded, criterion, data))
    assert torch.equal(sharded(x[:4]).detach(), before)
    F.cross_entropy(sharded(x), y).backward()
    assert type(sharded[0].weight.grad).__name__ == "DTensor"
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    model, x, y = make()
    expected = quantities(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True, cwd="/"
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for wrapper, found in results.items():
            for name, value in found.items():
                rtol = 1e-7 if name == "differences" else 1e-10
                torch.testing.assert_close(
                    value, expected[name].to(value), rtol=rtol, atol=1e-9, msg=f"{wrapper} {name}"
                )


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
