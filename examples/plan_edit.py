"""A plan is a document: save it, change a decision, carry it out."""

import json
from pathlib import Path

import torch
from torch import nn

import lamina

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
batches = [torch.randn(64, 32) for _ in range(4)]

first = lamina.compress(net, batches, "15%", methods=["rdoq"], recover=None)
first.plan.save("plan.json")
print(first.plan.show())

# The last layer shall stay exactly as it is.
document = json.loads(Path("plan.json").read_text())
document["sites"]["2"]["steps"] = [{"method": "keep", "at": "2"}]
Path("plan.json").write_text(json.dumps(document, indent=1))

second = lamina.compress(net, batches, plan=lamina.Plan.load("plan.json"), recover=None)
print(f"{len(first.file):,} bytes as planned, {len(second.file):,} with the last layer kept")
print("kept bit for bit:", torch.equal(second.model[2].weight, net[2].weight))
