"""`FusedAdam` with the arguments, the groups' own step and the tensor lists of apex's; its kernel is as
strict as one that reads addresses: plain tensors, contiguous, the last of a list not empty."""

import torch
from torch.distributed.tensor import DTensor


def multi_tensor_adam(
    chunk_size, overflow, lists, lr, beta1, beta2, eps, step, adam_w_mode, bias_correction, weight_decay
):
    assert isinstance(chunk_size, int) and overflow.dtype == torch.int and len(lists) == 4
    assert all(type(t) is torch.Tensor and t.is_contiguous() for tensors in lists for t in tensors)
    assert all(t.dtype == torch.float32 for tensors in lists for t in tensors)
    assert lists[0] and lists[0][-1].numel(), "apex would not launch"
    assert adam_w_mode == 1 and bias_correction == 1 and isinstance(step, int)
    for g, p, m, v in zip(*lists, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + weight_decay * p
        p.sub_(lr * update)


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert not (amsgrad or capturable or master_weights)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas}
        super().__init__(params, defaults | {"eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)
        self.multi_tensor_adam = multi_tensor_adam
        self.overflow = torch.zeros(1, dtype=torch.int)

    def zero_grad(self):
        raise AssertionError("apex's own takes no `set_to_none`")

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            held = [p for p in group["params"] if p.grad is not None]
            for p in held:
                assert isinstance(p, DTensor)
                if not self.state[p]:
                    self.state[p] = {k: torch.zeros_like(p.data) for k in ("exp_avg", "exp_avg_sq")}
            if not held:
                continue
            lists = [[p.grad.data for p in held], [p.data for p in held]]
            lists += [[self.state[p][k] for p in held] for k in ("exp_avg", "exp_avg_sq")]
            self.multi_tensor_adam(
                1 << 16,
                self.overflow,
                lists,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                self.adam_w_mode,
                int(group["bias_correction"]),
                group["weight_decay"],
            )
