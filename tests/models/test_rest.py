"""What a process sets aside when it rests: all tensors of its device, whoever holds them, and back to the byte."""

import subprocess
import sys

import torch

# In a process of its own, as a worker's: every tensor there is set aside.
SCRIPT = """
import numpy as np, torch
from ctrlrl.models.rest import Rest

def step():
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()

torch.manual_seed(0)
x, model = torch.randn(4, 300), torch.nn.Linear(300, 300)
flat = torch.arange(10.0)
view, shared = flat[2:5], torch.from_numpy(np.arange(4.0))  # a part of another, and memory that is not torch's
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
step()
optimizer.zero_grad()
model(x).sum().backward()  # gradients that Python has not seen yet
before, rest = [p.detach().clone().numpy() for p in model.parameters()], Rest(torch.device("cpu"))
moved = rest.begin()
own = 4 * (300 * 300 + 300)
assert moved >= 4 * own + 4 * x.numel() + 40, moved  # weights, gradients, two moments; each storage once
assert moved < 8.5 * own, moved
assert rest.begin() == 0
held = [model.weight, model.weight.grad, optimizer.state[model.weight]["exp_avg"], flat, view]
assert [t.untyped_storage().nbytes() for t in held] == [0] * 5 and shared.sum() == 6
rest.end()
rest.end()
assert all(np.array_equal(a, b.detach().numpy()) for a, b in zip(before, model.parameters(), strict=True))
assert bool((model.bias.grad == 4).all()) and torch.allclose(model.weight.grad, x.sum(0).expand(300, 300), atol=1e-5)
flat[3] = 7
assert view[1] == 7  # still a part of it
step()
assert rest.begin() > 0
rest.end()
print("fine")
"""


def test_all_of_a_process_is_set_aside_and_put_back_to_the_byte():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def test_tensors_of_another_device_stay():
    from ctrlrl.models.rest import storages_on

    there = torch.ones(3, device="meta")
    assert there.untyped_storage()._cdata in [storage._cdata for storage in storages_on(there.device)]
    assert there.untyped_storage()._cdata not in [storage._cdata for storage in storages_on(torch.device("cpu"))]
