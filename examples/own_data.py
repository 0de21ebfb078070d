"""Give loaders and a metric of your own: training wins back what compression took."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lamina

torch.manual_seed(0)
x = torch.randn(1500, 20)
y = (x[:, :4].cumsum(1) > 0).sum(1)  # five classes
train, validation = TensorDataset(x[:1000], y[:1000]), TensorDataset(x[1000:], y[1000:])
loaders = {
    "train": DataLoader(train, batch_size=50, shuffle=True),
    "validation": DataLoader(validation, batch_size=250),
}


def close_enough(module, loader):
    """Points: how often the class is at most one off."""
    hits = [((module(x).argmax(1) - y).abs() <= 1).float().mean() for x, y in loader]
    return 100 * float(sum(hits) / len(hits))


net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
optimizer = torch.optim.Adam(net.parameters(), 3e-3)
for _ in range(10):
    for inputs, labels in loaders["train"]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()

result = lamina.compress(
    net, loaders, "8%", recover=5, metric=close_enough, methods=["rdoq", "kmeans"]
)
print(result.report.table())
print(f"validation: {close_enough(result.model, loaders['validation']):.1f} points")
