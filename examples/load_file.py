"""Open a file: a zoo network rebuilds itself; a network of your own needs its skeleton."""

import torch

import lamina

net = lamina.zoo("lenet-5")
result = lamina.compress(net, net.data, "5%", methods=["rdoq"], recover=None, samples=250)
result.save("lenet-5.lamina")

model = lamina.load("lenet-5.lamina")  # a plain nn.Module, in evaluation mode
images, labels = next(iter(net.data.test))
with torch.no_grad():
    before = (net.module(images).argmax(1) == labels).float().mean()
    after = (model(images).argmax(1) == labels).float().mean()
print(f"{len(result.file):,} bytes; accuracy on a test batch {before:.3f} -> {after:.3f}")
