"""Run by the Python that has vLLM: its weight transfer by CUDA IPC over what a trainer would send of a GPU's
memory, with the driver's calls stood in for. The folder given has sent.pt; found.pt is written."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.multiprocessing import reductions
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

folder = Path(sys.argv[1])
found: dict[str, torch.Tensor] = {}
now: list[torch.Tensor] = []
device = torch.device("cuda", 0)
opened = []


def rebuild(*args: object) -> torch.Tensor:
    opened.append(args)
    return now[0]


torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="card")
torch.accelerator.synchronize = lambda: None
reductions.rebuild_cuda_tensor = rebuild
model = SimpleNamespace(load_weights=found.update)
configs = SimpleNamespace(parallel_config=None, model_config=None)
engine = IPCWeightTransferEngine(None, configs, device, model)
engine.init_transfer_engine(engine.parse_init_info({"packed": True}))
for says, blocks, buffer in torch.load(folder / "sent.pt"):
    now[:] = now or [buffer]
    now[0].copy_(buffer)  # each part in the one buffer, over the one before
    engine.update_weights({**says, "ipc_handles": pickle.loads(blocks[0])})
assert opened == [(0, 1, 2, 3, 4, 5, 0)]  # once for all parts, on the engine's device
torch.save(found, folder / "found.pt")
