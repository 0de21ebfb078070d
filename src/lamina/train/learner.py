"""What learns: an edited network held to its decisions, beside the original that teaches it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.errors import NetworkError
from lamina.forms import Edit, find_tensor
from lamina.measure.forward import Batch
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.train.distill import Hidden
from lamina.train.hold import HeldNetwork
from lamina.train.moments import Norm
from lamina.train.pressure import rate_penalty
from lamina.train.recovery import Recovery
from lamina.train.starts import check_values, held_edits, start_edit
from lamina.train.teach import rest_norms, taught_loss
from lamina.train.tuning import hold_scales


class Learner:
    """A network in training, on one process: gradients gather in the parameters of `net`.

    Args:
        original: the teacher; not changed.
        edited: where training starts; not changed.
        recovery: settings.
        squeeze: the file must come down to a limit.
        device: where to compute.

    Raises:
        NetworkError: a tensor has no values, or there is nothing to train.
    """

    def __init__(
        self,
        original: Network,
        edited: Edited,
        recovery: Recovery,
        squeeze: bool,
        device: torch.device,
    ) -> None:
        check_values(original.module)
        check_values(edited.model)
        self.recovery, self.loss_kind = recovery, original.loss
        self.teacher = copy_module(original.module).eval().requires_grad_(False).to(device)
        self.student = copy_module(edited.model).to(device)
        self.norms = [m for m in self.student.modules() if isinstance(m, Norm)]
        self.edits: list[Edit] = held_edits(self.student, edited.edits)
        starts = edited.floats if squeeze and recovery.start == "wide" else {}
        begun = [start_edit(e, starts) for e in self.edits]
        if recovery.parts == "scales":
            self.net = hold_scales(self.student, begun).to(device)
        else:
            self.net = HeldNetwork(self.student, begun, starts).to(device)
        self.parameters = list(self.net.parameters())
        if not self.parameters:
            raise NetworkError(
                "there is nothing to train", original.name, "every parameter is frozen",
                "use recover=None, or requires_grad_(True)",
            )  # fmt: skip
        self.hidden = Hidden(self.teacher, self.student) if recovery.hidden else None
        self.rows: dict[str, list[torch.Tensor]] = {}  # of embeddings, that a batch looked up
        for name in self.net.names if squeeze else ():
            self._watch(name)

    def _watch(self, name: str) -> None:
        """Note which rows of a tensor a batch looks up, where it does nothing else with it."""
        module = self.student.get_submodule(name.rpartition(".")[0])
        weight = find_tensor(self.student, name)
        shared = dict(self.student.named_parameters(remove_duplicate=False)).values()
        if not isinstance(module, nn.Embedding) or sum(p is weight for p in shared) > 1:
            return
        found = self.rows.setdefault(name, [])
        module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))

    def learn(self, batch: Batch, share: float, price: float | None) -> float:
        """Add the gradient of one batch, and return its part of the loss.

        Args:
            batch: on the learner's device.
            share: what the batch counts of its step, 0..1.
            price: of a bit, where bits are paid for with this batch [loss].
        """
        r = self.recovery
        self._settle(batch)
        levels: dict[str, torch.Tensor] = {}
        for looked_up in self.rows.values():
            looked_up.clear()

        def run(*args: Any, **kwargs: Any) -> Any:
            output, found = self.net(*args, **kwargs)
            levels.update(found)
            return output

        loss = share * taught_loss(
            run, self.teacher, batch, self.loss_kind, weight=r.distill,
            temperature=r.temperature, half=r.half,
            hidden=None if self.hidden is None else (r.hidden, self.hidden),
        )  # fmt: skip
        whole = loss
        if price is not None and levels:
            # Bits of a row that no text of the batch uses would be saved at no loss, and the token
            # be lost: only the rows that the loss speaks for as well are asked to become cheaper.
            for name, looked_up in self.rows.items():
                if name in levels and looked_up:
                    used = torch.cat([ids.flatten() for ids in looked_up]).unique()
                    levels[name] = levels[name][used]
            whole = loss + price * rate_penalty(levels)
        whole.backward()
        return float(loss.detach())

    def _settle(self, batch: Batch) -> None:
        """Let dropout work where labels teach, and BatchNorm where there is more than one sample.

        The original, without dropout, cannot be over-learned: noise would only drown what it says.
        """
        r = self.recovery
        apart = r.parts == "scales" or self.loss_kind in ("features", "embedding")
        noisy = batch.labels is not None and r.distill < 1 and not apart
        for m in self.student.modules():  # recurrent layers cannot learn in evaluation mode on GPUs
            m.training = noisy or isinstance(m, (Norm, nn.RNNBase))
        rest_norms(self.norms, batch)

    def moments(self) -> list[torch.Tensor]:
        """Return the buffers that batches change: the running moments of BatchNorm layers."""
        return [b for m in self.norms for b in m.buffers(False) if b.is_floating_point()]
