"""The same steps on a GPU as on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from optimizer_rows import all_rows
from sharpscope.dynamics.workloads.digits import digits
from torch import nn

# Random numbers differ between devices, as do the last bits that signs and codes hang on.
ROWS = [row for row in all_rows() if not row.draws and not any(k in row.name for k in ("Sign", "Lion", "4bit"))]


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_cuda_makes_the_steps_of_the_cpu_and_resumes(row):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    data = digits(100).train

    def run(device, again):
        net = copy.deepcopy(model).to(device)
        x, y = data.inputs.double().to(device), data.targets.to(device)
        optimizer = row.by_options(list(net.parameters()), **row.descent)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for step in range(20):
            if again and step == 10:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = row.by_options(list(net.parameters()), **row.descent)
                optimizer.load_state_dict(saved)
            optimizer.step(closure)
        return [p.detach().cpu() for p in net.parameters()]

    for p, q in zip(run("cuda", True), run("cpu", False), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
