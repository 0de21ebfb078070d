"""Compress a network of your own to a tenth: a module, some batches, a size."""

import torch
from torch import nn

import lamina

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
batches = [torch.randn(64, 64) for _ in range(4)]

result = lamina.compress(net, batches, "10%")
result.save("net.lamina")
same = lamina.load(
    "net.lamina", skeleton=nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
)

print(result.report.table())
x = torch.randn(5, 64)
print("loaded network gives the same outputs:", torch.equal(same(x), result.model(x)))
